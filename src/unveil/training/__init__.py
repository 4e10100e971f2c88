"""The loop, distribution, checkpoints, logging, policy snapshots."""
