"""Models and datasets of the hub on this machine: in the hub's own cache, which `hf download` fills too."""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

from lever_lm.utils.errors import LeverError
from lever_lm.utils.file_hashes import DIGESTS
from lever_lm.utils.paths import asset_path
from lever_lm.utils.safe_parse import read_json
from lever_lm.utils.terminal import one_line
from lever_lm.utils.transformers_compat import first_line

# What a model needs of its repository; the same weights in other formats stay there.
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
# The files of a policy: nothing else of its repository is fetched.
POLICY_FILES = ("config.json", "model.safetensors")
# The files of a model's processor: of each entry, all of one tuple. Without them the library goes on in silence: with
# an empty vocabulary, or with another size of images.
_PROCESSOR_FILES = (
    (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("spiece.model",)),
    (("preprocessor_config.json",), ("processor_config.json",)),
)
_NAMED = 20  # shards of an index that are missing, named at most
# What makes a snapshot complete here. It may lack other files of its repository, and the hub's client refuses it then.
_NEEDED = {"model": _MODEL_FILES, "dataset": ("*.parquet",)}
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Owner of data sets → who had them before, under the same names: a copy that was fetched then is as good.
_MOVED = {"lmms-lab-encoder": "lmms-lab"}


def is_hub_id(path: str) -> bool:
    """Return whether a path as the user wrote it can be OWNER/NAME on the hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not asset_path(path).exists()


def cached_snapshot(repository: str, kind: str, needed: Sequence[str] | None = None) -> Path | None:
    """Return the folder of a repository (`model` or `dataset`) in the hub's cache, None where there is none, without
    network. needed: patterns of the files that have to be there, those of the kind if None."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    options = {"local_files_only": True, "allow_patterns": list(needed or _NEEDED[kind])}
    try:
        return Path(huggingface_hub.snapshot_download(repository, repo_type=kind, **options))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None


def addresses(repository: str) -> list[str]:
    """Return the address of a data set, and the one that it had before it was moved."""
    owner, _, name = repository.partition("/")
    return [repository, *(f"{before}/{name}" for now, before in _MOVED.items() if now == owner)]


def cached_dataset(repository: str, needed: Sequence[str] | None = None) -> Path | None:
    """Return the folder of a data set in the hub's cache, as `cached_snapshot` does, by any of its addresses."""
    found = (cached_snapshot(address, "dataset", needed) for address in addresses(repository))
    return next((folder for folder in found if folder is not None), None)


def download_command(repository: str, within: str = "") -> str:
    """Return the command that fetches a data set into the hub's cache, or of it a folder. Of a file the whole is
    fetched, as what it names lies beside it."""
    part = f" --include '{within}/*'" if within and not Path(within).suffix else ""
    return f"hf download --repo-type dataset {repository}{part}"


def fetch_dataset(repository: str, within: str, mend: str) -> None:
    """Fetch a folder or a file of a data set into the hub's cache. Raises LeverError with the command that does, and
    `mend`."""
    import huggingface_hub

    try:
        patterns = [within if Path(within).suffix else f"{within}/*"]
        huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=patterns)
    except Exception as error:  # no network, offline mode, no such repository, no space
        raise LeverError(
            f"{within} of {repository} is not in the hub's cache, and not to be had from the hub: "
            f"{first_line(error).rstrip('.')}; {download_command(repository, within)}, {mend}"
        ) from error


def model_folder(path: str) -> Path | None:
    """Return the folder of a model: a directory, a shipped asset, or a hub id in the cache; None if there is none."""
    folder = asset_path(path)
    if folder.is_dir():
        return folder
    return cached_snapshot(path, "model") if is_hub_id(path) else None


def state_of(folder: Path) -> tuple:
    """Return what changes where a file of a folder does: their names, sizes and times. What was made of them before
    holds as long as it is the same."""
    found = {}
    for entry in os.scandir(folder):
        with suppress(OSError):  # a link to nowhere
            stat = entry.stat()
            found[entry.name] = stat.st_size, stat.st_mtime_ns
    return tuple(sorted(found.items()))


