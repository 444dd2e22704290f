"""Benchmarks: one file each, from the published files to examples."""
