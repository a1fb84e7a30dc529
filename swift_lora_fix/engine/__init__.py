"""Engine side: what vLLM holds, and how an adapter gets there."""
