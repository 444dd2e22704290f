"""One (image, text) pair to its errors or its similarity: pure torch, what an actor runs."""
