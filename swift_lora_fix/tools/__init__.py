"""The verbs of the command line, each in a folder: facts.py finds out, view.py says it. plugin.py prints a path."""
