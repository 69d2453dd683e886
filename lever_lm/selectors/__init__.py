"""Selectors: what chooses the demonstrations of a query."""
