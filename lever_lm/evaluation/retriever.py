"""Demonstrations for images and questions of your own, in Python.

    from lever_lm import Retriever

    retriever = Retriever("results/digits/model_cpk/demo")  # a run, a checkpoint, an exported folder, a hub id
    picks = retriever.pick("x.jpg", "Which number is written here?", shots=4)
    messages = retriever.prompt("x.jpg", "Which number is written here?", picks)

`retriever.answer(...)`, with the same arguments as `prompt`, asks the LVLM. Picks are chosen as for an evaluation
query: by the policy, from a pool of infer.pool_size examples that the sampler draws from the training split.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from lever_lm.data import Example, VqaData, forget_digests, image_digests, open_image
from lever_lm.data.embeddings import Embeddings, encode
from lever_lm.data.encoder import FeatureEncoder
from lever_lm.data.image_decode import Undecodable, decoded
from lever_lm.data.rows import unfit
from lever_lm.evaluation.evaluate import problem_of
from lever_lm.lvlm import Prompt, build_prompt
from lever_lm.lvlm.processor import processor_of
from lever_lm.lvlm.prompt import to_messages
from lever_lm.selectors.candidate_features import Labelled, candidate_columns
from lever_lm.selectors.learned import choose
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.selectors.problem import Problem
from lever_lm.tasks import TASKS, Task, task_of
from lever_lm.training.find_checkpoint import load_for, locate
from lever_lm.training.from_checkpoint import config_beside, results_beside
from lever_lm.training.run_dir import Layout
from lever_lm.training.stages import Stages
from lever_lm.utils.atomic_io import open_regular
from lever_lm.utils.console import Screen
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.hub import fetch_model
from lever_lm.utils.progress import untracked
from lever_lm.utils.terminal import one_line, shown
from lever_lm.utils.transformers_compat import import_transformers

FORMS = ("transformers", "openai", "text")


@dataclass(frozen=True)
class Pick:
    """A demonstration that the policy chose. probability: of this pick among what was left of the pool when it was
    made; None of a selector that has none. image_similarity, text_similarity: cosines of its image and question to the
    query's, by the encoder."""

    example: Example
    probability: float | None
    image_similarity: float
    text_similarity: float


