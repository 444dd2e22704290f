"""The applications, a file a command: options, stages (of actors), workers (of trainings)."""
