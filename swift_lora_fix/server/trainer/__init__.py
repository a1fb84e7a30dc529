"""The trainer's side of server mode."""