class Retriever:
    """A policy with all it needs to choose demonstrations for any image and question.

    checkpoint: a run folder (its chosen checkpoint, as for `lever infer`), a checkpoint file, a folder of `lever
    export`, or a hub id OWNER/NAME. Dataset, encoder, features, sampler, size of the pools (infer.pool_size), prompt
    and LVLM are those of the config beside it; these change them:
    examples: demonstrations of your own in place of the training split, as `Example`s or (image, question, answer);
    picks number them (`question_id`) from 0 in this order.
    dataset, lvlm: names of YAMLs in configs/. sets: config keys as for --set, `["features.encoder=DIR", "device=cpu"]`.
    results: the folder of the caches; by default that of the run, else `results`. verbose: say on stderr what is done.
    stages: data, features and LVLM that are there already, in place of all of these but `examples`.

    Raises LeverError where the checkpoint is none, was trained on other features, or does not say what it needs; and
    UsageError (a LeverError) for an unknown name or key. Data, features and LVLM are loaded when first needed.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        examples: Sequence[Example | tuple] | None = None,
        dataset: str | None = None,
        lvlm: str | None = None,
        sets: Sequence[str] = (),
        results: str | Path | None = None,
        verbose: bool = False,
        stages: Stages | None = None,
    ):
        self.checkpoint, self.why, values = locate(checkpoint)
        if stages is None:
            config = config_beside(values, checkpoint, dataset, lvlm, sets, own=examples is not None)
            screen = Screen(to_stderr=True, quiet=not verbose)
            layout = Layout(config, results or results_beside(self.checkpoint))
            stages = Stages(config, layout, screen.say, screen.track)
        self.stages, self.config = stages, stages.config
        self.policy = load_for(self.checkpoint, self.config, stages.say)
        if examples is not None and not isinstance(self.policy, PointerSelector):
            raise UsageError(f"{checkpoint} takes only the training split that it was made of: leave examples= out")
        self._own = None if examples is None else _own_examples(examples)

    # ------------------------------------------------------------------ what there is

    @property
    def examples(self) -> tuple[Example, ...]:
        """The demonstrations to choose from: the training split, or those of your own."""
        return self.stages.data.train_examples if self._own is None else self._own

    @cached_property
    def task(self) -> Task:
        """How answers are scored: by the task of the config, over the demonstrations that there are."""
        if self._own is None:
            return task_of(self.stages.data)
        data = self.config.data
        return TASKS[data.task].of(VqaData("own", self._own, self._own, "", task=data.task, settings=data))

    @cached_property
    def _embeddings(self) -> Embeddings:
        """The embeddings of `examples`."""
        return self.stages.features.train if self._own is None else self._encode(self.examples)

    @cached_property
    def _columns(self) -> Tensor | None:
        """What the policy is told of `examples` beside their embeddings."""
        if self._own is None:
            return self.stages.features.columns
        labelled = Labelled(self._own, self._embeddings, self.task, self.stages.track)
        return candidate_columns(self.config.policy.candidate_features, labelled)

    @cached_property
    def _encoder(self) -> FeatureEncoder:
        features = self.config.features
        return FeatureEncoder(features.encoder, self.config.device, features.batch_size)

    def _encode(self, examples: Sequence[Example]) -> Embeddings:
        data = VqaData("own", tuple(examples), (), "")
        own = self._own is examples
        track = self.stages.track if own else untracked
        return encode(self._encoder, data, "train", track, own and "ans" in self.config.features.parts()[1])

    def _of_queries(self, queries: Sequence[Example]) -> Embeddings:
        """Return embeddings: of the cache where all queries are evaluation examples of the dataset, else made anew."""
        if self._own is None:
            row = {example.question_id: i for i, example in enumerate(self.stages.data.val_examples)}
            rows = [row.get(query.question_id) for query in queries]
            if all(i is not None and self.stages.data.val_examples[i] == q for i, q in zip(rows, queries, strict=True)):
                return self.stages.features.val.take(rows)
        return self._encode(queries)

    # ------------------------------------------------------------------ choosing

    @property
    def from_pools(self) -> bool:
        """Whether demonstrations are chosen from a pool of the sampler's, or from all examples."""
        return isinstance(self.policy, PointerSelector)

    def pick(self, image, question=None, *, shots: int = 4) -> list[Pick] | list[list[Pick]]:
        """Return the demonstrations for a question about an image, the first pick first: `shots` of them, fewer where
        the policy may stop and did. Lists of N images and N questions give N such lists.

        image: the path of a JPEG, PNG, WEBP, BMP or GIF, or an `Example`, which has its question. The same query gets
        the same pool and the same picks; never a demonstration with the query's own image. Raises LeverError for an
        image that cannot be read and for more shots than the pool has, ValueError for lists of different lengths.
        """
        queries, _, one = self._asked(image, question)
        if not queries:
            return []
        problem = self._problem(queries)
        asked, train = problem.embeddings
        chosen, reasons = choose(self.policy, problem, shots, self.checkpoint)
        picks = [
            [
                Pick(self.examples[row], sure, float(train.image[row] @ image), float(train.text[row] @ text))
                for row, sure in zip(rows, why.get("probabilities") or [None] * len(rows), strict=True)
            ]
            for rows, why, image, text in zip(chosen, reasons, asked.image, asked.text, strict=True)
        ]
        return picks[0] if one else picks

    def pool(self, image, question=None) -> list[Example]:
        """Return the examples that one query's demonstrations are chosen from; arguments as of `query`."""
        (query,) = self._problem([self.query(image, question)])
        return [self.examples[row] for row in (query.pool if self.from_pools else query.allowed)]

    def _problem(self, queries: list[Example]) -> Problem:
        embeddings = (self._of_queries(queries), self._embeddings)
        return problem_of(self.config, queries, self.examples, self.task, embeddings, self._columns)

    def query(self, image: str | Path | Example, question: str | None = None) -> Example:
        """Return the query that an image and a question make, without answers. Its number, and so its pool, follows
        from both; an `Example` keeps that of its dataset, except with demonstrations of your own. Raises LeverError for
        an image that cannot be read, UsageError for a question that is none."""
        if isinstance(image, Example):
            if question not in (None, image.question):
                raise ValueError("an Example brings its own question: give an image, or leave the question out")
            return image if self._own is None else self._numbered(image)
        blank = not isinstance(question, str) or not question.strip()
        if problem := f"found {shown(question)}" if blank else unfit([question]):
            raise UsageError(f"a question about {image} is needed: {problem}")
        path = os.fsdecode(image)
        _check_image(path)
        forget_digests()
        return self._numbered(Example(0, 0, question, (), (), path))

    def _numbered(self, query: Example) -> Example:
        """Return a query under the numbers that its image and question make."""
        number = int(hashlib.sha256(f"{query.content} {query.question}".encode()).hexdigest()[:15], 16)
        return replace(query, question_id=number, image_id=_image_id(query.content))

    def _asked(self, image, question, picks=()) -> tuple[list[Example], list[list[Example]], bool]:
        """Return the queries of `pick`, `prompt` or `answer`, the demonstrations of each, and whether one query was
        asked for, not a list."""
        one = not isinstance(image, (list, tuple))
        if one:
            image, question, picks = [image], [question], [picks]
        question, picks = question or [None] * len(image), picks or [()] * len(image)
        if isinstance(question, str) or not len(image) == len(question) == len(picks):
            raise ValueError(f"{len(image)} images need lists of as many questions, and of as many lists of picks")
        shown = [[pick.example if isinstance(pick, Pick) else pick for pick in part] for part in picks]
        return [self.query(*pair) for pair in zip(image, question, strict=True)], shown, one

    # ------------------------------------------------------------------ showing

    def prompt(self, image, question=None, picks=(), *, form: str = "transformers"):
        """Return the conversation that shows the picks, then asks the question; arguments as of `pick`, and what it
        returned (or `Example`s, in pick order). Lists give a list of conversations.

        form: `transformers`, messages for a processor's `apply_chat_template`, whose images are upright RGB
        `PIL.Image`s; `openai`, messages for a chat completion, whose images are PNG data URLs; `text`, as the LVLM's
        chat template renders it, one placeholder an image. Order and wording are those of the config (prompt.*).
        """
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r}: one of {', '.join(FORMS)}")
        prompts, one = self._prompts(image, question, picks)
        made = [self._render(prompt, form) for prompt in prompts]
        return made[0] if one else made

    def answer(self, image, question=None, picks=()) -> str | list[str]:
        """Return the LVLM's answer to the conversation of `prompt`; the answer cache keeps it. Lists give a list."""
        prompts, one = self._prompts(image, question, picks)
        answers = self.stages.lvlm.answer(prompts, "answers")
        return answers[0] if one else answers

    def _prompts(self, image, question, picks) -> tuple[list[Prompt], bool]:
        queries, shown, one = self._asked(image, question, picks)
        return [build_prompt(icds, q, self.config.prompt) for icds, q in zip(shown, queries, strict=True)], one

    def _render(self, prompt: Prompt, form: str) -> list[dict] | str:
        style = self.config.prompt
        if form == "text":
            messages = to_messages(prompt, style)
            return self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if form == "openai":
            return to_messages(prompt, style, self._urls.part)
        return to_messages(prompt, style, lambda image: {"type": "image", "image": open_image(image)})

    @cached_property
    def _urls(self):
        from lever_lm.lvlm.images import DataUrls

        import_transformers()  # qwen_vl_utils needs torchvision
        return DataUrls(self.config.lvlm)

    @cached_property
    def _processor(self):
        lvlm = self.config.lvlm
        return processor_of(lvlm, self.config.prompt, fetch_model(lvlm.path, "--lvlm, lvlm.path"))


