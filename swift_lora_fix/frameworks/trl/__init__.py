"""TRL's trainers that generate with ``VLLMGeneration`` (GRPO, RLOO and kin): hooks, instrumentors, and the port."""
