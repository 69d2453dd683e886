"""Conversion of checkpoint files between the v3 and the v2 format."""

from pathlib import Path

from lever_lm.selectors.pointer.checkpoint import format_of, read_checkpoint, save_torch, to_v2, to_v3
from lever_lm.training.run_dir import v2_name
from lever_lm.utils.console import Screen
from lever_lm.utils.errors import LeverError


def convert(
    path: Path, screen: Screen, *, output: Path | None = None, to: str = "v2", allow_truncate: bool = False
) -> dict:
    """Convert a v3 checkpoint to `<stem>_v2format.ckpt`, or a v2 file to `<stem>_v3format.pt`, unless `output` says
    where to. Returns input, output, `to`, and the weights that v2, which has one layer, left out (`allow_truncate`).
    Raises LeverError for a checkpoint that the other format cannot hold."""
    content = read_checkpoint(path)
    if path.is_file() and format_of(content) == to:
        other = {"v2": "v3", "v3": "v2"}[to]
        raise LeverError(f"{path} is a {to} checkpoint already: nothing to convert (--to {other} is the other way)")
    # What is made of a folder or a hub id goes into the current folder.
    beside = path if path.is_file() else Path(f"{path.resolve().name}.pt")
    if to == "v3":
        converted, dropped = to_v3(content, path), []
        output = output or beside.with_name(f"{beside.stem.removesuffix('_v2format')}_v3format.pt")
    else:
        converted, dropped = to_v2(content, path, allow_truncate=allow_truncate)
        output = output or v2_name(beside)
    if output.resolve() == path.resolve():
        raise LeverError(f"{output} is the file to convert: choose another --output")
    save_torch(output, converted)
    screen.result(f"converted {path} → {output}")
    if dropped:
        screen.say(f"warning: v2 has one layer; left out {', '.join(dropped)}: its choices will differ")
    return {"input": str(path), "output": str(output), "to": to, "dropped": dropped}
