"""How weights, runs and checkpoints are recognised: by content and settings, not by the names of files (but
for those of rewards of one's own, whose names are settings)."""

import dataclasses
import hashlib
from pathlib import Path

from config import Config
from qwen.lora import SETTINGS, base_of
from runtime.plugins import plugin_fingerprints
from samples import Sample

MAY_CHANGE = {  # settings that may change when a run goes on: nothing that is learned depends on them
    # where things are; what is in them is compared by fingerprints
    *("model", "train_annotations", "videos", "vidor", "output_dir", "toy"),
    # how videos are read. on_bad_video, too: `skip` is how to go on after a run that has stopped at one
    *("on_bad_video", "video_workers", "video_timeout", "frame_cache", "frame_cache_gb"),
    # when it ends, what is watched, kept and told
    *("steps", "eval_annotations", "eval_every", "eval_batch", "save_every"),
    *("keep_checkpoints", "resume", "log_to"),
    # how a step is split up: the same sums, but for rounding
    *("rollout_batch", "micro_batch", "reuse_prompts", "decode_block", "static_shapes"),
    *("sync_gradients", "gradient_checkpointing", "threads"),
}


def weights_fingerprint(checkpoint: str) -> str:
    """A short mark of the weights in a checkpoint folder, with those of the base where it holds adapters. A
    hub id is its own."""
    folder, base = Path(checkpoint), base_of(checkpoint)
    paths = [path for kind in ("*.safetensors", "*.bin", SETTINGS) for path in folder.glob(kind)]
    if not paths:
        return checkpoint
    pieces = [(path.name, _pieces(path)) for path in sorted(paths)]
    pieces += [weights_fingerprint(base)] if base != checkpoint else []
    return hashlib.sha256(repr(pieces).encode()).hexdigest()[:12]


def _pieces(path: Path, size: int = 65536) -> str:
    """A hash of a file's length and of a piece in each quarter: enough to tell weights apart, for training
    changes them all, or at least the language model's, and done in no time. (A date would change with a
    copy.)"""
    length = path.stat().st_size
    with path.open("rb") as file:
        pieces = [str(length).encode()]
        for place in (length // 4, length // 2, length * 3 // 4, length - size):
            file.seek(max(0, place))
            pieces.append(file.read(size))
    return hashlib.sha256(b"".join(pieces)).hexdigest()


def fingerprints(config: Config, samples: list[Sample]) -> dict:
    """What must stay the same when a run goes on: settings that are not MAY_CHANGE, the weights it began
    with, the sentences and boxes (of both splits: samples); by content, for files may be moved."""
    data = hashlib.sha256()
    for sample in samples:
        values = {key: value for key, value in vars(sample).items() if key not in ("video", "boxes")}
        data.update(repr((values, sample.boxes.first)).encode())
        data.update(sample.boxes.array.tobytes())
    return {
        "settings": settings_of(config),
        "model": weights_fingerprint(config.model),
        "data": data.hexdigest()[:12],
    }


def settings_of(config: Config) -> dict:
    """Those that are not MAY_CHANGE, by dotted names such as sft.steps, and what is in the files that they
    name."""
    settings = {}
    for key, value in dataclasses.asdict(config).items():
        parts = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {}
        settings |= {} if key in MAY_CHANGE else parts or {key: value}
    return settings | {f"rewards.{path}": mark for path, mark in plugin_fingerprints(config.rewards).items()}
