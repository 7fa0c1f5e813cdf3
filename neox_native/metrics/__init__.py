"""What a run measures, what it writes down, and how it notices that something is wrong."""
