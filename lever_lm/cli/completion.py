"""Completion of values in a shell: names of configs, keys, strategies, runs. It is quick and never an error.

Shells evaluate what they are offered, so a name that is not plain is left out: a folder may have any name.
"""

import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import typer

from lever_lm.config.schema import all_keys, key_docs
from lever_lm.config.values import configs_root
from lever_lm.training.metrics import STRATEGIES
from lever_lm.training.own_results import TABLES
from lever_lm.training.tensorboard import TRACKERS

_PLAIN = re.compile(r"[\w.,+=@/-]+")
_MOST = 1000  # runs that are looked at

Offers = Iterable[tuple[str, str]]  # values, and what each means
Complete = Callable[[typer.Context, str], list[tuple[str, str]]]


def _offered(find: Callable[[typer.Context], Offers]) -> Complete:
    """Offer the values that begin with what is typed; none where they cannot be found."""

    def offers_for(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
        try:
            return [offer for offer in find(ctx) if offer[0].startswith(incomplete) and _PLAIN.fullmatch(offer[0])]
        except Exception:  # a person is typing: there is nowhere to say it
            return []

    return offers_for


def yaml_names(kind: str) -> list[str]:
    """The names of the YAMLs of a kind: dataset, lvlm, sampler, recipe."""
    return sorted(file.stem for file in (configs_root() / kind).glob("*.yaml"))


def _bare(values: Iterable) -> Offers:
    return ((str(value), "") for value in values)


def _runs(ctx: typer.Context) -> list[Path]:
    """The run folders below --results."""
    results = Path(ctx.params.get("results") or "results")
    return sorted(path.parent for path in islice(results.glob("*/model_cpk/*/config.yaml"), _MOST))


def named(kind: str) -> Complete:
    """Offer the YAMLs of a kind."""
    return _offered(lambda ctx: _bare(yaml_names(kind)))


def tables(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Offer the tables and the folders below the folder that is typed."""
    typed = incomplete[: incomplete.rfind("/") + 1]
    there = [entry for entry in islice(Path(typed or ".").glob("*"), _MOST) if not entry.name.startswith(".")]
    found = (f"{typed}{one.name}{'/' * one.is_dir()}" for one in there if one.is_dir() or one.suffix in TABLES)
    return _offered(lambda ctx: _bare(sorted(found)))(ctx, incomplete)


_PARTS = ("img", "text", "img_text")
features = _offered(
    lambda ctx: _bare(f"query_{q}_icd_{icd}{a}" for q in _PARTS for icd in _PARTS for a in ("", "_ans"))
)
set_keys = _offered(lambda ctx: ((f"{key}=", key_docs().get(key, "")) for key in all_keys()))
run_folders = _offered(lambda ctx: _bare(_runs(ctx)))
run_names = _offered(lambda ctx: _bare(sorted({path.name for path in _runs(ctx)})))
configs = _offered(lambda ctx: [*((n, "recipe") for n in yaml_names("recipe")), *((str(p), "run") for p in _runs(ctx))])
strategies = _offered(lambda ctx: _bare(STRATEGIES))
trackers = _offered(lambda ctx: _bare(TRACKERS))
