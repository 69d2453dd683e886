"""The two JSON layouts of Lever-Plus's rollout file: which rows a trajectory shows.

In the present layout a query names its pool (`candidate_pool_ids`) and trajectories hold places in it; in the older one
trajectories hold rows and the pool is the sorted set of them. Each trajectory is read by its own layout:

- `pointer_global` marks the present layout, and must agree with the places;
- `pointer_pos`, a query's `_fix_failed`, and a query without a pool mark the older one;
- an unmarked pointer into a pool holds places where it can; else, where all of it are ids of the pool, rows.
"""

from collections import Counter

from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import shown


def pool_and_sequences(
    entry: dict, kept: list[tuple[int, dict]], counts: Counter, where: str
) -> tuple[list[int], list[list[int]]]:
    """Return the pool of a query, and its trajectories (number in the file, trajectory) as places in it. The ones in
    the older layout are added to `counts`. Raises LeverError naming `where` and the trajectory."""
    pool = None
    if entry.get("candidate_pool_ids") is not None or any(t.get("pointer_global") is not None for _, t in kept):
        pool = _integers(entry.get("candidate_pool_ids"), f"{where}, candidate_pool_ids")
        if len(set(pool)) != len(pool):
            raise LeverError(f"{where}: candidate_pool_ids repeats an id")
    named = [f"{where}, trajectory {i}" for i, _ in kept]
    by_row = pool is None or bool(entry.get("_fix_failed"))
    read = [_rows(t, pool, by_row, name) for (_, t), name in zip(kept, named, strict=True)]
    layouts = {layout for _, layout in read}
    if layouts == {"older"}:
        pool = sorted({row for rows, _ in read for row in rows})
    place = {row: i for i, row in enumerate(pool)}
    for (rows, layout), name in zip(read, named, strict=True):
        if not all(row in place for row in rows):
            raise LeverError(f"{name}: rows {shown(rows)} do not lie in candidate_pool_ids")
        if len(set(rows)) != len(rows):
            raise LeverError(f"{name}: its sequence names a candidate twice (rows {shown(rows)})")
        if layout == "either" and "ids" in layouts:
            raise LeverError(
                f"{name}: its pointer can be places in the pool and ids of it, and others of the query can only be "
                "ids: say which they are by pointer_global beside places, or by pointer_pos in place of pointer"
            )
    counts["older"] += sum(layout in ("older", "ids") for _, layout in read)
    return pool, [[place[row] for row in rows] for rows, _ in read]


def _rows(trajectory: dict, pool: list[int] | None, by_row: bool, where: str) -> tuple[list[int], str]:
    """Return the rows that a trajectory shows, and its layout: `places` in the pool, `older` by its marks, unmarked
    `ids` of the pool, or unmarked places that could be ids just as well (`either`)."""
    written = trajectory.get("pointer_global")
    rows = trajectory.get("pointer_pos")
    if written is None and (rows is not None or by_row):
        rows = _integers(trajectory.get("pointer") if rows is None else rows, f"{where}, pointer")
        if not rows:
            raise LeverError(f"{where}: its pointer is empty")
        return rows, "older"
    pointer = _integers(trajectory.get("pointer"), f"{where}, pointer")
    are_places, are_ids = bool(pointer) and max(pointer) < len(pool), set(pointer) <= set(pool)
    if written is None and pointer and are_ids and not are_places:
        return pointer, "ids"
    if not are_places:
        ids = "" if written is not None else ", and are not ids of it"
        raise LeverError(f"{where}: positions {shown(pointer)} do not lie in a pool of {len(pool)}{ids}")
    rows = [pool[place] for place in pointer]
    if written is not None and rows != _integers(written, f"{where}, pointer_global"):
        raise LeverError(f"{where}: pointer_global is {shown(written)}, but pointer names rows {shown(rows)}")
    return rows, "either" if written is None and are_ids and rows != pointer else "places"


def _integers(value, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 2**63 for v in value):
        raise LeverError(f"{where}: expected a list of non-negative integers, found {shown(value)}")
    return value
