"""Whether a setting passes, on prompts that the search never saw."""
