"""The checks of a command: each stage that it needs says what it lacks, before any model is loaded."""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence

from lever_lm.config.schema import Config
from lever_lm.data import Example, VqaData
from lever_lm.data.checks import check_examples, check_files
from lever_lm.data.embeddings import DEFAULT_WIDTH, cached_features
from lever_lm.data.encoder import check_encoder
from lever_lm.data.okvqa import OFFICIAL_SIZES
from lever_lm.data.pools import NEEDS_NO_FEATURES, Candidates
from lever_lm.lvlm.checks import check_answer_lengths, check_device, check_lvlm
from lever_lm.lvlm.families import keeps_features
from lever_lm.selectors.pool_recall import pool_recalls, recall_in_words
from lever_lm.tasks import load_data, pose_of, task_of
from lever_lm.training.run_dir import Layout
from lever_lm.utils.checks import GIB, Check, check_results, nearest_existing
from lever_lm.utils.errors import LeverError
from lever_lm.utils.paths import ASSET_PREFIX
from lever_lm.utils.progress import unsaid

ALL = ("data", "encoder", "lvlm")  # the stages; training on rollouts and features of the user's own needs none of them
_IMAGE_FEATURES = 391 * 2048 * 2  # bytes of an image of 640 × 480 in the 3B model
_DOWNLOAD = {  # GiB
    "Qwen/Qwen2.5-VL-3B-Instruct": 7.0,
    "Qwen/Qwen2.5-VL-7B-Instruct": 15.5,
    "openai/clip-vit-large-patch14": 1.6,
    "lmms-lab-encoder/OK-VQA": 0.8,
    "Multimodal-Fatima/OK-VQA_train": 1.5,
    "derek-thomas/ScienceQA": 0.6,
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
    """Check everything that the stages in `needs` (of ALL) lack on this machine.

    `count` also reads the data files and counts what is in them. wait: seconds to give a server that is still starting;
    `say` is told when it is waited for.
    """
    scored = bool(config.rollout.gt_prob or config.rollout.infoscore)
    files = list(check_files(config.data)) if "data" in needs else []
    checks = [*files]
    if "encoder" in needs:
        checks.append(check_encoder(config.features.encoder))
    if "lvlm" in needs:
        checks += check_lvlm(config.lvlm, config.prompt, scored=scored, wait=wait, say=say)
    if count:
        checks += _models_of_digits(config)
        if files and all(check.status == "ok" for check in files):
            splits: dict[str, list[Example]] = {}
            checks += check_examples(config.data, splits, pose_of(config.data))
            written = (e.answers if not e.shown else (e.shown,) for examples in splits.values() for e in examples)
            answers = [answer for texts in written for answer in texts]
            checks += check_answer_lengths(config.lvlm, config.prompt, answers)
            if all(splits.get(split) for split in ("train", "val")):
                checks += _check_pools(config, layout, splits)
    checks += check_device(config.device, config.lvlm if "lvlm" in needs and not config.lvlm.server else None)
    return [*checks, check_results(layout.dataset), _disk(config, layout, checks)]


def _check_pools(config: Config, layout: Layout, splits: dict[str, Sequence[Example]]) -> Iterator[Check]:
    """Tell the recall of the pools: from the data alone where they are drawn at random, else from the features in the
    cache. No image is read for it, so that pools go by the ids of images."""
    train, val, embeddings = splits["train"], splits["val"], None
    if config.sampler.name not in NEEDS_NO_FEATURES or not config.infer.pool_size:
        features = None
        if layout.features.is_file():
            with contextlib.suppress(LeverError):  # told by the other checks
                data = load_data(config.data)
                features = cached_features(data, config.features, layout.features)
        if features is None:
            found = f"drawn by features that are not in {layout.features} yet"
            yield Check("pools", "ok", f"{found}; `lever infer` tells how many hold a right answer")
            return
        train, val, embeddings = data.train_examples, data.val_examples, (features.val, features.train)
    task = task_of(VqaData(config.data.name, train, val, "", task=config.data.task, settings=config.data))
    candidates = Candidates(train, by_content=False)
    recalls = pool_recalls(config, val, train, task, embeddings, candidates)
    if recalls:
        yield Check("pools", "ok", recall_in_words(config, recalls))


def _models_of_digits(config: Config) -> Iterator[Check]:
    """Warn of each shipped model that is to look at other data: these models know the digits alone."""
    if config.data.okvqa_path.startswith(ASSET_PREFIX) and not config.data.file:
        return
    for key, path, other in (
        ("features.encoder", config.features.encoder, "--set features.encoder=openai/clip-vit-large-patch14"),
        ("lvlm.path", config.lvlm.path, "--lvlm qwen2.5_vl_3B"),
    ):
        if path.startswith(ASSET_PREFIX) and not (key == "lvlm.path" and config.lvlm.server):
            yield Check(key, "warning", f"{path} knows the embedded digits alone", other)


def _disk(config: Config, layout: Layout, checks: Iterable[Check]) -> Check:
    """Check the room for features, answers, rollouts, checkpoints and what has to be downloaded."""
    needed = sum(disk_needed(config).values())
    named = " ".join(check.found for check in checks if check.fetched)
    downloads = sum(size for repository, size in _DOWNLOAD.items() if repository in named)
    free = shutil.disk_usage(nearest_existing(layout.dataset)).free
    parts = f"about {needed / GIB:.2f} GiB needed" + (f" and {downloads:.1f} to download" if downloads else "")
    found = f"{free / GIB:.1f} GiB free, {parts}"
    if needed > free:
        return Check("disk", "missing", found, "free some, or --results DIR on another disk")
    if needed + downloads * GIB > free:
        return Check("disk", "warning", found, "free some, or HF_HOME on another disk")
    return Check("disk", "ok", found)


def disk_needed(config: Config) -> dict[str, int]:
    """Return the bytes of each kind of file that is written: an estimate from the config alone."""
    examples = sum(OFFICIAL_SIZES.get(config.data.name, (3000, 500)))
    prompts = config.rollout.num_queries * group_size(config)
    hidden = config.policy.hidden_dim
    weights = 4 * (3 * DEFAULT_WIDTH * hidden + config.policy.num_layers * 4 * hidden * hidden)
    epochs = config.rce.epochs + config.grpo.epochs
    elsewhere = config.lvlm.server or config.lvlm.path.startswith(ASSET_PREFIX)
    return {
        "vision": 0
        if elsewhere or not keeps_features(config.lvlm)
        else min(int(config.lvlm.bank_disk * GIB), _IMAGE_FEATURES * examples),
        "features": 2 * 4 * DEFAULT_WIDTH * examples,
        "answers": 300 * prompts,
        "rollouts": 900 * prompts,
        "checkpoints": weights * (epochs + 6),  # state.pt holds old and reference policy and two moments
    }


def group_size(config: Config) -> int:
    """Return the number of rollouts that are drawn for a query, duplicates included."""
    rollout = config.rollout
    sampled = rollout.sample * len(rollout.temperatures)
    return rollout.infoscore + rollout.beam + rollout.retrieval + sampled + rollout.random
