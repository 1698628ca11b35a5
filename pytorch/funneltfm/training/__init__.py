"""Floor 3: a run in time."""
