"""What every optimizer of the package promises."""
