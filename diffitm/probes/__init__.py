"""Evaluations of a CLIP beyond image-text pairs."""
