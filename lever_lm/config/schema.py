"""Every default of the package, as frozen dataclasses. YAML, environment and flags change them in load.py.

A key's metadata says what it means, which values it takes, and its role: what depends on it.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field, fields
from functools import partial
from urllib.parse import urlsplit

from lever_lm.utils.errors import UsageError
from lever_lm.utils.terminal import shown

_RANGES = {
    "> 0": ("be greater than 0", lambda value: value > 0),
    ">= 0": ("not be negative", lambda value: value >= 0),
    ">= -1": ("be -1 or more", lambda value: value >= -1),
    ">= 1": ("be 1 or more", lambda value: value >= 1),
    ">= 2": ("be 2 or more", lambda value: value >= 2),
    "[0, 1)": ("lie in [0, 1)", lambda value: 0 <= value < 1),
    "(0, 1)": ("lie in (0, 1)", lambda value: 0 < value < 1),
    "(0, 1]": ("lie in (0, 1]", lambda value: 0 < value <= 1),
}


def setting(default, help: str, takes: str = "", *, role: str = "training"):
    """A key of the config.

    help: what it means, for `lever config show --docs`. takes: one of _RANGES, also of each item of a tuple, or words
    with ` | ` between them.
    role: `answers`, what the picks and answers of a trained policy depend on; `place`, where the files of these are;
    `machine`, what answers depend on by rounding alone; `speed`, what changes no result; `length`, what may change
    when a run goes on; `command`, what belongs to one command; `training`, the others.
    """
    start = {"default_factory": default.copy} if isinstance(default, dict) else {"default": default}
    return field(**start, metadata={"help": help, "takes": takes, "role": role})


answers, place, machine = (partial(setting, role=role) for role in ("answers", "place", "machine"))
speed, length, command = (partial(setting, role=role) for role in ("speed", "length", "command"))


class Section:
    """A part of the config under a name of its own. Raises UsageError for a value that a key does not take."""

    section: str

    def __init_subclass__(cls, section: str):
        cls.section = section

    def __post_init__(self):
        for one in fields(self):
            _check(f"{self.section}.{one.name}", getattr(self, one.name), one.metadata["takes"])


def _check(key: str, value, takes: str) -> None:
    """Raise UsageError where a key does not take a value."""
    if takes in _RANGES:
        words, holds = _RANGES[takes]
        if not all(map(holds, value if isinstance(value, tuple) else [value])):
            raise UsageError(f"{key} must {words}, found {value}")
    elif takes and value not in takes.split(" | "):
        raise UsageError(f"{key} is {shown(value)}: expected one of {takes.replace(' |', ',')}")


@dataclass(frozen=True)
class DataConfig(Section, section="data"):
    """Where the questions, annotations and images are. A path `asset:NAME` means what the package ships."""

    name: str = answers("digits", "folder below results/")
    okvqa_path: str = place("asset:digits", "folder of questions and annotations, or of parquet files; or hub:REPO")
    coco_path: str = place("asset:digits", "folder of train2014/ and val2014/, with or without mscoco2014/ above them")
    train_path: str = place("", "where the training split is, if not in okvqa_path")
    file: str = place("", "a table of your own (--data): .jsonl .csv .tsv .parquet, a folder of these, hub:OWNER/NAME")
    val_file: str = place("", "the table of the evaluation split (--val), if `file` holds the training split alone")
    val_share: float = answers(0.2, "share of the images that is evaluated on, where one table holds both", "(0, 1)")
    split_seed: int = answers(0, "seed of this split", ">= 0")
    image_table: str = place("", "table of the images, where the rows name them by an id alone")
    columns: dict = place(
        {}, "what the table calls image, image_id, question, answer, answers, answer_index, options, id, split"
    )
    question: str = answers("", "what is asked where a row has no question; {name} is what the row has in that column")
    options: tuple[str, ...] = answers((), "choice: the options of a row that has none")
    task: str = answers("vqa", "how it is asked and scored: vqa, short_answer, choice, number, caption")
    show: str = answers(
        "letter",
        "choice: an answer is shown as its letter or text; hidden: no options, texts",
        "letter | text | hidden",
    )
    number_words: dict = answers({}, "number: words that are numbers, beside zero to ten: {uno: 1, dos: 2}")
    scale: float = answers(0.0, "number: the error that scores 0; 0: the range of the training answers", ">= 0")
    file_prefix: str = answers("", "what stands before the official files' names: v2_ for VQAv2")
    skip_bad_examples: bool = setting(False, "go on without examples that cannot be read, and count them")
    allow_remote: bool = length(False, "fetch images that a table names by http(s) address; each once, into a cache")


@dataclass(frozen=True)
class FeatureConfig(Section, section="features"):
    """Embeddings of queries and candidates."""

    encoder: str = answers("openai/clip-vit-large-patch14", "hub id, directory, or asset:NAME")
    name: str = answers("query_img_text_icd_img_text", "what the query and the ICDs are encoded by")
    batch_size: int = speed(64, "images or texts in a batch of the encoder")

    def __post_init__(self):
        super().__post_init__()
        self.parts()

    def parts(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return what (queries, ICDs) are encoded by, as sets of `img`, `text` and, of ICDs, `ans`."""
        match = re.fullmatch("query_(img|text|img_text)_icd_((?:img|text|img_text)(?:_ans)?)", self.name)
        if match is None:
            expected = "expected query_X_icd_Y or query_X_icd_Y_ans with X and Y of img, text, img_text (--features)"
            raise UsageError(f"unknown features {shown(self.name)}: {expected}")
        return frozenset(match[1].split("_")), frozenset(match[2].split("_"))


