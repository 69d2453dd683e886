"""Every default of the package, as frozen dataclasses. How YAML, environment and flags change them: settings.py."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from lever_lm.utils.errors import UsageError
from lever_lm.utils.safe_parse import shown


@dataclass(frozen=True)
class DataConfig:
    """Where the questions, annotations and images are. A path `asset:NAME` means what the package ships."""

    name: str = "digits"  # folder below results/
    okvqa_path: str = "asset:digits"  # folder of the questions and annotations files, or of parquet files; or hub:REPO
    coco_path: str = "asset:digits"  # folder of train2014/ and val2014/, with or without mscoco2014/ above them
    train_path: str = ""  # where the training split is, if not in okvqa_path
    file_prefix: str = ""  # what stands before the official files' names: v2_ for VQAv2
    skip_bad_examples: bool = False  # go on without examples that cannot be read, and count them
    allow_remote: bool = False  # fetch images that a table names by http(s) address; each once, into a cache


@dataclass(frozen=True)
class FeatureConfig:
    """CLIP embeddings of queries and candidates."""

    encoder: str = "openai/clip-vit-large-patch14"  # hub id, directory, or asset:NAME
    name: str = "query_img_text_icd_img_text"  # what the query and the ICDs are encoded by
    batch_size: int = 64

    def __post_init__(self):
        self.parts()

    def parts(self) -> tuple[frozenset[str], frozenset[str]]:
        """What (queries, ICDs) are encoded by, as sets of `img` and `text`."""
        choices = {"img": frozenset({"img"}), "text": frozenset({"text"}), "img_text": frozenset({"img", "text"})}
        for query, query_parts in choices.items():
            for icd, icd_parts in choices.items():
                if self.name == f"query_{query}_icd_{icd}":
                    return query_parts, icd_parts
        raise UsageError(
            f"unknown features {shown(self.name)}: expected query_X_icd_Y with X and Y of img, text, img_text "
            "(--features)"
        )


@dataclass(frozen=True)
class SamplerConfig:
    """How the pool of a query is drawn from the training examples (its size is rollout.pool_size)."""

    name: str = "rand_sampler"  # or text_sim_sampler, img_sim_sampler; mix_sampler: 1/2 random, 1/4 text, 1/4 image


@dataclass(frozen=True)
class PromptConfig:
    """How ICDs and a query become a conversation."""

    style: str = "interleaved"  # interleaved: one user turn; dialogue: one user/assistant turn per ICD
    template: str = "Question: {question} Short answer: {answer}"  # an ICD's text; the query's ends before {answer}
    separator: str = "\n"  # between one ICD and the next image, within one turn
    order: str = "first_pick_last"  # the first pick stands nearest the query; or first_pick_first
    system: str = "You are a helpful assistant."
    cut: str = "turn"  # an answer ends at a line break, a comma, or the next turn; classic: also at Short in Shorts

    def __post_init__(self):
        _one_of("prompt.style", self.style, ("interleaved", "dialogue"))
        _one_of("prompt.order", self.order, ("first_pick_last", "first_pick_first"))
        _one_of("prompt.cut", self.cut, ("turn", "classic"))
        parts = re.split(r"(\{question\}|\{answer\})", self.template)
        if parts[1::2] != ["{question}", "{answer}"] or parts[-1]:
            raise UsageError(
                f"prompt.template must hold {{question}} once and end with {{answer}}, found {shown(self.template)}"
            )


@dataclass(frozen=True)
class LvlmConfig:
    """The frozen vision-language model and how it answers."""

    path: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # hub id, directory, or asset:NAME
    dtype: str = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    attention: str = "auto"  # auto: the library's choice; or sdpa, eager, flash_attention_2
    batch_size: int = 64  # prompts in a batch, at most
    batch_tokens: int = 65536  # and tokens in it, padding and the answers that are scored counted
    compile: bool = False  # fuse small operations on a GPU: a tenth faster, after 15 seconds
    workers: int = -1  # processes that decode images ahead of the model; -1: eight with a GPU, none without
    bank_memory: float = 0.0  # GiB of the device for image features; 0: a quarter of what the model leaves free
    bank_disk: float = 64.0  # GiB in the cache folder for image features; 0: none is written
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0  # above 1: against tokens that the prompt has, so against copied answers too
    eos: str = "model"  # what ends an answer: the tokens of the model's generation config; or tokenizer: its own alone
    max_new_tokens: int = 5
    min_pixels: int = 3136
    max_pixels: int = 1003520
    server: str = ""  # URL of an OpenAI-compatible server that answers as model `path`, or URL,URL,…; empty: in process
    concurrency: int = 32  # requests under way at a server at once
    timeout: float = 120.0  # seconds a request may take
    retries: int = 5  # of a request that failed in a way that may pass
    wait: float = 0.0  # seconds to wait for a server that is starting, or starting again; 0: as long as the retries

    def __post_init__(self):
        _one_of("lvlm.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _one_of("lvlm.eos", self.eos, ("model", "tokenizer"))
        _one_of("lvlm.attention", self.attention, ("auto", "sdpa", "eager", "flash_attention_2"))
        sizes = ("batch_size", "batch_tokens", "num_beams", "max_new_tokens", "min_pixels", "max_pixels")
        _positive(self, "lvlm", *sizes, "repetition_penalty")
        _not_negative(self, "lvlm", "bank_memory", "bank_disk")
        if self.workers < -1:
            raise UsageError(f"lvlm.workers must be -1 or more, found {self.workers}")
        if self.min_pixels > self.max_pixels:
            raise UsageError(f"lvlm.min_pixels {self.min_pixels} exceeds lvlm.max_pixels {self.max_pixels}")
        _positive(self, "lvlm", "concurrency", "timeout")
        _not_negative(self, "lvlm", "retries", "wait")
        if self.server:
            for url in self.server.split(","):
                _check_url("lvlm.server", url.strip(), "--server http://127.0.0.1:8000/v1")
            if self.num_beams > 1:
                raise UsageError(
                    f"a server answers greedily, but lvlm.num_beams is {self.num_beams}: --set lvlm.num_beams=1, or "
                    "drop --server (lvlm.server) to search beams in this process"
                )
            if self.eos != "model":
                raise UsageError(
                    f"a server ends its answers where the model's generation config says, but lvlm.eos is {self.eos}: "
                    "--set lvlm.eos=model, or drop --server (lvlm.server)"
                )

    @property
    def servers(self) -> list[str]:
        """The URLs of `server`, each once."""
        return list(dict.fromkeys(url.strip().rstrip("/") for url in self.server.split(","))) if self.server else []


# What of an LVLM changes the time its answers take, and not the answers.
LVLM_SPEED = ("batch_size", "batch_tokens", "compile", "workers", "bank_memory", "bank_disk")
# That a server answered is in its own fingerprint.
LVLM_SPEED += ("server", "concurrency", "timeout", "retries", "wait")
LVLM_MACHINE = ("dtype", "attention")  # and what depends on the machine that it runs on


@dataclass(frozen=True)
class RolloutConfig:
    """The rollouts of a query: how many queries, how large a pool, how many sequences of each kind."""

    num_queries: int = 5000  # training examples that get a group; all of them if there are fewer
    pool_size: int = 64
    shots: int = 2
    beam: int = 2  # beams of the initial policy
    sample: int = 3  # samples of the initial policy, at each temperature
    temperatures: tuple[float, ...] = (1.0, 1.3)
    retrieval: int = 2  # by similarity to the query
    random: int = 5
    infoscore: int = 0  # by beam search, of this width, for the gain in the reference's log-prob; costly
    infoscore_candidates: int = 0  # how many of the pool that search tries at each step; 0: all
    distinct_orders: bool = False  # the same ICDs in another order are another rollout, not a duplicate
    gt_prob: bool = False  # also score P(reference answers), which the reward modes with gtprob need
    gt_prob_end: bool = True  # of answers that end there, so that 1 has no share in 10; no: of texts that begin so

    def __post_init__(self):
        _positive(self, "rollout", "num_queries", "pool_size", "shots")
        _not_negative(self, "rollout", "beam", "sample", "retrieval", "random", "infoscore", "infoscore_candidates")
        if not any((self.beam, self.sample and self.temperatures, self.retrieval, self.random, self.infoscore)):
            raise UsageError("no rollout of any kind is asked for: rollout.beam, sample, retrieval, random, infoscore")
        if 0 < self.infoscore_candidates < self.shots:
            raise UsageError(
                f"rollout.infoscore_candidates {self.infoscore_candidates} are too few for rollout.shots {self.shots}"
            )
        if self.pool_size < self.shots:
            raise UsageError(f"rollout.pool_size {self.pool_size} is smaller than rollout.shots {self.shots}")
        if self.num_queries < 2:
            raise UsageError(
                "rollout.num_queries (--limit) must be 2 or more: one group to learn from, one to judge by"
            )
        if any(t <= 0 for t in self.temperatures):
            raise UsageError(f"rollout.temperatures must be positive, found {list(self.temperatures)}")


@dataclass(frozen=True)
class RewardConfig:
    """How a scored rollout becomes a number (rewards.py), and which rollouts are dropped on loading."""

    mode: str = "hard_plus_soft"
    hard_weight: float = 1.0
    soft_weight: float = 1.0
    rel_weight: float = 0.1
    skip_fallback: bool = True  # drop rollouts scored by the fallback metric
    require_positive: bool = False  # drop queries without a correct rollout
    missing: str = "refuse"  # a rollout that lacks a score of the mode: refuse, drop; lineage: no vqa_gt_prob is 0
    max_groups: int = 0  # groups of a rollout file to train on, the first by query id; 0: all (--limit)

    def __post_init__(self):
        _one_of("reward.missing", self.missing, ("refuse", "drop", "lineage"))
        _not_negative(self, "reward", "max_groups")


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of the PointerSelector; its input size is that of the features."""

    hidden_dim: int = 256
    num_layers: int = 1
    num_heads: int = 1
    dropout: float = 0.5
    attn_dropout: float = 0.1
    state_update: str = "none"  # how a pick changes the query state: none, gate, gru
    scorer: str = "dot"  # how the state scores a candidate: dot, additive, bilinear
    diversity: str = "none"  # mmr: likeness to what was picked costs, by a learnt weight
    stop: bool = False  # the policy may end a sequence early, after its first pick

    def __post_init__(self):
        _positive(self, "policy", "hidden_dim", "num_layers", "num_heads")
        for name in ("dropout", "attn_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"policy.{name} must lie in [0, 1), found {getattr(self, name)}")


@dataclass(frozen=True)
class RceConfig:
    """Reward-weighted cross-entropy: the warm-up."""

    epochs: int = 5
    lr: float = 1e-3
    batch_size: int = 64
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    temperature_start: float = 2.0
    temperature_end: float = 0.5
    normalize: str = "none"  # rewards in the weights: none, zscore or rank within the group
    label_smoothing: float = 0.0

    def __post_init__(self):
        _positive(self, "rce", "batch_size", "lr", "max_grad_norm", "temperature_start", "temperature_end")
        _not_negative(self, "rce", "epochs")
        _not_negative(self, "rce", "weight_decay")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"rce.label_smoothing must lie in [0, 1), found {self.label_smoothing}")
        _one_of("rce.normalize", self.normalize, ("none", "zscore", "rank"))


