"""Kinds of layers: which rows a call of each has, and their sums."""
