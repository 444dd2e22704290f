"""Sweeps over settings: what is turned, what comes out. Without Ray; diffitm/distributed runs them."""
