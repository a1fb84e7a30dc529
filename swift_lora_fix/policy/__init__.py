"""What is to be served: the trainer's adapter, read and never written; where it came from; what it makes of the base."""
