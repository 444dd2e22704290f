"""The applications, a file a command, and what they share; stages/ is of actors, workers/ of trainings."""
