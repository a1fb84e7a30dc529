"""How a library is patched: facts about releases, what must be there, patches as records, when they go in and out.

What is patched is said above, by frameworks/ and memory/; who is patched in a process by arming.py.
"""
