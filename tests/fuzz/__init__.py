"""Fuzzing of every reader of untrusted files: see run.py."""
