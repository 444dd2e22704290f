"""Networks and weights, one file a family: diffusion models behind one contract, CLIP, language models."""
