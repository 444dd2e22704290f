"""The applications, a file a command and what they share; stages/ is what actors do, workers/ what trainings do."""
