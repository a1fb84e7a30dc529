"""What the suites, the benchmarks and the demo share: tiny models, CPU shims, the probe plugin and the run driver."""
