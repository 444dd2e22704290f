"""From the store to figures."""
