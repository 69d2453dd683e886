"""Fingerprints of what each stage's files depend on, by name: a part that has changed is named when a stage is made
again."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

# Raise a stage's number when the same inputs would give another result than before: what it made is made again.
CODE = {"features": 2, "vision": 2, "answers": 2, "rollouts": 3, "training": 2, "inference": 2}

_WHOLE = "fingerprint"  # of all parts, in the same mapping


def stamp(stage: str, **parts) -> dict[str, str]:
    """Return the fingerprint of each part, of the stage's code, and of all of them; _ in a name becomes a space."""
    named = {name.replace("_", " "): fingerprint(part) for name, part in parts.items()}
    named["code"] = str(CODE[stage])
    return {**named, _WHOLE: fingerprint(named)}


def changed(there: object, here: Mapping[str, str]) -> list[str]:
    """Return the parts whose fingerprint in a file (`there`) differs from `here`; [] where it names no parts."""
    if not isinstance(there, Mapping):
        return []
    names = [name for name in here if name != _WHOLE]
    return [name for name in names if name in there and there[name] != here[name]]


def changes(names: list[str]) -> str:
    """Return why a stage is made again: `the sampler and the prompt have changed`."""
    if not names:
        return "it was made by another version"
    listed = [f"the {name}" for name in names]
    text = " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]]))
    return f"{text} {'have' if len(names) > 1 else 'has'} changed"


def fingerprint(*parts) -> str:
    """Return 16 hex digits that change when any of the parts (configs, strings, numbers, lists of those) does."""
    plain = [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]
