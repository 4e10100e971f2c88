"""Networks that answer with logits of x_0 at aligned positions, and adapters to published ones."""
