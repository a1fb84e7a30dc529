"""How a library is patched: facts about releases, what must be there, patches as records, when they go in and out.

What is patched is defined in frameworks/ and memory/; which patches a process gets, in arming.py.
"""
