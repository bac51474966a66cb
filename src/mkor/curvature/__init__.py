"""Curvatures: how a layer's statistics become a preconditioner."""
