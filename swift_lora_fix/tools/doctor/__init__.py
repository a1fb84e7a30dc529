"""``swift-lora-fix doctor``."""
