"""Speed and memory against reference loops, measured side by side in one run."""
