"""The engine's base weights: sent once, or rewritten with the adapter folded in."""
