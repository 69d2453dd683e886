"""Every setting of the package: its defaults (schema) and who may change them (load)."""
