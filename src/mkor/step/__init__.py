"""What a step does with the sums: means, factors, preconditioned gradients."""
