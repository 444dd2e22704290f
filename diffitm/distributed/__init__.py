"""Ray, and nothing else: stages and their actors, groups of training workers, trials."""
