"""Every setting of the package: its defaults (schema), and how YAML, environment, --set and flags change them (load)."""
