"""The update step of a CLIP under a diffusion model's feedback."""