@dataclass(frozen=True)
class SamplerConfig(Section, section="sampler"):
    """How the pool of a query is drawn from the training examples (its size: rollout.pool_size, infer.pool_size)."""

    name: str = answers("rand_sampler", "or text_sim_sampler, img_sim_sampler; mix_sampler: 1/2, 1/4, 1/4 of the three")


@dataclass(frozen=True)
class PromptConfig(Section, section="prompt"):
    """How ICDs and a query become a conversation."""

    style: str = answers("interleaved", "dialogue: one user and assistant turn per ICD", "interleaved | dialogue")
    template: str = answers("Question: {question} Short answer: {answer}", "of an ICD; a query's ends before {answer}")
    separator: str = answers("\n", "text between one ICD and the next image, within one turn")
    order: str = answers("first_pick_last", "where the first pick stands", "first_pick_last | first_pick_first")
    system: str = answers("You are a helpful assistant.", "text of the system turn; empty: no such turn")
    cut: str = answers("turn", "an answer ends at line, comma, turn; line: not at a comma", "turn | line | classic")

    def __post_init__(self):
        super().__post_init__()
        parts = re.split(r"(\{question\}|\{answer\})", self.template)
        if parts[1::2] != ["{question}", "{answer}"] or parts[-1]:
            found = shown(self.template)
            raise UsageError(f"prompt.template must hold {{question}} once and end with {{answer}}, found {found}")


_FAMILIES = "auto | qwen2_5_vl | qwen3_vl | generic"


