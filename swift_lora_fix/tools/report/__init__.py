"""``swift-lora-fix report``."""
