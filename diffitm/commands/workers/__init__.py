"""What a process of Ray Train or Ray Tune does."""
