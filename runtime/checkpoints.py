"""Checkpoints of a run: write them, find the last one, load it, and refuse one that belongs to another run.

    checkpoint_50/          after 50 steps: a model folder for from_pretrained
    checkpoint_50/state/    fp32 values and Adam's averages of the trained parameters. RANK.safetensors has
                            the rows that this rank had; any number of ranks can read them. progress.json
                            comes last, with a checksum of each of these files and of itself; without it, or
                            where one is wrong, a checkpoint does not count
    checkpoint_sft_20/      the same in the supervised phase
    checkpoint/             the same at the end
    best_40/                the model folder with the best m_vIoU

Nothing else has a state. The learning rate is a function of the step; the order of the data and all random
numbers are functions of (seed, step, prompt, answer). What is not trained comes from the base checkpoint.

A folder NAME is filled as NAME.tmp and then renamed; an older NAME, perhaps the only checkpoint, is NAME.old
until then. All ranks must see the same files and call these functions together, unless one is for rank 0.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import Config, ConfigError
from runtime import distributed
from runtime.files import DataError, UserError, disk_remedy, few, read_json, write_json
from runtime.fingerprints import settings_of

PROGRESS = "state/progress.json"
ADAM = ("step", "exp_avg", "exp_avg_sq")
# A resumed run writes the lines after its checkpoint again.
LOGS = ("metrics.jsonl", "rollouts.jsonl", "watched.jsonl")
CHECKPOINT = re.compile(r"checkpoint((_sft)?_\d+)?")
LEFTOVER = re.compile(rf"({CHECKPOINT.pattern}|best_\d+)\.(tmp|old)")


@dataclass
class Progress:
    sft_step: int = 0  # optimiser steps done in the supervised phase
    step: int = 0  # and in reinforcement learning
    positions: dict[str, int] = field(default_factory=dict)  # LOGS -> bytes; `save` measures them
    best: dict | None = None  # {"step", "m_vIoU"} of the best evaluation so far
    seconds: float = 0.0  # that the work has taken so far, in all starts


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    progress: Progress
    fingerprints: dict
    checksums: dict[str, str]  # file in state/ -> its SHA-256

    @property
    def tidied(self) -> Path:
        """Where the folder is once `tidy` has renamed NAME.old to NAME."""
        return self.folder.with_suffix("")


def save(folder: Path, policy, optimizer, progress: Progress, fingerprints: dict) -> None:
    """Write a checkpoint, or replace the one of that name. Raises UserError, and leaves that one alone, where
    a rank cannot write."""

    def write_progress() -> None:
        logs = [folder.parent / name for name in LOGS]
        positions = {path.name: path.stat().st_size for path in logs if path.exists()}
        progress_now = dataclasses.asdict(dataclasses.replace(progress, positions=positions))
        _write_progress(temporary, progress_now, fingerprints, checksums)

    with _replacing(folder) as temporary:
        policy.save(temporary)
        distributed.on_rank0((temporary / "state").mkdir)
        _write_rows(temporary, _state(policy.model, optimizer))
        checksums = _checksums(temporary)
        distributed.on_rank0(write_progress)


def _write_progress(folder: Path, progress: dict, fingerprints: dict, checksums: dict[str, str]) -> None:
    record = {"progress": progress, "fingerprints": fingerprints, "checksums": checksums}
    write_json(record | {"checksum": _checksum(record)}, folder / PROGRESS)


def _checksum(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _checksums(folder: Path) -> dict[str, str]:
    """file in state/ -> its SHA-256. All ranks call it; each reads some of the files."""
    rank, world_size = distributed.init()
    paths, sums = sorted((folder / "state").glob("*.safetensors")), {}
    for path in paths[rank::world_size]:
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {name: value for part in distributed.all_gather(sums) for name, value in part.items()}


def replace_best(run: Path, policy, step: int) -> None:
    """Write the model into best_STEP and remove the best one before. Raises UserError."""
    best = run / f"best_{step}"
    with _replacing(best) as temporary:
        policy.save(temporary)
    distributed.on_rank0(lambda: _remove(path for path in run.glob("best_*") if path != best))


def note_best(folder: Path, best: dict) -> None:
    """Add the result of an evaluation that came after the checkpoint."""

    def note() -> None:
        found = _read_checkpoint(folder / PROGRESS)
        progress = dataclasses.asdict(dataclasses.replace(found.progress, best=best))
        _write_progress(folder, progress, found.fingerprints, found.checksums)

    distributed.on_rank0(note)


def prune(run: Path, keep: int, spare: Iterable[Path] = ()) -> None:
    """Remove the numbered checkpoints except the newest `keep` and those in `spare`."""

    def remove() -> None:
        numbered = [found.folder for found in _checkpoints(run, []) if found.folder.name != "checkpoint"]
        _remove(folder for folder in numbered[:-keep] if folder not in spare)

    distributed.on_rank0(remove)


def _state(model: torch.nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """The tensors to be written, or to be read into: model.NAME, adam.NAME.PART. Where AdamW has none yet,
    they are those before its first step."""
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            averages = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            adam = optimizer.state.get(p) or {"step": torch.tensor(0.0), **averages}
            state |= {f"model.{name}": p.detach(), **{f"adam.{name}.{part}": adam[part] for part in ADAM}}
    return state


def _write_rows(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Write this rank's rows of each tensor to a file of its own. Raises UserError on every rank."""
    rank, _ = distributed.init()
    rows = {name: distributed.rows_of(tensor) for name, tensor in state.items()}
    first_rows = json.dumps({name: first for name, (_, first) in rows.items()})
    parts = {name: part for name, (part, _) in rows.items()}
    with distributed.errors_on_all_ranks():
        try:
            save_file(parts, folder / f"state/{rank}.safetensors", {"first_rows": first_rows})
        except SafetensorError as error:
            raise _unwritable(folder, error) from error


