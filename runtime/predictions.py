"""Files of answers, such as predictions.jsonl: one JSON object a line, made by evaluate.answer_batch.

The "fingerprint" of a line stands for all that the answer depends on, so that answers made in different ways
are never mixed. While ranks decode, each appends to its own file, such as predictions.rank0.jsonl.
"""

import dataclasses
import glob
import hashlib
import json
from pathlib import Path

from config import Config
from runtime import distributed
from runtime.files import DataError, file_and_split, read_jsonl, write_jsonl
from runtime.fingerprints import weights_fingerprint
from runtime.plugins import plugin_fingerprints
from samples import Sample


def read_predictions(path: Path) -> list[dict]:
    """Saved answers, each id once. Raises DataError that names the file and the line."""
    predictions = read_jsonl(path, "id", "completion")
    lines: dict[str, int] = {}
    for number, prediction in enumerate(predictions, 1):
        key = prediction["id"]
        if not (isinstance(key, str) and isinstance(prediction["completion"], str)):
            raise DataError(f'{path}, line {number}: "id" and "completion" must be texts; correct the line')
        if key in lines:
            raise DataError(f"{path}, line {number}: {key!r} is answered in line {lines[key]}; keep one")
        lines[key] = number
    return predictions


def rank_file(path: Path, rank: int | str) -> Path:
    """The file beside `path` to which a rank appends."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def rank_files(path: Path) -> list[Path]:
    """Those that the ranks of this evaluation, or of one that was stopped, have left."""
    return sorted(path.parent.glob(rank_file(Path(glob.escape(path.name)), "*").name))


def saved_records(path: Path) -> list[dict]:
    """All lines of a file of answers and of the ranks' files beside it. Raises DataError."""
    paths = [path] * path.exists() + rank_files(path)
    return [record for part in paths for record in read_jsonl(part, "id", "completion", skip_cut=True)]


def saved_answers(path: Path, fingerprint: str) -> dict[str, dict]:
    """id -> record, of the answers made in this way. A video that could not be read may be readable by now:
    of two records of a sentence an "unreadable" one never counts."""
    records = [record for record in saved_records(path) if record.get("fingerprint") == fingerprint]
    records.sort(key=lambda record: "unreadable" not in record)
    return {record["id"]: record for record in records}


def missing_samples(samples: list[Sample], done: dict[str, dict]) -> list[tuple[int, Sample]]:
    """The samples that `done` does not answer, each with its number. Unreadable videos are tried again."""
    answered = {key for key, record in done.items() if "unreadable" not in record}
    return [(n, sample) for n, sample in enumerate(samples) if sample.id not in answered]


def merge_rank_files(path: Path, samples: list[Sample], fingerprint: str) -> dict[str, dict]:
    """saved_answers, which are then all in `path`, in the order of the samples. All ranks must call it."""
    done = saved_answers(path, fingerprint)
    distributed.barrier()  # every rank has read the files before they go
    if distributed.init()[0] == 0 and rank_files(path):
        order = {sample.id: n for n, sample in enumerate(samples)}  # others, beyond eval_limit, come last
        write_jsonl(sorted(done.values(), key=lambda record: order.get(record["id"], len(order))), path)
        for part in rank_files(path):
            part.unlink()
    distributed.barrier()
    return done


def path_for_answers(wanted: Path, fingerprint: str) -> Path:
    """`wanted`, or NAME.FINGERPRINT.jsonl beside it if `wanted` holds answers made in another way."""
    own = all(record.get("fingerprint") == fingerprint for record in saved_records(wanted))
    return wanted if own else wanted.with_stem(f"{wanted.stem}.{fingerprint}")


def fingerprint_of(checkpoint: str, config: Config, control: str = "") -> str:
    """Stands for all that an answer depends on: weights, annotations, settings, files of plug-in rewards, and
    the control that replaced the frames (lab/controls.py)."""
    file, split = file_and_split(config.eval_annotations)
    annotations = hashlib.sha256(Path(file).read_bytes() + split.encode()).hexdigest()
    names = ("dataset", "seed", "rewards", "max_new_tokens", "eval_temperature", "max_side", "precision")
    parts = [weights_fingerprint(checkpoint), annotations, [getattr(config, name) for name in names]]
    parts += [dataclasses.asdict(config.text_format), plugin_fingerprints(config.rewards), control]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
