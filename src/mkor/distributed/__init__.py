"""What passes between processes, and who does what for others."""
