"""Verifiers and scorers of finished and intermediate guesses."""
