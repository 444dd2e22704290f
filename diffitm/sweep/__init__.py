"""What a sweep turns and what comes out of it."""
