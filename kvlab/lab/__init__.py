"""Evaluation of the system: the demo, benchmarks, fuzzing and model quality, with their common tools."""
