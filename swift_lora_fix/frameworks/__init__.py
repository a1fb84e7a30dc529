"""The training frameworks: what the package asks of a trainer, and how each framework answers."""