@dataclass(frozen=True)
class LvlmConfig(Section, section="lvlm"):
    """The frozen vision-language model and how it answers."""

    path: str = answers("Qwen/Qwen2.5-VL-3B-Instruct", "hub id, directory, or asset:NAME")
    family: str = machine("auto", "auto: by its config.json; generic: the library's own generate", _FAMILIES)
    processor: dict = answers({}, "generic: options of its processor; max_patches: 1 is one tile an image")
    dtype: str = machine("auto", "bfloat16 on a GPU, float32 on a CPU", "auto | float32 | bfloat16 | float16")
    attention: str = machine("auto", "auto: the library's choice", "auto | sdpa | eager | flash_attention_2")
    batch_size: int = speed(64, "prompts in a batch, at most", "> 0")
    batch_tokens: int = speed(0, "tokens in a batch, at most; 0: 131072 on a GPU's fast path, 65536 elsewhere", ">= 0")
    compile: bool = speed(True, "fuse small operations on a GPU, where there is a C compiler: after a second")
    workers: int = speed(-1, "processes that decode images for the model; -1: eight with a GPU, none without", ">= -1")
    bank_memory: float = speed(0.0, "GiB of the device for image features; 0: a quarter of what is free", ">= 0")
    bank_disk: float = speed(64.0, "GiB in the cache folder for image features; 0: none is written", ">= 0")
    num_beams: int = answers(1, "beams of the search for an answer; 1: greedy", "> 0")
    length_penalty: float = answers(1.0, "exponent of the length that a beam's log-prob is divided by")
    repetition_penalty: float = answers(1.0, "above 1: against tokens of the prompt, and so copied answers", "> 0")
    eos: str = answers("model", "what ends an answer: the model's tokens, or the tokenizer's one", "model | tokenizer")
    max_new_tokens: int = answers(5, "tokens of an answer, at most", "> 0")
    min_pixels: int = answers(3136, "a smaller image is enlarged to this many", "> 0")
    max_pixels: int = answers(1003520, "a larger image is reduced to this many", "> 0")
    # The fingerprint of answers says itself that they came from a server.
    server: str = speed("", "URL of an OpenAI-compatible server of model `path`, or URL,URL,…; empty: in process")
    concurrency: int = speed(32, "requests under way at a server at once", "> 0")
    timeout: float = speed(120.0, "seconds that a request may take", "> 0")
    retries: int = speed(5, "of a request that failed in a way that may pass", ">= 0")
    wait: float = speed(0.0, "seconds to wait for a server that is starting; 0: as long as the retries take", ">= 0")

    def __post_init__(self):
        super().__post_init__()
        if self.min_pixels > self.max_pixels:
            raise UsageError(f"lvlm.min_pixels {self.min_pixels} exceeds lvlm.max_pixels {self.max_pixels}")
        if self.server and self.processor:
            raise UsageError("lvlm.processor is of a model in this process: a server has options of its own, drop it")
        for url in self.server.split(",") if self.server else ():
            _check_server(url.strip())
        for key, value in (("num_beams", 1), ("eos", "model")):
            if self.server and getattr(self, key) != value:
                does = "answers greedily, up to the token that the model's generation config names"
                here = f"but lvlm.{key} is {getattr(self, key)}: --set lvlm.{key}={value}"
                raise UsageError(f"a server {does}, {here}, or drop --server (lvlm.server)")

    @property
    def servers(self) -> list[str]:
        """The URLs of `server`, each once."""
        return list(dict.fromkeys(url.strip().rstrip("/") for url in self.server.split(","))) if self.server else []


def _check_server(url: str) -> None:
    """Raise UsageError unless `url` is http(s) with a host and nothing that does not belong into a config."""
    if "@" in url:  # not shown: it may be a password
        raise UsageError("lvlm.server must hold no user or password: a key is taken from OPENAI_API_KEY")
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        sound = sound and url.isprintable() and " " not in url and not parts.query and not parts.fragment
    except ValueError:  # a port that is no number, a broken IPv6 address
        sound = False
    if not sound:
        example = "for example --server http://127.0.0.1:8000/v1"
        raise UsageError(f"lvlm.server must be the URL of a server, up to its /v1, found {shown(url, 100)}: {example}")


