"""Real servers on loopback, and what disturbs them: for tests, benchmarks and notebooks."""
