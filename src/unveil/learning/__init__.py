"""Advantages, likelihoods, objectives, regularisers, selectors: pure functions of Trajectory and networks."""