@dataclass(frozen=True)
class GrpoConfig:
    """Group-relative policy optimisation on the logged groups."""

    epochs: int = 50
    lr: float = 1e-4
    batch_size: int = 64
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: str = "constant"  # of the learning rate: constant; linear or cosine, to 0 at the last of `epochs`
    warmup_steps: int = 0
    patience: int = 0  # stop after so many epochs without a better val_reward; 0: never
    clip_epsilon: float = 0.2
    clip_epsilon_high: float = 0.0  # of ratios above 1; 0: as clip_epsilon
    kl_beta: float = 0.1
    kl: str = "k3"  # estimate of the KL: k1, k2, k3; on logged rollouts k1 is a drift, not a penalty
    adaptive_kl: bool = False  # β × 1.5 above KL 0.1, ÷ 1.5 below 0.01
    entropy_beta: float = 0.0  # weight of a bonus for the entropy of the picks
    advantage: str = "zscore"  # or rank
    advantage_scale: str = "group"  # what a zscore divides by: std of the group, of the batch (all groups), or none
    advantage_min_std: float = 0.1
    advantage_clip: float = 5.0
    top_k: tuple[int, ...] = ()  # keep only the k best rollouts of a group; one entry an epoch, the last for the rest
    refresh_every: int = 5  # epochs between refreshes of the old policy; 0 never
    anchor: str = "rce"  # what old and reference policy are at the start: that after RCE (rce), or before it (init)
    reference: str = "start"  # KL against the policy at GRPO's start, or against the `old` one
    dropout: str = "both"  # off; both: the same masks for old, reference and new policy; new_only: as in the lineage
    freeze_backbone: bool = False  # train the attention layers only: input_proj, query_proj, cand_proj stay
    online: bool = False  # also learn from new rollouts of the policy itself, answered by the LVLM
    online_every: int = 5  # epochs between rounds of them; each replaces the round before
    online_samples: int = 8  # for each query, in a round
    online_ratio: float = 0.5  # their share of the loss; 1: the logged rollouts are left out

    def __post_init__(self):
        _positive(self, "grpo", "batch_size", "lr", "max_grad_norm", "clip_epsilon", "advantage_clip", "online_every")
        _not_negative(self, "grpo", "epochs", "kl_beta", "refresh_every", "weight_decay", "clip_epsilon_high")
        _not_negative(self, "grpo", "entropy_beta", "patience", "warmup_steps", "advantage_min_std")
        if self.clip_epsilon >= 1:
            raise UsageError(f"grpo.clip_epsilon must lie in (0, 1), found {self.clip_epsilon}")
        if self.kl == "k1" and self.adaptive_kl:
            raise UsageError("grpo.adaptive_kl follows a KL that is never negative: not with grpo.kl=k1, take k3")
        if self.online_samples < 2:
            raise UsageError(f"grpo.online_samples must be 2 or more to compare, found {self.online_samples}")
        if not 0 < self.online_ratio <= 1:
            raise UsageError(f"grpo.online_ratio must lie in (0, 1], found {self.online_ratio}")
        if any(k < 1 for k in self.top_k):
            raise UsageError(f"grpo.top_k must hold numbers of 1 or more, found {list(self.top_k)}")
        _one_of("grpo.advantage", self.advantage, ("zscore", "rank"))
        _one_of("grpo.advantage_scale", self.advantage_scale, ("group", "batch", "none"))
        _one_of("grpo.kl", self.kl, ("k1", "k2", "k3"))
        _one_of("grpo.schedule", self.schedule, ("constant", "linear", "cosine"))
        _one_of("grpo.anchor", self.anchor, ("rce", "init"))
        _one_of("grpo.dropout", self.dropout, ("off", "both", "new_only"))
        _one_of("grpo.reference", self.reference, ("start", "old"))


