"""N-shot evaluation of a checkpoint, its statistics, the report page, export and the Python API."""
