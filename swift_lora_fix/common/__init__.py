"""What every layer uses, and what uses no other layer: log, settings, digest, clock, ranks, files."""
