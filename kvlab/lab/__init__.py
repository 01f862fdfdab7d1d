"""Evaluation: what the system gives, in numbers. Everything here prints or returns JSON-ready data."""
