"""One module a benchmark; each has `run`, which returns JSON-ready data."""
