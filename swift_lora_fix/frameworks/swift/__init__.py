"""ms-swift: its trainer behind the port, and the hooks into it."""
