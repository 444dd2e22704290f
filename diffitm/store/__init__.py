"""The table between models and tasks: pairs, scores, what is still missing, the join back to examples."""