@dataclass(frozen=True)
class InferConfig:
    """Which evaluation queries are answered, and how predictions are scored."""

    num_queries: int = 0  # 0: all of the evaluation split
    okvqa_stem: bool = False  # reduce predictions as OK-VQA reduced its `answer`s, before they are scored against these


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
    seed: int = 0
    device: str = "auto"  # auto: the first GPU if there is one, else the CPU
    keep: int = 0  # checkpoints to keep: so many of the latest of each phase, and the best of every strategy; 0: all

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must lie between 0 and 2**63 - 1, found {self.seed} (--seed)")
        if self.keep < 0:
            raise UsageError(f"keep must not be negative, found {self.keep} (--keep)")
        if self.rce.epochs + self.grpo.epochs == 0:
            raise UsageError("nothing to train: rce.epochs and grpo.epochs are both 0 (--rce-epochs, --grpo-epochs)")
        if self.grpo.online and self.reward.mode == "infoscore":
            raise UsageError(
                "grpo.online answers new rollouts and searches none: reward.mode=infoscore cannot score them"
            )


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{key} is {shown(value)}: expected one of {', '.join(choices)}")


def _positive(part, prefix: str, *names: str) -> None:
    for name in names:
        if getattr(part, name) <= 0:
            raise UsageError(f"{prefix}.{name} must be greater than 0, found {getattr(part, name)}")


def _check_url(key: str, url: str, example: str) -> None:
    """Raise UsageError unless it is http(s) with a host and nothing that does not belong into a config."""
    if "@" in url:  # not shown: it may be a password
        raise UsageError(f"{key} must hold no user or password: a key goes into the environment, as OPENAI_API_KEY")
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        sound = sound and url.isprintable() and " " not in url and not parts.query and not parts.fragment
    except ValueError:  # a port that is no number, a broken IPv6 address
        sound = False
    if not sound:
        raise UsageError(
            f"{key} must be the URL of a server, up to its /v1, found {shown(url, 100)}: for example {example}"
        )


def _not_negative(part, prefix: str, *names: str) -> None:
    for name in names:
        if getattr(part, name) < 0:
            raise UsageError(f"{prefix}.{name} must not be negative, found {getattr(part, name)}")


def to_dict(config) -> dict:
    """Plain nested values of a config or of a part of it, as YAML and JSON hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
