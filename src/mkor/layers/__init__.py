"""Layers as matrices: which modules have any, which rows a call has, and their sums."""
