"""Floor 1: text to batches."""
