"""The thresholds file."""
