"""Networks and weights, a file a family and what they share: diffusion models, CLIP, language models."""
