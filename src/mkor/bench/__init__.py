"""Benchmarks: races, overhead and coverage, through the public API only."""
