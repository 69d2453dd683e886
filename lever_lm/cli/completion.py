"""What a shell offers where a value is to be typed: names of configs, keys, strategies, runs. Quick, never an error.

Shells evaluate what they are offered, so a name that is not plain (a folder's may be anybody's) is not among it.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from itertools import islice
from pathlib import Path

import typer

from lever_lm.config.schema import all_keys, key_docs
from lever_lm.config.values import configs_root
from lever_lm.training.metrics import STRATEGIES
from lever_lm.training.tensorboard import TRACKERS

_PLAIN = re.compile(r"[\w.,+=@/-]+")
_MOST = 1000  # runs that are looked at

Offer = tuple[str, str]  # a value and what it means
Found = Callable[[typer.Context, str], list[Offer]]


def _offered(find: Callable[[typer.Context], Iterable[Offer]]) -> Found:
    """The values that go on from what is typed; none where they cannot be found."""

    @wraps(find)
    def offers_for(ctx: typer.Context, incomplete: str) -> list[Offer]:
        try:
            return [
                (value, said) for value, said in find(ctx) if value.startswith(incomplete) and _PLAIN.fullmatch(value)
            ]
        except Exception:  # a person is typing: there is nowhere to say it
            return []

    del offers_for.__wrapped__  # typer reads the signature
    offers_for.__annotations__ = {"ctx": typer.Context, "incomplete": str}
    return offers_for


def named(kind: str) -> Found:
    """The names of the YAMLs of a kind: dataset, lvlm, sampler, recipe."""
    return _offered(lambda ctx: ((name, "") for name in _names(kind)))


def one_of(values: Iterable[str]) -> Found:
    """These values."""
    return _offered(lambda ctx: ((value, "") for value in values))


def _names(kind: str) -> list[str]:
    return sorted(file.stem for file in (configs_root() / kind).glob("*.yaml"))


@_offered
def features(ctx: typer.Context) -> Iterator[Offer]:
    """What queries and ICDs can be encoded by."""
    parts = ("img", "text", "img_text")
    return ((f"query_{query}_icd_{icd}", "") for query in parts for icd in parts)


@_offered
def set_keys(ctx: typer.Context) -> Iterator[Offer]:
    """Every key of the config, with the `=` that its value follows."""
    docs = key_docs()
    return ((f"{key}=", docs.get(key, "")) for key in all_keys())


@_offered
def run_folders(ctx: typer.Context) -> Iterator[Offer]:
    """The run folders below --results."""
    return ((str(path), "") for path in _runs(ctx))


@_offered
def run_names(ctx: typer.Context) -> Iterator[Offer]:
    """The names of the runs below --results."""
    return ((name, "") for name in sorted({path.name for path in _runs(ctx)}))


@_offered
def configs(ctx: typer.Context) -> Iterator[Offer]:
    """What `lever config` shows: recipes and run folders."""
    yield from ((name, "recipe") for name in _names("recipe"))
    yield from ((str(path), "run") for path in _runs(ctx))


def _runs(ctx: typer.Context) -> list[Path]:
    results = Path(ctx.params.get("results") or "results")
    return sorted(path.parent for path in islice(results.glob("*/model_cpk/*/config.yaml"), _MOST))


strategies, trackers = one_of(STRATEGIES), one_of(TRACKERS)
