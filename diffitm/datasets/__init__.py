"""What is fetched of the published data, and how: one safe download, safe unpacking."""
