"""The verbs of the command line, a folder each: facts.py finds out, view.py prints. plugin.py prints a path."""
