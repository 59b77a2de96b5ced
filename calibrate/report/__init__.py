"""What a human sees."""
