"""What every layer uses and what uses none of them: log, settings, digest, clock, ranks, files."""
