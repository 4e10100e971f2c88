"""The mathematics of corruption: corrupt, one reverse step that samples and scores, weights. No networks, no loops."""
