"""The layers of a command line, whose data may be a table of the user's own: `--data FILE`, or data.file in a --config.

Such data have no YAML in configs/dataset/. What one would say is found here: the name below results/, how an answer is
scored, and for the shipped models the settings of small data.
"""

from lever_lm.cli.options import Common, named_yamls
from lever_lm.config.load import Layer, Layers, combined, layers
from lever_lm.config.schema import Config, DataConfig, to_dict
from lever_lm.config.values import named_yaml
from lever_lm.training.own_results import folder_name, identity
from lever_lm.utils.errors import UsageError
from lever_lm.utils.paths import ASSET_PREFIX

DEFAULT_TASK = "short_answer"  # a table has one answer a row, for which the rule of `vqa` gives nothing
# Sections of configs/dataset/digits.yaml that suit the shipped models and as little data as a laptop takes.
_SMALL = ("features", "sampler", "policy", "rce", "grpo")
# How an example is asked and scored: what a run on a table is used with on another one.
_ASKED = ("task", "question", "options", "show", "number_words", "scale")
_SOURCE = "--data"


def fresh_layers(common: Common, file: Layer | None, options: dict[str, dict], **names: str | None) -> Layers:
    """Return the layers of a command line that goes by no run's config. file: that of --config; names: kind → name of
    a YAML, over those of the options. Raises UsageError for options that contradict one another."""
    check_options(common)
    sets = common.set_ or []
    bare = combined(layers({}, file, sets, options).found)
    table = common.dataset is None and bool(_file_of(bare))
    names = {**named_yamls(common, table=table), **names}
    if not table:
        return layers(names, file, sets, options)
    made = layers({**names, "task": names["task"] or DEFAULT_TASK}, file, sets, options)
    config, shipped = made.config(), named_yaml("dataset", "digits")
    small = config.lvlm.path.startswith(ASSET_PREFIX)
    values = {section: shipped[section] for section in (_SMALL if small else ())}
    values["data"] = {"name": folder_name(config.data.file, common.results)}
    return made._replace(found=[Layer(_SOURCE, values), *made.found])


def layers_on_run(common: Common, made: Layers) -> Layers:
    """Return the layers of a command on a run, the first of which is the run's own. A table that is not the run's takes
    the place of the run's data as a whole; how it is asked and scored stays, unless as `vqa` of what was no table."""
    run, file = made.found[0].values.get("data"), _file_of(combined(made.found))
    run = run if isinstance(run, dict) else {}
    before = _file_of({"data": run})
    if common.dataset is not None or not file or (before and identity(before) == identity(file)):
        return made
    asked = {key: run[key] for key in _ASKED if key in run}
    if not before and asked.get("task", DataConfig.task) == DataConfig.task:  # that of all data but tables
        asked = {"task": DEFAULT_TASK}
    name = folder_name(file, common.results)
    other = Layer(_SOURCE, {"data": {**to_dict(Config())["data"], **asked, "name": name}})
    return made._replace(found=[made.found[0], other, *made.found[1:]])


def check_options(common: Common) -> None:
    """Raise UsageError where --data is no table, or the data are named twice."""
    if common.data is None:
        return
    if not common.data.strip():
        raise UsageError("--data is empty: a .jsonl, .csv, .tsv or .parquet file, a folder of these, or hub:OWNER/NAME")
    if common.dataset is not None:
        raise UsageError(
            f"--data {common.data} and --dataset {common.dataset} both name the data: give one of them; --set changes "
            "single keys"
        )


def check_val(common: Common, config: Config) -> None:
    """Raise UsageError for an evaluation split whose training split nothing names."""
    if common.val is not None and not config.data.file:
        raise UsageError(f"--val {common.val} is the evaluation split of a table: name that of the training by --data")


def task_line(common: Common, made: Layers) -> str | None:
    """Return a line about the task where a table has it by default; None where something names it."""
    said = [layer for layer in made.found if "task" in (layer.values.get("data") or {})]
    ours = said and said[-1].source in (_SOURCE, f"configs/task/{DEFAULT_TASK}.yaml")
    return f"task: {said[-1].values['data']['task']} (--task names another)" if ours and common.task is None else None


def _file_of(values: dict) -> str:
    """Return data.file of nested values; empty where there is none."""
    data = values.get("data")
    return str(data.get("file") or "") if isinstance(data, dict) else ""