@dataclass(frozen=True)
class RolloutConfig(Section, section="rollout"):
    """The rollouts of a query: how many queries, how large a pool, how many sequences of each kind."""

    num_queries: int = setting(5000, "training examples that get a group; all of them if there are fewer", "> 0")
    pool_size: int = setting(64, "candidates of a query in training; of an evaluation: infer.pool_size", "> 0")
    shots: int = setting(2, "demonstrations of a rollout", "> 0")
    beam: int = setting(2, "beams of the initial policy", ">= 0")
    sample: int = setting(3, "samples of the initial policy, at each temperature", ">= 0")
    temperatures: tuple[float, ...] = setting((1.0, 1.3), "temperatures of the samples", "> 0")
    retrieval: int = setting(2, "rollouts by similarity to the query", ">= 0")
    random: int = setting(5, "rollouts that are drawn evenly", ">= 0")
    infoscore: int = setting(0, "rollouts by a beam search for the gain in the reference's log-prob; costly", ">= 0")
    infoscore_candidates: int = setting(0, "candidates that this search tries at each step; 0: all", ">= 0")
    distinct_orders: bool = setting(False, "the same ICDs in another order are another rollout, not a duplicate")
    probe: int = setting(0, "rollouts of a query that are asked first, the rest only if these differ; 0: no", ">= 0")
    gt_prob: bool = setting(False, "also score P(reference answers), which the reward modes with gtprob need")
    gt_prob_end: bool = setting(True, "of answers that end there, so that 1 has no share in 10; no: that begin so")

    def __post_init__(self):
        super().__post_init__()
        if not any((self.beam, self.sample and self.temperatures, self.retrieval, self.random, self.infoscore)):
            raise UsageError("no rollout of any kind is asked for: rollout.beam, sample, retrieval, random, infoscore")
        if 0 < (few := self.infoscore_candidates) < self.shots:
            raise UsageError(f"rollout.infoscore_candidates {few} are too few for rollout.shots {self.shots}")
        if self.probe == 1:
            raise UsageError("rollout.probe compares answers: 2 or more of them, or 0 to ask all at once")
        if self.probe and self.infoscore:
            raise UsageError("rollout.infoscore asks about each query before any probe: not with rollout.probe")
        if self.num_queries < 2:
            raise UsageError("rollout.num_queries (--limit) must be 2 or more: one to learn from, one to judge by")
        if self.pool_size < self.shots:
            raise UsageError(f"rollout.pool_size {self.pool_size} is smaller than rollout.shots {self.shots}")


@dataclass(frozen=True)
class RewardConfig(Section, section="reward"):
    """How a scored rollout becomes a number, and which rollouts are dropped on loading."""

    mode: str = setting("hard_plus_soft", "how scores become a reward: docs/learning.md lists the modes")
    hard_weight: float = setting(1.0, "weight of a correct answer")
    soft_weight: float = setting(1.0, "weight of the accuracy, or of P(reference answers)")
    rel_weight: float = setting(0.1, "weight of the relevance")
    skip_fallback: bool = setting(True, "drop rollouts scored by the fallback metric")
    require_positive: bool = setting(False, "drop queries without a correct rollout")
    missing: str = setting("refuse", "if a score lacks; lineage: no vqa_gt_prob is 0", "refuse | drop | lineage")
    max_groups: int = setting(0, "groups of a rollout file to train on, first by query id; 0: all (--limit)", ">= 0")


@dataclass(frozen=True)
class PolicyConfig(Section, section="policy"):
    """Shape of the PointerSelector; its input size is that of the features with `candidate_features`."""

    hidden_dim: int = setting(256, "size of projected queries and candidates", "> 0")
    num_layers: int = setting(1, "layers of cross-attention", "> 0")
    num_heads: int = setting(1, "heads of a layer", "> 0")
    dropout: float = setting(0.5, "dropout after the projections", "[0, 1)")
    attn_dropout: float = setting(0.1, "dropout of the attention weights", "[0, 1)")
    state_update: str = setting("none", "how a pick changes the query state: none, gate, gru")
    scorer: str = setting("dot", "how the state scores a candidate: dot, additive, bilinear")
    diversity: str = setting("none", "mmr: likeness to what was picked costs, by a learnt weight")
    stop: bool = setting(False, "the policy may end a sequence early, after its first pick")
    candidate_features: tuple[str, ...] = answers((), "what it is told of a candidate: agreement, consistency")


@dataclass(frozen=True)
class RceConfig(Section, section="rce"):
    """Reward-weighted cross-entropy: the warm-up."""

    epochs: int = setting(5, "epochs of the warm-up", ">= 0")
    lr: float = setting(1e-3, "learning rate", "> 0")
    batch_size: int = setting(64, "groups in a batch", "> 0")
    weight_decay: float = setting(0.01, "weight decay of AdamW", ">= 0")
    max_grad_norm: float = setting(1.0, "longer gradients are cut to this length", "> 0")
    temperature_start: float = setting(2.0, "temperature of the rewards' softmax in the first epoch", "> 0")
    temperature_end: float = setting(0.5, "and in the last one", "> 0")
    normalize: str = setting("none", "rewards in the weights, within their group", "none | zscore | rank")
    label_smoothing: float = setting(0.0, "share of the target that is spread over all candidates", "[0, 1)")