# ---------------------------------------------------------------------- examples of your own


def _own_examples(given: Sequence[Example | tuple]) -> tuple[Example, ...]:
    """Return demonstrations as Examples, numbered in their order. Raises LeverError for an image that cannot be read,
    ValueError for what is neither an Example nor an image and two texts in UTF-8."""
    examples = []
    for number, item in enumerate(given):
        if not isinstance(item, Example):
            if not isinstance(item, (tuple, list)) or len(item) != 3 or not all(isinstance(t, str) for t in item[1:]):
                raise ValueError(f"example {number}: expected an Example or (image, question, answer), found {item!r}")
            image, question, answer = os.fsdecode(item[0]), item[1], item[2]
            if problem := unfit((question, answer)):
                raise ValueError(f"example {number}: {problem}")
            _check_image(image)
            item = Example(number, 0, question, (answer,), (answer,), image)
        examples.append(item)
    if not examples:
        raise LeverError("there are no examples to choose from")
    # Numbers of datasets say nothing here: one content is one image, whatever it was called where it came from.
    digests = image_digests([example.image for example in examples])
    return tuple(
        replace(example, question_id=number, image_id=_image_id(digest))
        for number, (example, digest) in enumerate(zip(examples, digests, strict=True))
    )


def _image_id(digest: str) -> int:
    """Return the id of an image that no dataset numbers: below zero, where the ids of datasets are not."""
    return -1 - int(digest[:15], 16)


def _check_image(path: str) -> None:
    """Raise LeverError for an image that cannot be shown."""
    with open_regular(path, "the image") as file:
        try:
            decoded(file)
        except Undecodable as error:
            raise LeverError(f"cannot decode the image {one_line(path)}: {one_line(str(error))}") from error
