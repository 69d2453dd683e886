"""The learnt policy: a pointer network over a pool of candidates, and its checkpoint formats."""
