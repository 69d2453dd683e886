"""The processes of one torchrun job: which of them this is, and where they wait for one another."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

_PATIENCE = timedelta(days=7)  # a rank that fails ends the others through torchrun, not through this


@dataclass(frozen=True)
class Shards:
    """Rank `rank` of `world` processes; alone by default."""

    rank: int = 0
    world: int = 1

    @property
    def leader(self) -> bool:
        """Whether this is the process that writes what all of them made."""
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """This process's part of the work, dealt like cards: neighbours in a sorted list go to different ranks."""
        return items[self.rank :: self.world]

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.world > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=_PATIENCE)
            dist.barrier()

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader goes through the block alone; the others follow and find what it left on disk."""
        if not self.leader:
            self.wait()
        yield
        if self.leader:
            self.wait()


def shards(environ=os.environ) -> Shards:
    """Those that torchrun has set in the environment."""
    return Shards(int(environ.get("RANK") or 0), int(environ.get("WORLD_SIZE") or 1))
