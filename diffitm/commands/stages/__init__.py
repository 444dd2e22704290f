"""What an actor does, one file a stage."""
