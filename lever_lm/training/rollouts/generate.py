"""Rollouts: sequences proposed for each query, shown to the LVLM, scored by its answer, written as a rollout file; and
the rewards of sequences that a policy proposes while it learns.

n queries, K pool, G rollouts per query, S shots. What is proposed: propose.py, infoscore.py.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lever_lm.config.schema import Config, RolloutConfig
from lever_lm.data import Example, VqaData
from lever_lm.data.embeddings import Features
from lever_lm.lvlm import CachedLvlm, Prompt, build_prompt, cut_answer
from lever_lm.tasks import Task, task_of
from lever_lm.training.rollouts.file_format import (
    group_report,
    is_query,
    made_of,
    query_entry,
    read_rollouts,
    trajectory_entry,
    why_made_again,
    write_rollouts,
)
from lever_lm.training.rollouts.infoscore import add_infoscore
from lever_lm.training.rollouts.propose import Proposals, evenly, propose_groups
from lever_lm.training.rollouts.scores import score_entry, trajectory_reward
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import stamp
from lever_lm.utils.terminal import shown


def rollout_stamp(config: Config, data: VqaData, features: str, lvlm: CachedLvlm) -> dict[str, str]:
    """Return the fingerprints of everything that a rollout file depends on; features: that of the features."""
    # They come from the untrained policy, which gives the columns of candidate_features no weight.
    policy = {name: value for name, value in vars(config.policy).items() if name != "candidate_features"}
    return stamp(
        "rollouts",
        training_data=[data.stamp("train"), *data.scoring] if data.scoring else data.stamp("train"),
        features=[features, config.features.name],
        sampler=config.sampler,
        LVLM=lvlm.model,
        prompt=config.prompt,
        rollout_setting=_setting(config.rollout),
        policy=policy,
        seed=config.seed,
    )


def _setting(rollout: RolloutConfig) -> dict:
    """Return the options of the rollouts, without a probe as files of before there was one have them."""
    return {name: value for name, value in vars(rollout).items() if value or name != "probe"}


def check_rows(path: Path, train: Sequence[Example], *, named: bool = True) -> None:
    """Raise LeverError where a rollout file's query ids are not the rows of this training split, and, unless the user
    `named` the dataset, where a query does not say its question."""
    for key, entry in read_rollouts(path).items():
        if not is_query(key):
            continue
        if int(key) >= len(train):
            raise LeverError(
                f"{path}, query {key}: the training split has {len(train)} rows: name the dataset that it was made of "
                "(--dataset)"
            )
        query = entry.get("query") if isinstance(entry, dict) else None
        there = query.get("question_id") if isinstance(query, dict) else None
        here = train[int(key)].question_id
        if there is None and not named:
            raise LeverError(
                f"{path}, query {key} has no query.question_id to tell of which dataset it is, so its features are "
                "missing: --embeddings FILE, or --dataset NAME where the query ids are that dataset's training rows"
            )
        if there is not None and str(there) != str(here):
            raise LeverError(
                f"{path}, query {key}: question {shown(there)} there, question {here} in row {key} of the training "
                "split: they are of another dataset or order. Pass their features: --embeddings, or put them where "
                "Lever-Plus does, results/<dataset>/cache/query_embeddings.pt"
            )


def make_rollouts(
    config: Config, data: VqaData, features: Features, lvlm: CachedLvlm, path: Path, say: Callable[[str], None]
) -> dict:
    """Make the rollout file at `path` where it is missing or its inputs have changed. Returns its group report. Of the
    processes of a job, all propose and score, and the leader alone reads and writes the file.

    Raises LeverError rather than replace a file that `lever rollout` did not make.
    """
    here, shards = rollout_stamp(config, data, features.fingerprint, lvlm), lvlm.shards
    if shards.from_leader(lambda: _is_up_to_date(path, here, say)):
        return shards.from_leader(lambda: group_report(path))
    before = lvlm.prompts
    proposals, train, task = propose_groups(config, data, features, lvlm.track), data.train_examples, task_of(data)
    if config.rollout.infoscore:
        add_infoscore(proposals, config, train, lvlm)
    answers = _answer_groups(proposals, config, train, task, lvlm, say)
    entries = {}
    by_query = (proposals.rows, proposals.queries, proposals.pools, proposals.groups, answers)
    for row, query, pool, group, answered in zip(*by_query, strict=True):
        scored = [trajectory_entry(group[place], pool, *answered[place]) for place in sorted(answered)]
        entries[row] = query_entry(row, query, task, pool, scored)
    if shards.leader:
        write_rollouts(path, {**here, "n_train": len(train), "lvlm_calls": lvlm.prompts - before}, entries)
    return shards.from_leader(lambda: group_report(path))


def _is_up_to_date(path: Path, here: dict[str, str], say: Callable[[str], None]) -> bool:
    """Return whether the file is there, made from what `here` says; say why where it is made again."""
    made = made_of(path)
    if made is None:
        return False
    if not made:
        raise LeverError(
            f"{path} was not made by `lever rollout` and is not replaced: move it, or train on it with --rl-data"
        )
    if why := why_made_again(made, here):
        say(f"{path} is made again: {why}; answers already known are not asked again")
    return not why


def online_rewards(
    config: Config, data: VqaData, rows: Tensor, pools: Tensor, lvlm: CachedLvlm
) -> Callable[[Tensor], Tensor]:
    """Return the function that answers the rollouts of a policy while it learns: sequences (n, G, S) of pool positions,
    −1 where one is shorter, for the queries `rows` (n,) with `pools` (n, K) of training rows → rewards (n, G), by
    reward.mode."""
    train, task = data.train_examples, task_of(data)

    def rewards(sequences: Tensor) -> Tensor:
        prompts = [
            build_prompt([train[pool[place]] for place in sequence if place >= 0], train[row], config.prompt)
            for row, pool, group in zip(rows.tolist(), pools.tolist(), sequences.tolist(), strict=True)
            for sequence in group
        ]
        asked = _ask(prompts, config, task, lvlm, "online rollouts", "gtprob" in config.reward.mode)
        values = [trajectory_reward(scores, config.reward, "an online rollout") for _, _, scores in asked]
        return torch.tensor(values).view(sequences.shape[:2])

    return rewards


# ---------------------------------------------------------------------- scoring


def _answer_groups(
    proposals: Proposals,
    config: Config,
    train: Sequence[Example],
    task: Task,
    lvlm: CachedLvlm,
    say: Callable[[str], None],
) -> list[dict[int, tuple[str, str, dict]]]:
    """Return for each group the answered rollouts, by place in the group, as `_ask` yields them: with rollout.probe so
    many, evenly apart, and the others only where the accuracies of these differ."""
    probe, groups = config.rollout.probe, proposals.groups
    answers: list[dict[int, tuple[str, str, dict]]] = [{} for _ in groups]

    def ask(places: list[list[int]], what: str) -> None:
        asked = _ask(proposals.prompts(config, train, places), config, task, lvlm, what, config.rollout.gt_prob)
        for answered, chosen in zip(answers, places, strict=True):
            answered |= {place: next(asked) for place in chosen}

    if probe:
        ask([evenly(len(group), probe) for group in groups], "probes")
    goes_on = [not answered or not tied(scores for _, _, scores in answered.values()) for answered in answers]
    if probe and lvlm.shards.leader:
        say(
            f"probes: {goes_on.count(False)} of {len(groups)} groups tied in {probe}, not asked further (rollout.probe)"
        )
    ask(
        [
            [place for place in range(len(group)) if more and place not in answered]
            for group, answered, more in zip(groups, answers, goes_on, strict=True)
        ],
        "rollouts",
    )
    return answers


def tied(scored: Iterable[dict]) -> bool:
    """Return whether these scores have one accuracy."""
    return len({scores["vqa_acc_score"] for scores in scored}) == 1


def _ask(
    prompts: list[Prompt], config: Config, task: Task, lvlm: CachedLvlm, what: str, with_probs: bool
) -> Iterator[tuple[str, str, dict]]:
    """Yield for each prompt what the LVLM wrote, the answer that is cut out of it, and its scores (`score_entry`)."""
    texts = lvlm.generate(prompts, what)
    probs = _reference_probs(prompts, task, lvlm, config.rollout.gt_prob_end) if with_probs else [None] * len(prompts)
    for prompt, text, prob in zip(prompts, texts, probs, strict=True):
        answer = cut_answer(text, config.prompt.cut)
        yield text, answer, score_entry(answer, prob, prompt.query, task)


def _reference_probs(prompts: list[Prompt], task: Task, lvlm: CachedLvlm, end: bool) -> list[float]:
    """Return Σ over a query's distinct reference answers of weight · P(answer | prompt), for each prompt.

    With `end`, P is that of the answer and the end of the turn after it: these exclude one another, so that the sum is
    at most 1. Without, it is that of any text that begins so, and `1` and `10` share probability.
    """
    pairs = [
        (i, answer, weight)
        for i, prompt in enumerate(prompts)
        for answer, weight in task.references(prompt.query).items()
    ]
    asked = [prompts[i] for i, _, _ in pairs], [answer for _, answer, _ in pairs]
    log_probs = lvlm.answer_log_prob(*asked, "gt_prob", end=end)
    totals = [0.0] * len(prompts)
    for (i, _, weight), log_prob in zip(pairs, log_probs, strict=True):
        totals[i] += weight * math.exp(log_prob)
    return totals
