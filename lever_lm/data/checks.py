"""Checks of a dataset before it is used: its files, how many examples it has, and how many of them cannot be used."""

from collections.abc import Iterator
from functools import cache

from lever_lm.config.schema import DataConfig
from lever_lm.data import in_both, in_parquet, is_table, load_split, source_of
from lever_lm.data.example import Example
from lever_lm.data.okvqa import OFFICIAL_SIZES, SPLITS, annotations_file, images_folder, questions_file
from lever_lm.data.parquet_files import in_datasets_cache
from lever_lm.data.rows import BadExamples, Pose, as_it_is
from lever_lm.data.split_files import files_of
from lever_lm.data.table import load_tables
from lever_lm.data.table.files import find_files, hub_address
from lever_lm.utils.checks import Check, check_file
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import addresses, cached_dataset, download_command
from lever_lm.utils.paths import HUB_PREFIX, asset_path


def check_files(config: DataConfig) -> Iterator[Check]:
    """Check that the files and folders of both splits are there."""
    if is_table(config):
        yield from _tables(config)
        return
    for split in SPLITS:
        yield from _parquet_files(config, split) if in_parquet(config, split) else _official_files(config, split)


def _tables(config: DataConfig) -> Iterator[Check]:
    for split in SPLITS if config.image_table else ():
        images = config.image_table.replace("{split}", split)
        yield _table(f"{split} images", images, "data.image_table")
    named = {"train data": (config.file, "--data, data.file"), "val data": (config.val_file, "--val, data.val_file")}
    for what, (source, option) in named.items():
        if not source and what == "val data":
            yield Check(what, "ok", f"a part of {config.file}")
        elif not source:
            yield Check(what, "missing", f"{config.val_file} is an evaluation split alone", "--data FILE, data.file")
        else:
            yield _table(what, source, option)


def _table(what: str, source: str, option: str) -> Check:
    try:
        _, files = find_files(source, option)
        if files:
            return Check(what, "ok", f"{len(files)} files of {source}" if len(files) > 1 else source)
        return _in_cache(what, *hub_address(source), f"or another table: {option}")
    except LeverError as error:
        found, _, mend = str(error).partition("; ")
        return Check(what, "missing", found, mend)


def _parquet_files(config: DataConfig, split: str) -> Iterator[Check]:
    source = source_of(config, split)
    try:
        if source.startswith(HUB_PREFIX):
            yield _hub_dataset(source.removeprefix(HUB_PREFIX), split)
        else:
            files = files_of(asset_path(source), split)
            yield Check(f"{split} data", "ok", f"{len(files)} parquet files in {source}")
    except LeverError as error:  # a file that is named after both splits
        found, _, mend = str(error).partition("; ")
        yield Check(f"{split} data", "missing", found, mend)


def _hub_dataset(repository: str, split: str) -> Check:
    snapshot = cached_dataset(repository)
    if snapshot and files_of(snapshot, split):
        return Check(f"{split} data", "ok", f"{repository} in the hub's cache")
    mend = "or a folder of its parquet files: --dataset okvqa_local with OKVQA_PATH"
    return _in_cache(f"{split} data", repository, "", mend)


def _in_cache(what: str, repository: str, within: str, mend: str) -> Check:
    """Check that `datasets` has prepared a data set that is not in the hub's cache."""
    if not within and any(map(in_datasets_cache, addresses(repository))):
        return Check(what, "ok", f"{repository} in the cache of `datasets`")
    fetch = f"{download_command(repository, within)}, {mend}"
    found = f"{f'{repository}/{within}' if within else repository} is not in the hub's cache"
    return Check(what, "missing", found, fetch, fetched=True)


def _official_files(config: DataConfig, split: str) -> Iterator[Check]:
    root = asset_path(source_of(config, split))
    variable = "VQAV2_PATH" if config.file_prefix == "v2_" else "OKVQA_PATH"
    for official in (questions_file, annotations_file):
        mend = f"fetch it into {root}, or set {variable} (data.okvqa_path) to the folder that holds it"
        yield check_file(f"{split} data", official(root, split, config.file_prefix), mend)
    try:
        yield Check(f"{split} images", "ok", str(images_folder(asset_path(config.coco_path), split)))
    except LeverError as error:
        found, _, mend = str(error).partition(": ")
        yield Check(f"{split} images", "missing", found, mend)


def check_examples(config: DataConfig, splits: dict[str, list[Example]], pose: Pose = as_it_is) -> Iterator[Check]:
    """Count the examples of each split that can be used and those that cannot. Images are looked up, not decoded. Those
    that can be used are added to `splits`."""
    bads = {split: BadExamples(skip=True) for split in SPLITS}
    tables = cache(lambda: load_tables(config, bads, pose))  # both splits are read at once
    for split, expected in zip(SPLITS, OFFICIAL_SIZES.get(config.name, (None, None)), strict=True):
        bad = bads[split]
        try:
            examples, _ = tables()[split] if is_table(config) else load_split(config, split, bad, pose)
        except LeverError as error:
            found, _, mend = str(error).partition("; ")
            yield Check(f"{split} examples", "missing", found, mend or "replace the file")
            continue
        splits[split] = examples
        found = f"{len(examples)} usable"
        if bad.problems:
            status = "warning" if config.skip_bad_examples and examples else "missing"
            mend = "left out, as asked" if status == "warning" else "mend the files, or --skip-bad-examples"
            yield Check(
                f"{split} examples", status, f"{found}, {len(bad.problems)} not, the first: {bad.problems[0]}", mend
            )
        elif expected not in (None, len(examples)):
            found += f"; the official split has {expected}"
            yield Check(f"{split} examples", "warning", found, "fine for a part of it, else fetch it again")
        else:
            yield Check(f"{split} examples", "ok", found)
    if len(splits) == len(SPLITS):
        yield from _in_both_splits(config, splits)


def _in_both_splits(config: DataConfig, splits: dict[str, list[Example]]) -> Iterator[Check]:
    try:
        problems = list(in_both(config, splits["train"], splits["val"]).values())
    except LeverError as error:
        yield Check("splits", "missing", str(error), "replace the file, or --skip-bad-examples")
        return
    if problems:
        skipped = config.skip_bad_examples
        mend = "left out, as asked" if skipped else "leave them in one split, or --skip-bad-examples"
        yield Check("splits", "warning" if skipped else "missing", problems[0], mend)
