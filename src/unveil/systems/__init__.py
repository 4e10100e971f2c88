"""One file per paper: only what is that paper's own, then its composition of shared parts."""
