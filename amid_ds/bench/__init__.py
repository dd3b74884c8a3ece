"""Benchmarks against the alternatives, all in one run on one machine, so that ratios hold."""
