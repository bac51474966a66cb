"""From a running model to sums: hooks, backward passes, the buffer."""