def _read_rows(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Read the tensors of a state in place: of each the rows that this rank has, from whichever files. Raises
    UserError for a state of another model."""
    try:
        files = [safe_open(path, "pt") for path in sorted((folder / "state").glob("*.safetensors"))]
        places = [json.loads(file.metadata()["first_rows"]) for file in files]
        for name, tensor in state.items():
            rows, first = distributed.rows_of(tensor)
            for file, first_rows in zip(files, places, strict=True):
                saved, at = file.get_slice(name), first_rows[name]
                begin, end = max(first, at), min(first + len(rows), at + saved.get_shape()[0])
                if begin < end:
                    rows[begin - first : end - first] = saved[begin - at : end - at]
    except (SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
        why = f"is of another model ({error}); choose another output_dir"
        raise UserError(f"{folder}/state: {why}") from error


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield NAME.tmp to be filled, then put it in the place of NAME. Errors in the block must come up on all
    ranks, as those of on_rank0 and Policy.save do."""
    temporary, old = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
        temporary.mkdir()

    def finish() -> None:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    try:
        distributed.on_rank0(begin)
        yield temporary
        distributed.on_rank0(finish)
    except (OSError, UserError) as error:
        distributed.on_rank0(functools.partial(shutil.rmtree, temporary, ignore_errors=True))
        if isinstance(error, UserError):
            raise
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: Exception) -> UserError:
    remedy = f"{disk_remedy(error)}, then start again with resume=auto"
    return UserError(f"{str(folder).removesuffix('.tmp')}: cannot be written ({error}); {remedy}")


def _remove(folders: Iterable[Path]) -> None:
    """Remove folders so that a half-removed one does not count: `tidy` removes the rest of it."""
    for folder in [folder for folder in folders if not LEFTOVER.fullmatch(folder.name)]:
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder.rename(temporary), ignore_errors=True)


def last_checkpoint(run: Path) -> Checkpoint | None:
    """Return the checkpoint that is furthest on, of those that are whole; say what is wrong with the others.
    Raises UserError where there are checkpoints, but none is whole."""

    def find() -> tuple[list[Checkpoint], list[str], bool]:
        problems: list[str] = []
        found = _checkpoints(run, problems)
        return found, problems, any(CHECKPOINT.fullmatch(path.name) for path in run.glob("checkpoint*"))

    found, problems, some = distributed.on_rank0(find)
    while found and (problem := _damage(found[-1])):
        problems.append(problem)
        found.pop()
    if some and not found:
        why = "".join(f" ({problem})" for problem in problems[-1:])
        raise UserError(f"resume: no checkpoint in {run} is whole{why}; choose another output_dir")
    if problems and distributed.init()[0] == 0:
        print("".join(f"not used: {problem}\n" for problem in problems), end="", file=sys.stderr)
    return found[-1] if found else None


