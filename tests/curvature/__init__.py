"""The numbers of each curvature."""
