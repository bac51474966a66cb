"""Kinds of factors: how a layer's statistics become a preconditioner."""