def _checkpoints(run: Path, problems: list[str]) -> list[Checkpoint]:
    """The checkpoints that have a state, the furthest last. NAME.old counts where there is no NAME. The end
    of the run counts as further than a stop in its last step. problems: gets what is wrong with others."""
    found = []
    for path in run.glob(f"checkpoint*/{PROGRESS}"):
        folder = path.parent.parent
        replaced = folder.suffix == ".old" and folder.with_suffix("").exists()
        if CHECKPOINT.fullmatch(folder.name.removesuffix(".old")) and not replaced:
            try:
                found.append(_read_checkpoint(path))
            except DataError as error:
                problems.append(str(error))
    return sorted(found, key=lambda c: (c.progress.sft_step, c.progress.step, c.folder.stem == "checkpoint"))


def _read_checkpoint(path: Path) -> Checkpoint:
    """Raises DataError for a progress.json that is not as it was written."""
    record, damaged = read_json(path), f"{path}: is damaged, or of an earlier version of this program"
    if not isinstance(record, dict) or record.pop("checksum", None) != _checksum(record):
        raise DataError(damaged)
    try:
        progress = Progress(**record.pop("progress"))
        found = Checkpoint(path.parent.parent, progress, **record)
        counts = (progress.sft_step, progress.step, *progress.positions.values())
    except (TypeError, KeyError, AttributeError) as error:  # somebody has made the checksum, too
        raise DataError(damaged) from error
    if not all(type(count) is int and count >= 0 for count in counts):
        raise DataError(damaged)
    return found


def _damage(found: Checkpoint) -> str:
    """What is wrong with the files of a checkpoint's state, or "". All ranks call it."""
    sums = _checksums(found.folder)
    names = sorted(name for name in {*sums, *found.checksums} if sums.get(name) != found.checksums.get(name))
    return f"{found.folder}/state: {few(names)} missing or damaged" if names else ""


def load(folder: Path, model: torch.nn.Module, optimizer) -> None:
    """Read a checkpoint into a model and its AdamW, bit for bit. Raises UserError if it cannot be read."""
    state = _state(model, optimizer)
    _read_rows(folder, state)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {part: state[f"adam.{name}.{part}"] for part in ADAM}


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Read the weights that a checkpoint has trained into another such model, for example the frozen
    reference, rounded to its dtypes. Raises UserError, or OSError where there is no checkpoint."""
    if damage := _damage(distributed.on_rank0(lambda: _read_checkpoint(folder / PROGRESS))):
        raise UserError(f"{damage}; choose another output_dir")
    with safe_open(folder / "state/0.safetensors", "pt") as file:
        names = set(file.keys())
    parameters = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    _read_rows(folder, {name: parameter for name, parameter in parameters.items() if name in names})


def tidy(run: Path, found: Checkpoint | None) -> None:
    """Restore or remove what a killed run left half done. Set aside, as NAME.damaged, the checkpoints that
    are damaged, or further on than the one that the run resumes from. Rank 0."""
    folders = [checkpoint.folder for checkpoint in _checkpoints(run, [])]
    whole = folders[: folders.index(found.folder) + 1] if found else folders
    for folder in [path.parent.parent for path in run.glob(f"checkpoint*/{PROGRESS}")]:
        if CHECKPOINT.fullmatch(folder.name) and folder not in whole:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
    for path in [path for path in run.glob("*") if LEFTOVER.fullmatch(path.name)]:
        if path.suffix == ".old" and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
        else:
            shutil.rmtree(path, ignore_errors=True)


def cut_back(run: Path, progress: Progress) -> None:
    """Cut the logs to where they were at the checkpoint; rank 0. Raises UserError if one is shorter."""
    lengths = {path: path.stat().st_size for path in map(run.joinpath, LOGS) if path.exists()}
    for name, before in progress.positions.items():
        if lengths.get(run / name, 0) < before:
            raise UserError(f"{run / name}: is shorter than when the checkpoint was written; put it back")
    for path in lengths:
        os.truncate(path, progress.positions.get(path.name, 0))


def refuse_other(found: Checkpoint, config: Config, fingerprints: dict) -> None:
    """Raise ConfigError, which names all differences, if a checkpoint is of another run."""

    def flat(prints: dict) -> dict:
        return {**prints["settings"], "weights of the model": prints["model"], "data": prints["data"]}

    then, now = flat(found.fingerprints), flat(fingerprints)
    then = {**settings_of(Config()), **then}  # a setting that is newer than the checkpoint had its default
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    where, done = f"resume: {found.folder} was made", found.progress.step
    if changed:
        old, new = (", ".join(f"{key}: {values.get(key)}" for key in changed) for values in (then, now))
        remedy = "go back to that, or choose another output_dir"
        raise ConfigError(f"{where} with {old}; this run has {new}; {remedy}")
    if done > config.steps:
        raise ConfigError(f"{where} after {done} steps; steps: {config.steps} cannot be fewer")
