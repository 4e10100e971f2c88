"""One file per paper: the experiment that shows its claim against its baseline, and judges it."""
