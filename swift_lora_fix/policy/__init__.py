"""What is to be served: the trainer's adapter, only read; where it came from; what it makes of the base."""
