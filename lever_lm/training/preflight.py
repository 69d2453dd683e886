"""What a command will need, looked at before any model is loaded: one list, each line with what mends it."""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from lever_lm.config.schema import Config, DataConfig
from lever_lm.data import in_both, in_parquet, source_of
from lever_lm.data.embeddings import DEFAULT_WIDTH
from lever_lm.data.example import Example
from lever_lm.data.okvqa import OFFICIAL_SIZES, SPLITS, annotations_file, images_folder, questions_file
from lever_lm.data.okvqa import load_split as load_official
from lever_lm.data.parquet import load_split as load_parquet
from lever_lm.data.split_files import files_of
from lever_lm.training.preflight_models import GIB, Check, answer_lengths, lvlm, memory_needed, model, server
from lever_lm.training.run_dir import Layout
from lever_lm.utils.device import resolve_device
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import cached_snapshot, model_folder
from lever_lm.utils.paths import ASSET_PREFIX, HUB_PREFIX, asset_path
from lever_lm.utils.progress import unsaid

_IMAGE_FEATURES = 391 * 2048 * 2  # bytes of an image of 640 × 480 in the 3B model
ALL = ("data", "encoder", "lvlm")  # what commands need; some need less: train on rollouts and features of one's own
_DOWNLOAD = {  # GiB
    "Qwen/Qwen2.5-VL-3B-Instruct": 7.0,
    "Qwen/Qwen2.5-VL-7B-Instruct": 15.5,
    "openai/clip-vit-large-patch14": 1.6,
    "lmms-lab/OK-VQA": 0.8,
    "Multimodal-Fatima/OK-VQA_train": 1.5,
}


def examine(
    config: Config,
    layout: Layout,
    needs: Sequence[str] = ALL,
    *,
    count: bool = False,
    wait: float = 0.0,
    say: Callable[[str], None] = unsaid,
) -> list[Check]:
    """Everything a config needs on this machine, as far as `needs` goes (of ALL).

    `count` also reads the data files and counts what is in them. wait: seconds to give a server that is still starting;
    `say` is told when it is waited for.
    """
    checks = [*packages()] if count else []
    if "data" in needs:
        files = list(data_files(config.data))
        checks += files
    if "encoder" in needs:
        checks.append(model("features.encoder", config.features.encoder))
    if "lvlm" in needs:
        checks += server(config, wait, say) if config.lvlm.server else [lvlm(config.lvlm.path)]
    if count:
        checks += out_of_place(config)
        if "data" in needs and all(check.status == "ok" for check in files):
            answers: list[str] = []
            checks += counts(config.data, answers)
            checks += answer_lengths(config.lvlm, answers)
    checks += device(config, with_lvlm="lvlm" in needs and not config.lvlm.server)
    return [*checks, folder(layout.dataset), disk(config, layout, checks)]


def require(checks: Iterable[Check]) -> None:
    """Raise LeverError with the whole list of what is missing and cannot be fetched by the command itself."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    missing = [check for check in checks if check.status == "missing" and (offline or not check.fetched)]
    lines = [f"{check.what}: {check.found} → {check.mend}" for check in missing]
    if len(lines) == 1:
        raise LeverError(lines[0])
    if lines:
        raise LeverError("\n  ".join([f"{len(lines)} things are missing:", *lines]))


# ---------------------------------------------------------------------- data


def data_files(config: DataConfig) -> Iterable[Check]:
    """The files and folders of both splits."""
    for split in SPLITS:
        source = source_of(config, split)
        variable = "VQAV2_PATH" if config.file_prefix == "v2_" else "OKVQA_PATH"
        if in_parquet(config, split):
            try:
                if source.startswith(HUB_PREFIX):
                    yield _hub_dataset(source.removeprefix(HUB_PREFIX), split)
                else:
                    files = files_of(asset_path(source), split)
                    yield Check(f"{split} data", "ok", f"{len(files)} parquet files in {source}")
            except LeverError as error:  # a file that is named after both splits
                found, _, mend = str(error).partition("; ")
                yield Check(f"{split} data", "missing", found, mend)
        else:
            root = asset_path(source)
            for official in (questions_file, annotations_file):
                path = official(root, split, config.file_prefix)
                mend = f"fetch it into {root}, or set {variable} (data.okvqa_path) to the folder that holds it"
                yield _file(f"{split} data", path, mend)
            try:
                yield Check(f"{split} images", "ok", str(images_folder(asset_path(config.coco_path), split)))
            except LeverError as error:
                found, _, mend = str(error).partition(": ")
                yield Check(f"{split} images", "missing", found, mend)


def out_of_place(config: Config) -> Iterable[Check]:
    """A warning for each shipped model that is to look at data of somebody's own: these know the digits alone."""
    if config.data.okvqa_path.startswith(ASSET_PREFIX):
        return
    for key, path, other in (
        ("features.encoder", config.features.encoder, "--set features.encoder=openai/clip-vit-large-patch14"),
        ("lvlm.path", config.lvlm.path, "--lvlm qwen2.5_vl_3B"),
    ):
        if path.startswith(ASSET_PREFIX) and not (key == "lvlm.path" and config.lvlm.server):
            yield Check(key, "warning", f"{path} knows the embedded digits alone", other)


