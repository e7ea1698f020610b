"""Every setting of a run: one dataclass, with YAML files laid over it, and `key=value` arguments over those.

An unknown key, or a value of the wrong type or range, is an error that says what to write instead. "Not in
the paper" marks a choice that the paper leaves open; the default is then that of verl, the framework that the
authors used, unless the comment gives another reason.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import operator
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from prompts import TextFormat
from rewards import WEIGHTS, checked_weights
from runtime.files import ConfigError, read_yaml, write_whole


@dataclass
class Sft:
    """Supervised fine-tuning on the true answers, before the reinforcement learning (Table 5, "SFT")."""

    steps: int = 0  # optimiser steps; 0 leaves it out, as the paper does
    learning_rate: float = 1e-5  # not in the paper
    batch_size: int = 32  # prompts per optimiser step; not in the paper


@dataclass
class Lora:
    """Low-rank adapters instead of all weights; needs peft. Not in the paper, which trains all weights."""

    rank: int = 0  # 0: train all weights
    alpha: float = 32.0  # the adapters' product is scaled by alpha / rank
    # names of the language model's linear layers that get an adapter
    targets: list = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class Config:
    # --- what is trained, on what, into which folder
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # checkpoint folder or hub id (section 4)
    dataset: str = "hcstvg"  # format of the annotations: hcstvg | vidstg | jsonl (docs/data.md)
    train_annotations: str = ""  # annotation file of the training split; jsonl: FILE or FILE:SPLIT
    eval_annotations: str = ""  # annotation file of the held-out split
    videos: str = ""  # folder of the video files
    vidor: str = ""  # folder of the VidOR tracks (vidstg only)
    output_dir: str = "runs/default"
    seed: int = 0  # of sampling and of the order of the data
    toy: bool = False  # make the toy world in `videos` first, if it is not there

    # --- what the model sees and writes (section 4)
    fps: float = 2.0  # frames per second
    max_side: int = 336  # pixels: the longer side of a frame is at most this
    time_unit: str = "frame"  # a step of the answer: frame (1 / fps seconds) | second. Not in the paper
    coordinates: str = "norm1000"  # of the boxes in the text: norm1000 | resized | original. Not in the paper
    think: bool = True  # False: no <think_bbox>, the row "RFT" of Table 5

    # --- how the videos are read; none of these changes a frame
    on_bad_video: str = "error"  # error | skip: leave its sentences out of training, count them as failures
    video_workers: int = 2  # processes that read ahead of the model; 0: read in this process, unguarded
    video_timeout: float = 60.0  # seconds for one clip, after which its process is killed
    frame_cache: str = ""  # folder for frames as the model sees them; empty: decode them each time
    frame_cache_gb: float = 50.0  # largest size of that folder

    # --- the rewards: weights of Eq. 10, of the two parts of the spatial reward (Eq. 8: giou, l1), and of
    # your own, named FILE.py:FUNCTION
    rewards: dict = field(default_factory=lambda: dict(WEIGHTS))

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
    steps: int = 1000  # optimiser steps. Not in the paper
    learning_rate: float = 1e-6
    warmup_steps: int = 0  # of linear warm-up, then constant. Not in the paper
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0  # not in the paper
    freeze_vision: bool = False  # do not train the vision tower; each video is then encoded once
    lora: Lora = field(default_factory=Lora)
    sft: Sft = field(default_factory=Sft)
    precision: str = "bf16"  # of the arithmetic: bf16 | fp32. Weights that are trained are kept in fp32

    # --- how it runs; none of these changes what is learned, except for rounding
    rollout_batch: int = 4  # prompts whose answers are sampled together
    micro_batch: int = 1  # prompts whose answers are scored and trained on together
    reuse_prompts: bool = False  # the update reuses the rollout's work on the prompts: faster, more memory
    # exchange gradients among ranks in the last backward pass of a step, or in every one: last | every. The
    # first communicates less, and takes 4 * (1 - 1 / ranks) bytes a parameter more on every GPU
    sync_gradients: str = "last"
    gradient_checkpointing: bool = True  # recompute activations in the backward pass (python -m lab.memory)
    threads: int = 0  # CPU threads; 0: torch decides
    eval_every: int = 0  # steps between evaluations on the held-out split; 0: only before and after
    eval_batch: int = 8  # sentences that are answered together
    eval_temperature: float = 0.0  # 0: greedy, as in every table
    eval_limit: int = 0  # evaluate at most this many sentences; 0: all
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # how many of these to keep; the best by m_vIoU (eval_every) is kept too
    resume: str = "never"  # never | auto: resume from the last checkpoint in output_dir, if there is one
    log_to: list = field(default_factory=list)  # of tensorboard, wandb: beside metrics.jsonl

    @property
    def text_format(self) -> TextFormat:
        return TextFormat(self.coordinates, self.time_unit, self.think, self.fps)


DTYPES = {"bf16": "bfloat16", "fp32": "float32"}  # precision -> its name in torch
CHOICES = {
    "dataset": ("hcstvg", "vidstg", "jsonl"),
    "on_bad_video": ("error", "skip"),
    "precision": tuple(DTYPES),
    "resume": ("never", "auto"),
    "sync_gradients": ("last", "every"),
    "loss_aggregation": ("token-mean", "sequence-mean", "constant"),
}
PLACES = ("model", "train_annotations", "eval_annotations", "videos", "vidor", "output_dir", "frame_cache")
POSITIVE = ("temperature", "max_grad_norm", "video_timeout", "lora.alpha")
AT_LEAST = {
    0: "steps warmup_steps threads eval_every eval_limit save_every seed kl_beta clip_eps learning_rate"
    " weight_decay eval_temperature video_workers frame_cache_gb sft.steps sft.learning_rate lora.rank",
    1: "max_side max_new_tokens batch_size rollout_batch micro_batch eval_batch updates_per_batch"
    " keep_checkpoints sft.batch_size",
    2: "num_generations",
}


def load_config(paths: str | Path | list[str], overrides: list[str] = ()) -> Config:
    """Read a YAML file, lay others over it (such as configs/ablations/), and `key=value` settings over those.

    `rewards.think=1.0` sets a nested key. ~ in a path is the home folder. A file after the first that does
    not set output_dir adds its name to it, as in runs/toy_l1_only. Raises ConfigError, which names the file
    or the command line; each must be right with what lies beneath it.
    """
    config = Config()
    for n, path in enumerate(map(Path, [paths] if isinstance(paths, str | Path) else paths)):
        settings = read_yaml(path)
        config = _overlay(config, settings, str(path))
        _check(config, str(path))
        if n and "output_dir" not in settings:
            config.output_dir += f"_{path.stem}"
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r}: settings on the command line are written key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        key, dot, part = key.partition(".")  # rewards.FILE.py:FUNCTION has more dots
        config = _overlay(config, {key: {part: value} if dot else value}, "command line")
    for key in PLACES:  # ~/clips
        setattr(config, key, os.path.expanduser(getattr(config, key)))
    _check(config, "command line")
    return config


def command_line(words: list[str], usage: str) -> Config:
    """The settings of train.py's command line: YAML files (none: configs/toy.yaml), and key=value over them.
    Prints the usage and exits on --help. Raises ConfigError."""
    if {"-h", "--help"} & set(words):
        print(usage.strip())
        sys.exit()
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"{word}: no such option; settings are written key=value")
    files = [word for word in words if "=" not in word]
    default = Path(__file__).parent / "configs/toy.yaml"
    return load_config(files or default, [word for word in words if "=" in word])


def check_words(words: list[str]) -> None:
    """Raise ConfigError for a wrong YAML file or key=value setting among the words of a command line."""
    settings = [word for word in words if re.match(r"[a-z_]+(\.\S+)?=", word)]
    load_config([word for word in words if word.endswith((".yaml", ".yml"))], settings)


def save_config(config: Config, path: str | Path) -> None:
    """Write every setting, so that the file alone repeats the run. Raises OSError."""
    write_whole(Path(path), yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).encode())


def _overlay(base, settings: dict, where: str, prefix: str = ""):
    """A dataclass with some settings replaced. Raises ConfigError for an unknown key and a wrong type."""
    kinds = {f.name: f.type for f in dataclasses.fields(base)}
    values = {}
    for key, value in settings.items():
        if key not in kinds:
            close = difflib.get_close_matches(str(key), kinds, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"the keys are {', '.join(kinds)}"
            raise ConfigError(f"{where}: unknown key {prefix}{key}; {hint}")
        if kinds[key] in (Sft, Lora) and isinstance(value, dict):
            values[key] = _overlay(getattr(base, key), value, where, prefix=f"{key}.")
        elif key == "rewards":
            values[key] = base.rewards | checked_weights(value, where)
        else:
            values[key] = _typed(prefix + key, value, kinds[key], where)
    return dataclasses.replace(base, **values)


def _typed(key: str, value, kind: type, where: str):
    """The value in the type of its field, where YAML allows it to be written so. Raises ConfigError."""
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 1e-6 as text, since it has no point
    if kind is str and value is None:
        return ""
    if kind is list and isinstance(value, str):
        value = [value]
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
        names[list] = "a list of names, such as [a, b]"
        wanted = (
            f"one of {', '.join(CHOICES[key])}" if key in CHOICES else names.get(kind, "`key: value` lines")
        )
        raise ConfigError(f"{where}: {key}: {value!r} must be {wanted}")
    return value


def _check(config: Config, where: str) -> None:
    """Raise ConfigError for values out of range, and for settings that contradict one another."""

    def require(key: str, is_good, wanted: str) -> None:
        section, dot, name = key.rpartition(".")
        value = getattr(getattr(config, section) if dot else config, name)
        if not is_good(value):
            raise ConfigError(f"{where}: {key}: {value!r} must be {wanted}")

    for key, choices in CHOICES.items():
        require(key, choices.__contains__, f"one of {', '.join(choices)}")
    for least, keys in AT_LEAST.items():
        for key in keys.split():
            require(key, functools.partial(operator.le, least), f"at least {least}")
    for key in POSITIVE:
        require(key, lambda value: value > 0, "above 0")
    require("fps", lambda value: 0.01 <= value <= 60, "from 0.01 to 60")
    require("log_to", {"tensorboard", "wandb"}.issuperset, "some of tensorboard, wandb")
    require("lora.targets", lambda names: names and all(isinstance(n, str) for n in names), "a list of names")
    annotations = [Path(path).parent for path in (config.train_annotations, config.eval_annotations)]
    if config.toy and any(folder != Path(config.videos) for folder in annotations):
        raise ConfigError(
            f"{where}: toy is true, which makes videos, train_annotations and eval_annotations in one folder;"
            " set it to false for files of your own"
        )
    try:
        _ = config.text_format
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
