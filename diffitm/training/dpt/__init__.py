"""The update step of DPT: an adapter that probes a diffusion model, and tuning by it."""