@dataclass(frozen=True)
class GrpoConfig(Section, section="grpo"):
    """Group-relative policy optimisation on the logged groups."""

    epochs: int = length(50, "epochs after the warm-up", ">= 0")
    lr: float = setting(1e-4, "learning rate", "> 0")
    batch_size: int = setting(64, "groups in a batch", "> 0")
    weight_decay: float = setting(0.0, "weight decay of AdamW", ">= 0")
    max_grad_norm: float = setting(1.0, "longer gradients are cut to this length", "> 0")
    schedule: str = setting("constant", "of the learning rate, to 0 at the last epoch", "constant | linear | cosine")
    warmup_steps: int = setting(0, "steps in which the learning rate rises from 0", ">= 0")
    loss: str = setting("clip", "clip: the clipped ratio times the advantage; reinforce: log π times it")
    patience: int = length(0, "stop after so many epochs without a better val_reward; 0: never", ">= 0")
    clip_epsilon: float = setting(0.2, "how far the ratio of new to old probability counts, from 1", "(0, 1)")
    clip_epsilon_high: float = setting(0.0, "of ratios above 1; 0: as clip_epsilon", ">= 0")
    kl_beta: float = setting(0.1, "weight β of the KL to the reference policy", ">= 0")
    kl: str = setting("k3", "estimate of the KL; on logged rollouts k1 is a drift, not a penalty", "k1 | k2 | k3")
    adaptive_kl: bool = setting(False, "β × 1.5 above KL 0.1, ÷ 1.5 below 0.01")
    entropy_beta: float = setting(0.0, "weight of a bonus for the entropy of the picks", ">= 0")
    advantage: str = setting("zscore", "of the reward within its group, or its rank", "zscore | rank")
    advantage_scale: str = setting("group", "whose std a zscore divides by", "group | batch | none")
    advantage_min_std: float = setting(0.1, "a zscore divides by no less", ">= 0")
    advantage_clip: float = setting(5.0, "larger advantages, of either sign, are cut to this", "> 0")
    top_k: tuple[int, ...] = setting((), "keep only the k best rollouts of a group; k by epoch, then the last", ">= 1")
    refresh_every: int = setting(5, "epochs between refreshes of the old policy; 0 never", ">= 0")
    anchor: str = setting("rce", "old and reference policy at the start: that after RCE, or before it", "rce | init")
    reference: str = setting("start", "KL against the policy at GRPO's start, or against the `old` one", "start | old")
    dropout: str = setting("both", "both: same masks in old and new policy; lineage: new_only", "off | both | new_only")
    freeze_backbone: bool = setting(False, "train the attention layers only: input_proj, query_proj, cand_proj stay")
    online: bool = setting(False, "also learn from new rollouts of the policy itself, answered by the LVLM")
    online_every: int = setting(5, "epochs between rounds of these; each replaces the round before", "> 0")
    online_samples: int = setting(8, "rollouts of a query in a round, which are compared", ">= 2")
    online_ratio: float = setting(0.5, "their share of the loss; 1: the logged rollouts are left out", "(0, 1]")

    def __post_init__(self):
        super().__post_init__()
        if self.kl == "k1" and self.adaptive_kl:
            raise UsageError("grpo.adaptive_kl follows a KL that is never negative: not with grpo.kl=k1, take k3")


@dataclass(frozen=True)
class InferConfig(Section, section="infer"):
    """The queries of an evaluation, what is chosen from, and how predictions are scored."""

    pool_size: int = answers(256, "candidates of a query at inference; 0: of all the nearest, at most 1,024", ">= 0")
    num_queries: int = command(0, "queries that are answered; 0: all of the evaluation split")
    auc: bool = command(False, "choice of two: also score the log-probs of both, for the ROC-AUC")
    okvqa_stem: bool = command(False, "reduce predictions as OK-VQA reduced its `answer`s, before they are scored")


