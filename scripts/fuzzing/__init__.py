"""The parts of scripts/fuzz.py: how inputs are spoilt, how parsers are run on them, and which parsers there are."""
