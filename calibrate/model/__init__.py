"""What is calibrated."""
