"""lever_lm: learn which demonstrations to show a frozen vision-language model before a knowledge question."""

__version__ = "0.1.0"
