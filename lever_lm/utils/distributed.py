"""The processes of one torchrun job: the rank of this one, its share of the work, and where they wait."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from lever_lm.utils.errors import LeverError

# The first is torchrun's own. The others are set in many a pod and job script whose processes do not wait for others.
_NEEDED = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(days=7)  # a rank that fails ends the others through torchrun, not through this
Made = TypeVar("Made")


@dataclass(frozen=True)
class Shards:
    """Rank `rank` of `world` processes, number `local` of `neighbours` on its host; the only one by default.

    All methods but `share` are calls of the whole job: every process makes them, in the same order. They raise
    LeverError when another process has ended.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    neighbours: int = 1

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Shards":
        """Return what torchrun has set; one process where any of its variables is missing: a leaked WORLD_SIZE is no
        job."""
        if not all(environ.get(name) for name in _NEEDED):
            return cls()
        try:
            rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
            job = cls(rank, world, int(environ.get("LOCAL_RANK") or rank), int(environ.get("LOCAL_WORLD_SIZE") or 1))
        except ValueError:
            return cls()
        return job if 0 <= rank < world else cls()

    @property
    def leader(self) -> bool:
        """True in the process that writes what all of them made."""
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """Return this process's part of the work, dealt in turns there and back: of a list with the longest first, all
        have about as much to do."""
        turns = {self.rank, 2 * self.world - 1 - self.rank}
        return [item for i, item in enumerate(items) if i % (2 * self.world) in turns]

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.world > 1:
            with self._together() as dist:
                dist.barrier()

    def from_leader(self, make: Callable[[], Made]) -> Made:
        """Return in every process what the leader makes; the others do not call `make`. It is pickled on its way."""
        if self.world == 1:
            return make()
        made = [make() if self.leader else None]
        with self._together() as dist:
            dist.broadcast_object_list(made)
        return made[0]

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """Let the leader go through the block alone; the others follow and find what it left on disk."""
        if not self.leader:
            self.wait()
        yield
        if self.leader:
            self.wait()

    @contextlib.contextmanager
    def _together(self) -> Iterator:
        """Yield torch.distributed, joined."""
        import torch.distributed as dist

        try:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=_PATIENCE)
            yield dist
        except RuntimeError as error:
            why = re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0].split("\n")[0]  # less the place in the library
            raise LeverError(
                f"rank {self.rank} of {self.world} has lost the others ({why}): the one that failed says why. "
                "Run the same command again to go on"
            ) from error

    def leave(self) -> None:
        """End this process's part in the job, if it ever joined. No other process is waited for."""
        if self.world > 1 and "torch" in sys.modules:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
