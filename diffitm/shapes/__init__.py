"""The embedded default: a small world of drawn scenes, and tiny models trained on it."""
