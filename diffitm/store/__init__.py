"""The table between models and tasks: pairs, scores, what is still missing, and the join back to examples."""
