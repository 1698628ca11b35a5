"""Floor 2: labels, losses, scores."""
