"""What `lever export` adds for those who do an evaluation again: the picks of every query, the prompts of the first
queries as text, and the config. Picks and prompts are those of the evaluation that the model card shows."""

import json
from collections.abc import Callable
from itertools import islice

import numpy as np
import yaml

from lever_lm.config.schema import Config, keys_of, to_dict
from lever_lm.data import VqaData
from lever_lm.evaluation.results import Sample, read_samples, samples_file
from lever_lm.lvlm import build_prompt
from lever_lm.lvlm.processor import processor_of
from lever_lm.lvlm.prompt import in_prompt_order, to_messages
from lever_lm.selectors.pointer.hub_format import PICKS, PLACES, PROMPTS, RUN_CONFIG, setting_of
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import model_folder
from lever_lm.utils.terminal import shown

PROMPTED = 10  # queries
_ROUNDED = 1e-4  # of a mean of accuracies with six decimals
# A server, a device and a permission to fetch are the user's own.
_CONFIG_KEYS = [k for k in keys_of("answers", "place", "machine", "training", "length") if k[-1] != "allow_remote"]


def reproduction_kit(
    config: Config, known: bool, evaluated: dict | None, data: Callable[[], VqaData], fingerprint: object
) -> tuple[dict[str, str], dict[str, str]]:
    """Return file name → text, and the name of each file that is left out → why.

    config: of the run; known: dataset and encoder are its own, too. evaluated: what `read_metrics` says of the
    evaluation, its `folder` and `method`. data: loads the dataset, which must have this fingerprint.
    """
    texts, left_out = {RUN_CONFIG: config_text(config, known)}, {}
    if evaluated is None:
        return texts, left_out
    try:
        samples = _samples(evaluated)
        texts[PICKS] = picks_text(samples, config)
    except LeverError as error:
        return texts, dict.fromkeys((PICKS, PROMPTS), str(error))
    try:
        texts[PROMPTS] = prompts_text(samples, config, data, fingerprint)
    except LeverError as error:
        left_out[PROMPTS] = str(error)
    return texts, left_out


def _samples(evaluated: dict) -> list[Sample]:
    """Return the samples of the evaluated method at the most shots. Raises LeverError where they cannot be read, or are
    not those of its metrics.json."""
    rows = [row for row in evaluated["results"] if row["method"] == evaluated["method"]]
    last = max(rows, key=lambda row: row["shots"])
    path = samples_file(evaluated["folder"], last["method"], last["shots"])
    samples = list(read_samples(path).values())
    mean = float(np.mean([sample.accuracy for sample in samples])) if samples else -1.0
    if len(samples) != last["n"] or abs(mean - last["accuracy"]) > _ROUNDED:
        raise LeverError(f"{path} is not of the evaluation in metrics.json beside it: run `lever infer` again")
    return samples


def picks_text(samples: list[Sample], config: Config) -> str:
    """Return a JSON line for each query: `question_id`; `icds`, the ICDs' question_ids with the first pick first, as
    `lever infer --icds` takes them; and `in_prompt_order`, the same as they stand in the prompt."""
    rows = (
        {"question_id": one.question_id, "icds": one.icds, "in_prompt_order": in_prompt_order(one.icds, config.prompt)}
        for one in samples
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def prompts_text(samples: list[Sample], config: Config, data: Callable[[], VqaData], fingerprint: object) -> str:
    """Return the prompts of the first queries, by the chat template of the LVLM, one placeholder an image. Raises
    LeverError where the processor or the data are not on this machine."""
    path = config.lvlm.path
    folder = model_folder(path)
    if folder is None:
        raise LeverError(f"the processor of {path} is not on this machine: `hf download {path}`, then export again")
    processor, found = processor_of(config.lvlm, config.prompt, folder), data()
    if found.fingerprint != fingerprint:
        raise LeverError(
            f"the data here have the fingerprint {found.fingerprint}, those of the run {shown(fingerprint)}: name the "
            "folders of the run's data (--dataset)"
        )
    queries = {example.question_id: example for example in found.val_examples}
    train = {example.question_id: example for example in found.train_examples}
    parts = []
    for one in islice(samples, PROMPTED):
        if lacking := [
            i for i, there in ((one.question_id, queries), *((i, train) for i in one.icds)) if i not in there
        ]:
            raise LeverError(f"question {lacking[0]} is not among the data: run `lever infer` again")
        prompt = build_prompt([train[icd] for icd in one.icds], queries[one.question_id], config.prompt)
        text = processor.apply_chat_template(
            to_messages(prompt, config.prompt), tokenize=False, add_generation_prompt=True
        )
        icds = ", ".join(map(str, in_prompt_order(one.icds, config.prompt))) or "none"
        parts.append(f"=== question {one.question_id}; ICDs in the order of the prompt: {icds} ===\n{text}\n")
    return "\n".join(parts)


def config_text(config: Config, known: bool) -> str:
    """Return the config as YAML for `lever train --config`, without what belongs to a machine: folders, servers,
    devices. Of a policy of the user's own rollouts and features, also without dataset and encoder."""
    values = to_dict(config)
    kept = {
        name: part
        for name, part in setting_of(values, _CONFIG_KEYS).items()
        if known or name not in ("data", "features")
    }
    lacking = [".".join(key) for key in sorted(PLACES) if values[key[0]][key[1]] and key[1] not in kept.get(key[0], {})]
    left_out = f"# Left out, as they name folders of one machine: {', '.join(lacking)}.\n" if lacking and known else ""
    return f"# For `lever train --config FILE`.\n{left_out}{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}"
