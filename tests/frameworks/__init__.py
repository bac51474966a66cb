"""Frameworks, examples and optional packages."""
