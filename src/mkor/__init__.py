"""MKOR: curvature for any PyTorch optimizer, from a few vectors per step."""
