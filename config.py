"""The settings of a run: one commented dataclass; a YAML file over it; over that `key=value` arguments.

A key that is not a field, or a value of the wrong type or range, is an error that says what to write instead.
"Not in the paper" marks a choice that the paper leaves open; what is taken then is the default of verl, the
framework that the authors used, unless the comment gives another reason.
"""

import contextlib
import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from prompts import TextFormat
from rewards import check_weights
from runtime.files import UserError, write_whole


class ConfigError(UserError):
    """A setting that cannot be used; the message names the file, the key, the value and the remedy."""


@dataclass
class Sft:
    """Supervised fine-tuning on the true answers, before the reinforcement learning (Table 5, "SFT")."""

    steps: int = 0  # optimiser steps; 0 leaves the phase out, as the paper does
    learning_rate: float = 1e-5  # not in the paper
    batch_size: int = 32  # prompts per optimiser step; not in the paper


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Lora:
    """Low-rank adapters instead of all weights: needs peft. Not in the paper, which trains all weights."""

    rank: int = 0  # 0: none, all weights are trained
    alpha: float = 32.0  # their product is scaled by alpha / rank
    # linear layers of the language model, by name, that get one
    targets: list = field(default_factory=lambda: [*ATTENTION, *MLP])


@dataclass
class Config:
    # --- what is trained, on what, into where
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # checkpoint folder or hub id (section 4)
    dataset: str = "hcstvg"  # format of the annotations: hcstvg | vidstg
    train_annotations: str = ""  # annotation file of the training split
    eval_annotations: str = ""  # annotation file of the held-out split
    videos: str = ""  # folder of the video files
    vidor: str = ""  # folder of the VidOR tracks (vidstg only)
    output_dir: str = "runs/default"
    seed: int = 0  # of sampling and of the order of the data
    toy: bool = False  # make the toy world first where `videos` does not hold it yet

    # --- what the model sees and says (section 4)
    fps: float = 2.0  # frames per second
    max_side: int = 336  # pixels: the longer side of a frame is at most this
    time_unit: str = "frame"  # a step of the answer: frame (1 / fps seconds) | second. Not in the paper
    # of the boxes in the text: norm1000 | resized | original (relative: in csv only). Not in the paper
    coordinates: str = "norm1000"
    answer_format: str = "boxes"  # boxes | csv: the paper's for closed models (Fig. 8), to evaluate only
    think: bool = True  # False: no <think_bbox>, the row "RFT" of Table 5

    # --- how the videos are read; none of these changes a frame
    on_bad_video: str = "error"  # error | skip: leave its sentences out of training, count them as failures
    video_workers: int = 2  # processes that read ahead of the model; 0: in this one, unguarded
    video_timeout: float = 60.0  # seconds for one clip, after which its decoder is stopped
    frame_cache: str = ""  # folder for frames as the model sees them; empty: decoded anew each time
    frame_cache_gb: float = 50.0  # of files in that folder at most

    # --- the rewards: weights of Eq. 10, of the two parts of the spatial reward (Eq. 8) and of its guards
    # (rewards.WEIGHTS), and FILE.py:FUNCTION of your own
    rewards: dict = field(default_factory=lambda: check_weights({}))

    # --- the optimisation (section 3.3)
    num_generations: int = 8  # G: answers sampled per prompt
    scale_rewards: bool = True  # divide advantages by the standard deviation of the group (Eq. 11)
    temperature: float = 1.0  # of sampling and scoring. Not in the paper
    max_new_tokens: int = 2048  # not in the paper; a box costs about 22 tokens and every step has two
    kl_beta: float = 0.01  # of the KL to the frozen reference (Eq. 12); 0 needs none. Not in the paper
    clip_eps: float = 0.2  # probability ratios are clipped to 1 +- this (Eq. 12). Not in the paper
    updates_per_batch: int = 1  # optimiser steps on one batch; with 1 the ratio is 1. Not in the paper
    loss_aggregation: str = "token-mean"  # token-mean | sequence-mean | constant (grpo.py). Not in the paper
    batch_size: int = 128  # prompts per optimiser step
    steps: int = 1000  # optimiser steps of reinforcement learning. Not in the paper
    learning_rate: float = 1e-6
    warmup_steps: int = 0  # of linear warm-up, then constant. Not in the paper
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0  # not in the paper
    freeze_vision: bool = False  # leave the vision tower as it is; each video is then encoded once
    lora: Lora = field(default_factory=Lora)
    sft: Sft = field(default_factory=Sft)
    precision: str = "bf16"  # of the arithmetic: bf16 | fp32. Weights that are trained are kept in fp32

    # --- how it runs; nothing that is learned depends on it, but for rounding
    rollout_batch: int = 4  # prompts whose answers are sampled in one batch
    micro_batch: int = 1  # prompts whose answers are scored, and learnt from, in one pass
    # keep what a rollout made of its prompts, activations included, for the update: one pass over them less,
    # but the activations of all of a rank's prompts of a step are there at once
    reuse_prompts: bool = False
    decode_block: int = 8  # tokens after which, each time, answers that have ended leave their batch
    # they stay, and no shape changes: slower by itself, for who compiles or records model._next_logits
    static_shapes: bool = False
    # of a step's backward passes, how many exchange gradients among ranks: the last | every. The last alone
    # communicates less and takes 4 * (1 - 1 / ranks) bytes a parameter more on every GPU
    sync_gradients: str = "last"
    gradient_checkpointing: bool = True  # recompute activations: 7B keeps a fifteenth of them (plan.py)
    threads: int = 0  # CPU threads; 0 leaves the choice to torch
    eval_every: int = 0  # steps between evaluations on the held-out split; 0: only before and after
    eval_batch: int = 8  # sentences that are answered in one batch
    eval_temperature: float = 0.0  # 0: greedy, as in every table
    eval_limit: int = 0  # evaluate at most this many sentences; 0: all
    save_every: int = 0  # steps between checkpoints; 0: only the last
    keep_checkpoints: int = (
        2  # of these checkpoints the last so many stay; the best by m_vIoU (eval_every) stays, too
    )
    resume: str = "never"  # never | auto: go on from the last checkpoint in output_dir, if there is one
    log_to: list = field(default_factory=list)  # of tensorboard, wandb: beside metrics.jsonl

    @property
    def text_format(self) -> TextFormat:
        return TextFormat(self.coordinates, self.time_unit, self.think, self.fps, self.answer_format)


