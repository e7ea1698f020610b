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
from runtime.files import DataError, read_jsonl, write_jsonl
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


def rank_file(path: Path, rank: int) -> Path:
    """The file to which a rank appends, without a last line that a kill has cut short. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
    if part.exists():
        write_jsonl(read_jsonl(part, "id", skip_cut=True), part)
    return part


def rank_files(path: Path) -> list[Path]:
    """The files that the ranks of this evaluation, or of one that was stopped, have left beside `path`."""
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.rank*{path.suffix}"))


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


def missing_samples(path: Path, samples: list[Sample], fingerprint: str) -> list[tuple[int, Sample]]:
    """The samples without an answer, each with its number. An unreadable video is tried again."""
    done = {key for key, record in saved_answers(path, fingerprint).items() if "unreadable" not in record}
    return [(n, sample) for n, sample in enumerate(samples) if sample.id not in done]


def merge_rank_files(path: Path, samples: list[Sample], fingerprint: str) -> list[dict]:
    """The records of the samples, in order, on every rank. Leaves them in `path`, and removes the ranks'
    files. For all ranks to call, once all have written."""
    done = saved_answers(path, fingerprint)
    distributed.barrier()  # every rank has read the files before they go
    records = [done.pop(sample.id) for sample in samples]
    if distributed.init()[0] == 0 and rank_files(path):
        write_jsonl([*records, *done.values()], path)  # the latter are beyond eval_limit
        for part in rank_files(path):
            part.unlink()
    distributed.barrier()
    return records


def path_for_answers(wanted: Path, fingerprint: str) -> Path:
    """`wanted`, or NAME.FINGERPRINT.jsonl beside it if `wanted` holds answers made in another way."""
    own = all(record.get("fingerprint") == fingerprint for record in saved_records(wanted))
    return wanted if own else wanted.with_stem(f"{wanted.stem}.{fingerprint}")


def fingerprint_of(checkpoint: str, config: Config, control: str = "") -> str:
    """Stands for all that an answer depends on: weights, annotations, settings, files of plug-in rewards, and
    the control that replaced the frames (lab/controls.py)."""
    annotations = hashlib.sha256(Path(config.eval_annotations).read_bytes()).hexdigest()
    names = ("dataset", "seed", "rewards", "max_new_tokens", "eval_temperature", "max_side", "precision")
    parts = [weights_fingerprint(checkpoint), annotations, [getattr(config, name) for name in names]]
    parts += [dataclasses.asdict(config.text_format), plugin_fingerprints(config.rewards), control]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
