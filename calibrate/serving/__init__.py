"""A server that is running: what it says of itself, and how it does beside a dense one."""
