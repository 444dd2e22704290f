"""Diffusion models behind one contract, and CLIP."""
