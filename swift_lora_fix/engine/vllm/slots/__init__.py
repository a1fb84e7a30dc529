"""Adapter mode: straight into vLLM's LoRA slots, by a plan that was learnt and proved."""
