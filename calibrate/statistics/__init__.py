"""What every scale factor would skip."""
