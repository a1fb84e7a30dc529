"""Dense LoRA layers: the one adapter of an RL run, computed with the base weight in one matrix product."""
