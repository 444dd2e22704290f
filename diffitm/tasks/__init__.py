"""Benchmarks, one file each: from published files to examples and their credits."""
