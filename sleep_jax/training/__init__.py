"""Training: optimizer, step, loop, checkpoints, judging."""
