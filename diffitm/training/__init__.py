"""What a tuning is made of, without a loop: rows, draws, objectives and update steps (lora/,
dpt/, diva/)."""
