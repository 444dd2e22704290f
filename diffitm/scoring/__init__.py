"""Rows of the pair table to errors or similarities: noise, batches, scorers. Pure torch, without Ray."""
