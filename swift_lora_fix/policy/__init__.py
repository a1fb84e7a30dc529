"""What is to be served: the trainer's adapter, where it came from, and what it makes of the base."""