@dataclass(frozen=True)
class Config:
    """One run. Each stage gets its own part."""

    data: DataConfig = field(default_factory=DataConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    lvlm: LvlmConfig = field(default_factory=LvlmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rce: RceConfig = field(default_factory=RceConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    infer: InferConfig = field(default_factory=InferConfig)
    warmup: str = setting(
        "rce",
        "what the epochs before GRPO learn from; a+b: the first half from a, the rest from b",
        "rce | match | match+rce | match+epr | epr | lever_lm | fixed_set",
    )
    validate_on: str = setting(
        "rollouts", "answers: after each epoch the LVLM also answers after the policy's own picks", "rollouts | answers"
    )
    seed: int = setting(0, "seed of every draw")
    device: str = command("auto", "auto: the first GPU if there is one, else the CPU")
    keep: int = command(0, "checkpoints to keep: the latest of each phase, and the best of every strategy; 0: all")

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must lie between 0 and 2**63 - 1, found {self.seed} (--seed)")
        for one in fields(self):
            _check(one.name, getattr(self, one.name), one.metadata.get("takes", ""))
        if self.keep < 0:
            raise UsageError(f"keep must not be negative, found {self.keep} (--keep)")
        if self.rce.epochs + self.grpo.epochs == 0:
            raise UsageError("nothing to train: rce.epochs and grpo.epochs are both 0 (--rce-epochs, --grpo-epochs)")
        if self.warmup in ("lever_lm", "fixed_set") and self.grpo.epochs:
            raise UsageError(f"warmup={self.warmup} makes no policy that GRPO could train: --grpo-epochs 0")
        if self.warmup == "fixed_set" and self.rce.epochs != 1:
            raise UsageError("warmup=fixed_set is one epoch, in which examples are counted: --rce-epochs 1")
        if "epr" in self.warmups and self.rollout.shots != 1:
            raise UsageError(f"warmup={self.warmup} learns from demonstrations shown alone: --set rollout.shots=1")
        if 0 < self.rce.epochs < len(self.warmups):
            raise UsageError(f"warmup={self.warmup} needs an epoch of each: --rce-epochs {len(self.warmups)}")
        if self.validate_on == "answers" and self.warmup in ("lever_lm", "fixed_set"):
            raise UsageError(f"warmup={self.warmup} makes no policy whose picks are answered: --validate-on rollouts")
        if self.warmup == "lever_lm" and self.reward.mode != "infoscore":
            raise UsageError("warmup=lever_lm learns from InfoScore's sequences: --set reward.mode=infoscore")
        if self.grpo.online and self.reward.mode == "infoscore":
            raise UsageError("grpo.online searches no rollouts, and reward.mode=infoscore can score no others")

    @property
    def warmups(self) -> tuple[str, ...]:
        """The losses of the warm-up, in their order."""
        return tuple(self.warmup.split("+"))

    @property
    def asks(self) -> bool:
        """Whether training asks the LVLM anything, for rollouts or for validation."""
        return self.needs_rollouts or self.validate_on == "answers"

    @property
    def needs_rollouts(self) -> bool:
        """Whether anything is learnt from answers of the LVLM."""
        return self.warmup != "match" or self.grpo.epochs > 0


def to_dict(config) -> dict:
    """Return the plain nested values of a config or of a part of it, as YAML and JSON hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


# ---------------------------------------------------------------------- the keys


def _keys() -> dict[tuple[str, ...], dataclasses.Field]:
    """The field of each key: (section, name), or (name,) at the top; in the order of the dataclasses."""
    parts = {one: fields(one.type) if dataclasses.is_dataclass(one.type) else () for one in fields(Config)}
    inner = {(one.name, leaf.name): leaf for one, leaves in parts.items() for leaf in leaves}
    return inner | {(one.name,): one for one, leaves in parts.items() if not leaves}


def keys_of(*roles: str) -> list[tuple[str, ...]]:
    """Return the keys of these roles, as (section, name) or (name,)."""
    return [key for key, one in _keys().items() if one.metadata["role"] in roles]


def all_keys() -> list[str]:
    """Return every dotted key of the config."""
    return list(map(".".join, _keys()))


def key_docs() -> dict[str, str]:
    """Return what each dotted key means, and each section."""
    sections = {one.name: one.type.__doc__ for one in fields(Config) if dataclasses.is_dataclass(one.type)}
    return sections | {".".join(key): one.metadata["help"] for key, one in _keys().items()}
