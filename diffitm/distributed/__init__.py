"""Ray, and nothing else: it knows no task, no model family and no command."""
