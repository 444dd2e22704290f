"""Stored scores to figures, tests between models and diagnostics."""