class _Loader(yaml.SafeLoader):
    """YAML forbids a key that stands twice; PyYAML keeps the last one and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key} stands there twice; keep one")
        return super().construct_mapping(node, deep)


def load_config(paths: str | Path | list[str], overrides: list[str] = ()) -> Config:
    """Read a YAML file, lay others over it, such as configs/ablations/, and over that `key=value` settings
    (`rewards.think=1.0` for a nested key). Raises ConfigError that names the file, or the command line, which
    must be right by itself upon what lies beneath.

    A file after the first that does not set output_dir adds its name to it, as in runs/toy_l1_only.
    """
    first, *others = [paths] if isinstance(paths, str | Path) else paths
    config = _fill(Config, _read(Path(first)), str(first))
    _check(config, str(first))
    for path in map(Path, others):
        settings = _read(path)
        config = _fill(Config, _merge(dataclasses.asdict(config), settings), str(path))
        _check(config, str(path))
        if "output_dir" not in settings:
            config.output_dir += f"_{path.stem}"
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r}: settings on the command line are written key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        key, dot, part = key.partition(".")  # rewards.FILE.py:FUNCTION has more of them
        nested = {key: {part: value} if dot else value}
        config = _fill(Config, _merge(dataclasses.asdict(config), nested), "command line")
    _check(config, "command line")
    return config


def _read(path: Path) -> dict:
    """The settings that stand in a YAML file. Raises ConfigError."""
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); name a YAML file such as configs/toy.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: must hold `key: value` lines, not {type(settings).__name__}")
    return settings


def save_config(config: Config, path: str | Path) -> None:
    """Write every setting, so that the file alone repeats the run. Raises OSError as write_whole does."""
    write_whole(Path(path), yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).encode())


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _fill(kind: type, settings: dict, where: str, prefix: str = ""):
    """A dataclass of the given kind from plain settings; unknown keys and wrong types are errors."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for key, value in settings.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"the keys are {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {prefix}{key}; {hint}")
        values[key] = _typed(prefix + key, value, fields[key].type, where)
    return kind(**values)


def _typed(key: str, value, kind: type, where: str):
    if kind in (Sft, Lora) and isinstance(value, dict):
        return _fill(kind, value, where, prefix=f"{key}.")
    if kind is list:
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{where}: {key}: {value!r} must be a list of names, such as [a, b]")
        return names
    if kind is dict and isinstance(value, dict):
        try:
            return check_weights(value)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None  # it names the key
    if kind is float and isinstance(value, str):  # YAML reads 1e-6 as text, since it has no point
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {key}: {value!r} must be a finite number")
    if kind is str and value is None:
        return ""
    if type(value) is not kind:
        if key in CHOICES:
            raise ConfigError(f"{where}: {key}: {value!r} is not one of {', '.join(CHOICES[key])}")
        if kind in (Sft, Lora):
            example = dataclasses.fields(kind)[0].name
            raise ConfigError(f"{where}: {key}: {value!r} has parts; write {key}.{example}=..., for example")
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ConfigError(f"{where}: {key}: {value!r} must be {names.get(kind, 'key: value lines')}")
    return value


DTYPES = {"bf16": "bfloat16", "fp32": "float32"}  # precision -> its name in torch
CHOICES = {
    "dataset": ("hcstvg", "vidstg"),
    "on_bad_video": ("error", "skip"),
    "precision": tuple(DTYPES),
    "resume": ("never", "auto"),
    "sync_gradients": ("last", "every"),
    "loss_aggregation": ("token-mean", "sequence-mean", "constant"),
}
AT_LEAST = {
    **dict.fromkeys(
        (
            "max_side",
            "max_new_tokens",
            "batch_size",
            "rollout_batch",
            "micro_batch",
            "decode_block",
            "eval_batch",
            "updates_per_batch",
        ),
        1,
    ),
    **dict.fromkeys(
        ("steps", "warmup_steps", "threads", "eval_every", "eval_limit", "save_every", "seed"), 0
    ),
    **dict.fromkeys(("kl_beta", "clip_eps", "learning_rate", "weight_decay", "eval_temperature"), 0),
    **dict.fromkeys(("video_workers", "frame_cache_gb"), 0),
    "num_generations": 2,
    "keep_checkpoints": 1,
}


def _check(config: Config, where: str) -> None:
    """Ranges, and settings that contradict one another."""
    for key, choices in CHOICES.items():
        if getattr(config, key) not in choices:
            raise ConfigError(f"{where}: {key}: {getattr(config, key)!r} is not one of {', '.join(choices)}")
    for key, least in AT_LEAST.items():
        if not getattr(config, key) >= least:
            raise ConfigError(f"{where}: {key}: {getattr(config, key)!r} must be at least {least}")
    for key in ("temperature", "max_grad_norm", "video_timeout"):
        if not getattr(config, key) > 0:
            raise ConfigError(f"{where}: {key}: {getattr(config, key)!r} must be above 0")
    if config.sft.steps < 0 or config.sft.batch_size < 1 or config.sft.learning_rate < 0:
        raise ConfigError(f"{where}: sft: {config.sft} needs steps >= 0, batch_size >= 1, learning_rate >= 0")
    if config.lora.rank < 0 or not config.lora.alpha > 0 or not config.lora.targets:
        raise ConfigError(f"{where}: lora: {config.lora} needs rank >= 0, alpha > 0 and targets")
    unknown = [name for name in config.log_to if name not in ("tensorboard", "wandb")]
    if unknown:
        raise ConfigError(f"{where}: log_to: {unknown[0]!r} is not one of tensorboard, wandb")
    annotations = (config.train_annotations, config.eval_annotations)
    if config.toy and any(Path(path).parent != Path(config.videos) for path in annotations):
        raise ConfigError(
            f"{where}: toy: true makes videos, train_annotations and eval_annotations in one folder; write"
            " toy: false for files of your own"
        )
    try:
        _ = config.text_format
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
