"""What a run will take, and what can be computed before it."""