def _file(what: str, path: Path, mend: str) -> Check:
    if not os.path.isfile(path):
        return Check(what, "missing", f"{path} is {'a folder' if os.path.isdir(path) else 'not there'}", mend)
    if not os.access(path, os.R_OK):
        return Check(what, "missing", f"{path} may not be read", f"chmod u+r {path}")
    return Check(what, "ok", str(path))


def _hub_dataset(repository: str, split: str) -> Check:
    snapshot = cached_snapshot(repository, "dataset")
    if snapshot and files_of(snapshot, split):
        return Check(f"{split} data", "ok", f"{repository} in the hub's cache")
    import datasets

    converted = Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___").lower()
    if any(converted.parent.glob(f"{converted.name}*")):
        return Check(f"{split} data", "ok", f"{repository} in the cache of `datasets`")
    fetch = f"hf download --repo-type dataset {repository}"
    mend = f"{fetch}, or a folder of its parquet files: --dataset okvqa_local with OKVQA_PATH"
    return Check(f"{split} data", "missing", f"{repository} is not in the hub's cache", mend, fetched=True)


def counts(config: DataConfig, answers: list[str]) -> Iterable[Check]:
    """How many examples each split has, and how many cannot be used. Images are looked up, not decoded. The reference
    answers of those that can be used are added to `answers`."""
    lenient, splits = replace(config, skip_bad_examples=True), {}
    for split, expected in zip(SPLITS, OFFICIAL_SIZES.get(config.name, (None, None)), strict=True):
        skipped: list[str] = []
        load = load_parquet if in_parquet(config, split) else load_official
        try:
            examples, _ = load(source_of(config, split), lenient, split, skipped)
        except LeverError as error:
            found, _, mend = str(error).partition("; ")
            yield Check(f"{split} examples", "missing", found, mend or "replace the file")
            continue
        splits[split] = examples
        answers += [answer for example in examples for answer in example.answers]
        found = f"{len(examples)} usable"
        if skipped:
            status = "warning" if config.skip_bad_examples and examples else "missing"
            mend = "left out, as asked" if status == "warning" else "mend the files, or --skip-bad-examples"
            yield Check(f"{split} examples", status, f"{found}, {len(skipped)} not, the first: {skipped[0]}", mend)
        elif expected not in (None, len(examples)):
            found += f"; the official split has {expected}"
            yield Check(f"{split} examples", "warning", found, "fine for a part of it, else fetch it again")
        else:
            yield Check(f"{split} examples", "ok", found)
    if len(splits) == len(SPLITS):
        yield from _in_both_splits(config, splits)


def _in_both_splits(config: DataConfig, splits: dict[str, list[Example]]) -> Iterable[Check]:
    try:
        problems = list(in_both(config, splits["train"], splits["val"]).values())
    except LeverError as error:
        yield Check("splits", "missing", str(error), "replace the file, or --skip-bad-examples")
        return
    if problems:
        skipped = config.skip_bad_examples
        mend = "left out, as asked" if skipped else "leave them in one split, or --skip-bad-examples"
        yield Check("splits", "warning" if skipped else "missing", problems[0], mend)


# ---------------------------------------------------------------------- machine