def missing_files(folder: Path) -> list[str]:
    """Return what a model's folder lacks: its config, or weights that its index names. [] if it can be loaded."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    index = folder / "model.safetensors.index.json"
    try:
        shards = set(read_json(index)["weight_map"].values()) if index.is_file() else set()
        absent = sorted(shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [*missing, f"a readable {index.name}"]
    if not shards and not weight_files(folder):
        absent = ["model.safetensors"]
    more = [f"{len(absent) - _NAMED} more"] if len(absent) > _NAMED else []
    return missing + [one_line(shard) for shard in absent[:_NAMED]] + more


def lacking(folder: Path) -> list[str]:
    """Return the files that a model's folder lacks: config, weights, tokenizer, image processor."""
    return missing_files(folder) + [
        choices[0][0]  # the usual name
        for choices in _PROCESSOR_FILES
        if not any(all((folder / name).is_file() for name in names) for names in choices)
    ]


def parameter_count(folder: Path) -> float:
    """Return the number of a model's weights: from the headers of its safetensors files. A file whose header cannot be
    read counts as bfloat16, two bytes each."""
    return sum(map(_parameters, weight_files(folder)))


def _parameters(path: Path) -> float:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return path.stat().st_size / 2


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model, in the format that is loaded: safetensors where there are any."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def fetch_model(path: str, option: str) -> Path:
    """Return the folder of a model, downloaded where the hub's cache has none or only a part of it.

    Raises LeverError naming `option` when it is neither here nor to be had.
    """
    folder = model_folder(path)
    missing = lacking(folder) if folder else []
    if folder and not missing:
        return folder
    if not is_hub_id(path):
        found = f"lacks {', '.join(missing)}: fetch these files again, or" if folder else "is no directory:"
        raise LeverError(f"the model {path} {found} name a directory of a model or a hub id OWNER/NAME ({option})")
    found = f"the model {path} is not in the hub's cache, and not to be had from the hub"
    mend = f"Fetch it where there is a network (hf download {path}), or name a directory of it ({option})"
    return _download(path, _MODEL_FILES, lacking, found, mend)


def fetch_policy(repository: str) -> Path:
    """Return the folder of a policy that is named by a hub id, its two files downloaded where the hub's cache lacks
    them. Raises LeverError where they are not to be had."""

    def lacks(folder: Path) -> list[str]:
        return [name for name in POLICY_FILES if not (folder / name).is_file()]

    folder = cached_snapshot(repository, "model", POLICY_FILES)
    if folder is not None and not lacks(folder):
        return folder
    found = f"no file or folder {repository} is here, nor a policy of that id in the hub's cache or on the hub"
    fetch = f"hf download {repository} {' '.join(POLICY_FILES)}"
    mend = f"Check the path, or fetch it where there is a network ({fetch})"
    return _download(repository, POLICY_FILES, lacks, found, mend)


def _download(repository: str, files: Sequence[str], lacks: Callable[[Path], list[str]], found: str, mend: str) -> Path:
    """Return the folder of a repository with these files, from the hub. Raises LeverError where it lacks some."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files)))
        if missing := lacks(folder):  # offline, the client gives back what there is
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
        return folder
    except Exception as error:  # no network, offline mode, no such repository, no space
        raise LeverError(f"{found}: {first_line(error).rstrip('.')}. {mend}") from error


def weights_digest(folder: Path) -> str:
    """Return 16 hex digits of a model's weights."""
    digests = content_digests(weight_files(folder))
    return digests[0] if len(digests) == 1 else "+".join(digests) or "none"


def content_digests(files: Sequence[Path]) -> list[str]:
    """Return 16 hex digits of each file. The hub's cache names one by its SHA-256, which saves reading it."""
    blobs = {file: file.resolve().name for file in files}
    unnamed = [file for file, blob in blobs.items() if not _SHA256.fullmatch(blob)]
    read = dict(zip(unnamed, DIGESTS.of(unnamed), strict=True))
    return [read.get(file, blob[:16]) for file, blob in blobs.items()]
