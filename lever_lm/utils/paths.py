"""Paths with a prefix: `asset:NAME` is a folder that the package ships, `hub:REPO` a repository of the hub."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
ASSET_PREFIX, HUB_PREFIX = "asset:", "hub:"


def asset_path(path: str) -> Path:
    """Return a path as the user wrote it, or that of a shipped asset (`asset:NAME`). A hub id comes back as it is."""
    if path.startswith(ASSET_PREFIX):
        return PACKAGE / "assets" / path.removeprefix(ASSET_PREFIX)
    return Path(path).expanduser()
