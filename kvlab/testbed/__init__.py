"""Real servers on loopback and a fault proxy, for tests, benchmarks and notebooks."""
