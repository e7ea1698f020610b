"""Files of answers, such as predictions.jsonl: read, recognised, and put together from those of many ranks.

A record is made by evaluate.prediction; its "fingerprint" says how the answer came about. While ranks decode,
each adds to a file of its own beside the wanted one, predictions.rank0.jsonl for predictions.jsonl.
"""

import dataclasses
import errno
import glob
import hashlib
import itertools
import json
import os
from pathlib import Path

from config import Config
from runtime import distributed
from runtime.files import DataError, read_jsonl, write_jsonl
from runtime.fingerprints import weights_fingerprint
from runtime.plugins import plugin_fingerprints
from samples import Sample


def read_predictions(path: Path) -> list[dict]:
    """Saved answers, at most one for each id. Raises DataError that names the file and the line."""
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


def gather_answers(output: Path, samples: list[Sample], fingerprint: str) -> list[dict]:
    """The records of the samples, in order, when all ranks are here; from then on they are in `output`, and
    the ranks' files are gone."""
    rank, _ = distributed.init()
    distributed.barrier()
    done = {r["id"]: r for r in saved_answers(output) if r.get("fingerprint") == fingerprint}
    distributed.barrier()  # all ranks must have read before the parts go
    if rank == 0 and rank_files(output):
        order = {sample.id: n for n, sample in enumerate(samples)}
        write_jsonl(sorted(done.values(), key=lambda r: order.get(r["id"], len(order))), output)
        for path in rank_files(output):
            path.unlink()
    distributed.barrier()
    return [done[sample.id] for sample in samples]


def rank_files(output: Path) -> list[Path]:
    """What the ranks of this run, or of one that was stopped, have put beside a file of answers."""
    return sorted(output.parent.glob(f"{glob.escape(output.stem)}.rank*{output.suffix}"))


def saved_answers(output: Path) -> list[dict]:
    """The records in a file of answers and in the ranks' files beside it. Raises DataError."""
    paths = [output] * output.exists() + rank_files(output)
    records = [record for path in paths for record in read_jsonl(path, "id", "completion", skip_cut=True)]
    if not all(isinstance(record["id"], str) for record in records):
        raise DataError(f'{output}: not every "id" in it is a text; choose another --output')
    return records


def answered(output: Path, fingerprint: str) -> dict[str, dict]:
    """id -> record of what need not be decoded again; a video that could not be read may be there by now."""
    records = [r for r in saved_answers(output) if r.get("fingerprint") == fingerprint]
    return {record["id"]: record for record in records if "unreadable" not in record}


def fingerprint_of(checkpoint: str, config: Config, control: str | None = None) -> str:
    """A short mark of all that an answer depends on: the weights, the annotations, the settings, the files of
    one's own rewards, and the control (controls.py), if it is one's answer."""
    asked = hashlib.sha256(Path(config.eval_annotations).read_bytes()).hexdigest()
    names = ("dataset", "seed", "rewards", "max_new_tokens", "eval_temperature", "max_side", "precision")
    settings = [getattr(config, name) for name in names]
    more = [value for value in (plugin_fingerprints(config.rewards), control) if value]
    text = json.dumps(
        [weights_fingerprint(checkpoint), asked, settings, dataclasses.asdict(config.text_format), *more],
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def place_for_answers(wanted: Path, fingerprint: str, others: bool) -> Path:
    """Where to put answers: the wanted file, or with `others` the first of its numbered siblings, that does
    not exist or holds answers made in the same way. Raises DataError or OSError where there is none."""
    if wanted.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(wanted))
    numbered = (wanted.with_stem(f"{wanted.stem}.{n}") for n in itertools.count(2))
    for path in itertools.chain([wanted], numbered if others else []):
        if all(record.get("fingerprint") == fingerprint for record in saved_answers(path)):
            return path
    raise DataError(f"{wanted}: holds answers made in another way; choose another --output")


def check_output(path: Path) -> None:
    """Make the folder of a file that is to be written. Raises OSError, before hours of decoding, where that
    or the file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
