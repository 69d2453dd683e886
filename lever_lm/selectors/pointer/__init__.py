"""Who chooses the demonstrations."""
