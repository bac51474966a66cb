"""What the hooks see of a model."""
