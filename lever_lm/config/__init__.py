"""Every setting of the package: its defaults (schema) and who may change them (load)."""

from lever_lm.config.schema import Config, DataConfig

__all__ = ["Config", "DataConfig"]
