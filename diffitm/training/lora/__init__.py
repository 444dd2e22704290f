"""The update step of a diffusion model's LoRA."""