def device(config: Config, *, with_lvlm: bool) -> Iterable[Check]:
    """The device, and whether the LVLM fits into its memory."""
    import torch

    try:
        chosen = resolve_device(config.device)
    except LeverError as error:
        yield Check("device", "missing", str(error), "--device cpu, or a machine with a GPU")
        return
    found = model_folder(config.lvlm.path) if with_lvlm else None
    on_gpu = chosen.type == "cuda"
    parts = memory_needed(config.lvlm, found, on_gpu=on_gpu) if found else {}
    needed = sum(parts.values())
    if not on_gpu:
        yield Check("device", "ok", f"{chosen}, {os.cpu_count()} cores")
        if needed > GIB:
            found = f"no GPU for an LVLM of {parts['weights'] / GIB:.0f} GiB: days"
            yield Check("device", "warning", found, "use a GPU")
        return
    free, total = torch.cuda.mem_get_info(chosen)
    memory = f"{torch.cuda.get_device_name(chosen)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
    about = f"{memory}, about {needed / GIB:.1f} needed"
    if parts:
        listed = ", ".join(f"{what} {size / GIB:.1f}" for what, size in parts.items())
        about += f" at the least: {listed}" + ("" if config.lvlm.bank_memory else "; image features take of the rest")
    if needed > total:
        yield Check("GPU memory", "missing", about, "a larger GPU, or a smaller LVLM: --lvlm qwen2.5_vl_3B")
    elif needed > free:
        yield Check("GPU memory", "warning", about, "end other jobs on it (nvidia-smi), or CUDA_VISIBLE_DEVICES")
    else:
        yield Check("GPU memory", "ok", about)


_OWN_RESULTS = "--results DIR of your own (and --ckpt RUN_DIR for a run that is here)"


def folder(path: Path) -> Check:
    """Whether results can be written."""
    there = _existing(path)
    if not there.is_dir():
        return Check("results", "missing", f"{there} is not a folder", "--results DIR")
    if not os.access(there, os.W_OK | os.X_OK):
        return Check("results", "missing", f"{there} may not be written to", f"chmod u+w {there}, or {_OWN_RESULTS}")
    return Check("results", "ok", str(path))


def _existing(path: Path) -> Path:
    """The path, or the nearest above it that exists."""
    path = path.absolute()
    return path if os.path.exists(path) or path.parent == path else _existing(path.parent)


def disk(config: Config, layout: Layout, checks: Iterable[Check]) -> Check:
    """Room for features, answers, rollouts, checkpoints and whatever has to be downloaded."""
    needed = sum(disk_needed(config).values())
    named = " ".join(check.found for check in checks if check.fetched)
    downloads = sum(size for repository, size in _DOWNLOAD.items() if repository in named)
    free = shutil.disk_usage(_existing(layout.dataset)).free
    parts = f"about {needed / GIB:.2f} GiB needed" + (f" and {downloads:.1f} to download" if downloads else "")
    found = f"{free / GIB:.1f} GiB free, {parts}"
    if needed > free:
        return Check("disk", "missing", found, "free some, or --results DIR on another disk")
    if needed + downloads * GIB > free:
        return Check("disk", "warning", found, "free some, or HF_HOME on another disk")
    return Check("disk", "ok", found)


def disk_needed(config: Config) -> dict[str, int]:
    """Bytes by what is written: an estimate from the config alone."""
    width, examples = DEFAULT_WIDTH, sum(OFFICIAL_SIZES.get(config.data.name, (3000, 500)))
    rollout = config.rollout
    prompts = rollout.num_queries * group_size(config)
    hidden = config.policy.hidden_dim
    weights = 4 * (3 * width * hidden + config.policy.num_layers * 4 * hidden * hidden)
    epochs = config.rce.epochs + config.grpo.epochs
    elsewhere = config.lvlm.server or config.lvlm.path.startswith(ASSET_PREFIX)
    return {
        "vision": 0 if elsewhere else min(int(config.lvlm.bank_disk * GIB), _IMAGE_FEATURES * examples),
        "features": 2 * 4 * width * examples,
        "answers": 300 * prompts,
        "rollouts": 900 * prompts,
        "checkpoints": weights * (epochs + 6),  # state.pt holds old and reference policy and two moments
    }


def group_size(config: Config) -> int:
    """Rollouts of a query, duplicates left out of account."""
    rollout = config.rollout
    sampled = rollout.sample * len(rollout.temperatures)
    return rollout.infoscore + rollout.beam + rollout.retrieval + sampled + rollout.random


def packages() -> Iterable[Check]:
    """The installed versions against those the package asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires("lever-lm") or []]
    except metadata.PackageNotFoundError:
        return  # run from a checkout that was never installed
    wrong = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement}, found {version}")
    if wrong:
        yield Check("packages", "missing", "; ".join(wrong), "pip install -c constraints.txt -e .")
    else:
        yield Check("packages", "ok", f"{len(wanted)} requirements met")
