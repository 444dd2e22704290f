"""diffitm: measure and use what text-to-image diffusion models know about images and words."""

__version__ = "0.1.0"
