"""One module per benchmark. Its function `run` returns JSON-ready data."""
