"""What is patched, and how it goes in and out again."""
