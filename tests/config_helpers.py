"""The Config of a command line."""

from pathlib import Path

from lever_lm.config.load import file_layer, layers
from lever_lm.config.schema import Config


def resolve(
    names: dict[str, str | None], config_file: Path | None, sets: list[str], flags: dict
) -> tuple[Config, list[str]]:
    """Return the Config, and the environment variables in effect as NAME=value; flags: the values of all options."""
    made = layers(names, file_layer(config_file), sets, {"options": flags})
    return made.config(), made.in_effect
