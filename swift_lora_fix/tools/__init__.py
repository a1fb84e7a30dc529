"""The verbs of the command line, each in a folder: facts.py finds the facts, view.py prints them. plugin.py prints a
path."""
