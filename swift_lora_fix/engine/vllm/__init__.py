"""vLLM in this process: what it holds and how it is written."""
