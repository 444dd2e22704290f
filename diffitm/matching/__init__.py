"""The method: noise plans, per-timestep errors and the scores made of them. Pure torch."""
