"""What skipping costs."""
