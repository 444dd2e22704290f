"""What made the embedded models and draws their world: run once, not part of the package."""
