"""The training frameworks, a folder each: its trainer behind the port (trainer.py), and the hooks into it."""
