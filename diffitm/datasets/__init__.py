"""Fetching the published data: what there is, one safe download, safe unpacking."""
