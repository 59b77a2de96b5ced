"""Which setting."""
