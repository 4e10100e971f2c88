"""Data, prompt, verifier and metrics in one object."""
