"""From a running model to sums of a few vectors per layer."""
