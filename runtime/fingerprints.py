"""Fingerprints of settings, weights and data: is it the same run, are answers of the same model?"""

import dataclasses
import hashlib
from pathlib import Path

from config import Config
from runtime.files import get, read_json
from runtime.plugins import plugin_fingerprints
from samples import Sample

MAY_CHANGE = {  # settings that a resumed run may change: what is learned does not depend on them
    # where things are; their contents are compared by fingerprints
    *("model", "train_annotations", "eval_annotations", "videos", "vidor", "output_dir", "toy"),
    # how videos are read; on_bad_video, too: a run that stopped at a bad video may go on with `skip`
    *("on_bad_video", "video_workers", "video_timeout", "frame_cache", "frame_cache_gb"),
    # when the run ends, what is evaluated, kept and shown
    *("steps", "eval_every", "eval_batch", "save_every", "keep_checkpoints", "resume", "log_to"),
    # how a step is split up: the same sums, up to rounding
    *("rollout_batch", "micro_batch", "reuse_prompts", "sync_gradients", "gradient_checkpointing", "threads"),
}


def fingerprints(config: Config, samples: list[Sample]) -> dict:
    """What a resumed run must have kept: its settings (all but MAY_CHANGE), the weights it began with, and
    the sentences and boxes of both splits (samples). By content, for files may move."""
    data = hashlib.sha256()
    for sample in samples:
        values = {key: value for key, value in vars(sample).items() if key not in ("video", "boxes")}
        data.update(repr((values, sample.boxes.first)).encode())
        data.update(sample.boxes.array.tobytes())
    weights = weights_fingerprint(config.model)
    return {"settings": settings_of(config), "model": weights, "data": data.hexdigest()[:12]}


def settings_of(config: Config) -> dict:
    """The settings that must not change, by dotted names such as sft.steps, and the text of plug-in files."""
    settings = {}
    for key, value in dataclasses.asdict(config).items():
        parts = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {}
        settings |= {} if key in MAY_CHANGE else parts or {key: value}
    return settings | {f"rewards.{path}": text for path, text in plugin_fingerprints(config.rewards).items()}


def weights_fingerprint(checkpoint: str) -> str:
    """The fingerprint of the weights in a folder, with those of the base of adapters. A hub id is its own.

    A file counts by its length and a piece of each quarter: that takes no time, and training changes all
    weights, or at least all of the language model's. A date would change with a copy.
    """
    folder, pieces = Path(checkpoint), []
    adapters = folder / "adapter_config.json"
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob(adapters.name)]):
        length, size = path.stat().st_size, 65536
        with path.open("rb") as file:
            parts = [str(length).encode()]
            for place in (length // 4, length // 2, length * 3 // 4, length - size):
                file.seek(max(0, place))
                parts.append(file.read(size))
        pieces.append((path.name, hashlib.sha256(b"".join(parts)).hexdigest()))
    if adapters.is_file():
        base = str(get(str(adapters), read_json(adapters), "base_model_name_or_path"))
        again = (Path(base) / adapters.name).is_file()  # which load_policy refuses
        pieces.append(base if again else weights_fingerprint(base))
    return hashlib.sha256(repr(pieces).encode()).hexdigest()[:12] if pieces else checkpoint
