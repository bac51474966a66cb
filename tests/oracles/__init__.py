"""The mathematics once more, from the papers: float64, dense, naive, nothing of mkor."""
