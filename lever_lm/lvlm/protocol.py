"""The seam to a vision-language model: what is asked of one, in this process or behind a server."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from lever_lm.lvlm.prompt import Prompt

Prompts = Sequence[Prompt]
Batches = Sequence[list[int]]  # indices of prompts that are asked together
Answers = Sequence[str] | None  # one for each prompt, where they are scored
Parts = Iterator[tuple[list[int], list]]  # indices of prompts, and a result for each


class Backend(ABC):
    """What `CachedLvlm` asks of a model: first for the batches of the whole work, then for the answers of some."""

    @abstractmethod
    def batches(self, prompts: Prompts, answers: Answers = None) -> list[list[int]]:
        """Return the indices of the prompts, or of the prompts with the answers that are scored after them, in the
        batches in which they are to be asked: a function of the work alone. All processes of a job call it together.
        """

    @abstractmethod
    def ask(self, prompts: Prompts, batches: Batches, answers: Answers = None, *, end: bool = False) -> Parts:
        """Yield (indices of prompts, a result for each) as they come, which together are all of the batches: what the
        model writes after each prompt, uncut. Or, with `answers`, log P(answer | prompt), rounded to 6 decimals: the
        sum over the answer's tokens, and with `end` also that of the token that ends the turn after them. Raises
        LeverError for an empty answer."""

    def generate(self, prompts: Prompts) -> list[str]:
        """Return what the model writes after each prompt, uncut, in the order of the prompts."""
        return self._all(prompts)

    def answer_log_prob(self, prompts: Prompts, answers: Sequence[str], *, end: bool = False) -> list[float]:
        """Return log P(answer | prompt) in the order of the prompts, as `ask` has it."""
        return self._all(prompts, answers, end=end)

    def _all(self, prompts: Prompts, answers: Answers = None, *, end: bool = False) -> list:
        whole = [list(range(len(prompts)))] if prompts else []
        found = {i: one for part in self.ask(prompts, whole, answers, end=end) for i, one in zip(*part, strict=True)}
        return [found[i] for i in range(len(prompts))]
