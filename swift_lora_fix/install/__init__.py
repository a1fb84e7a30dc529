"""What is patched, on which releases, and when the patches go in and out."""
