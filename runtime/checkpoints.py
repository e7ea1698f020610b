"""Checkpoints of a run, and how a killed run goes on.

    checkpoint_50/               after 50 steps: what from_pretrained reads
    checkpoint_50/state/         of each trained parameter its fp32 values and Adam's averages, as
                                 torch.distributed.checkpoint (DCP) writes them: a file for each rank, to be
                                 read by any number of ranks; and, written last, progress.json
    checkpoint_sft_20/, checkpoint/    the same in the supervised phase, and at the end
    best_40/                     the best by m_vIoU, without state

Nothing else must be kept. The learning rate is a function of the step; the order of the data and all random
numbers are functions of (seed, step, prompt, answer): no schedule, cursor or generator has a state of its
own. Parameters that are not trained come from the base checkpoint.

A folder NAME is filled as NAME.tmp and then renamed; an older NAME that it replaces is NAME.old meanwhile.
All ranks must see the same files, and call these functions together, unless a docstring says otherwise.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from config import Config, ConfigError
from qwen.checkpoint import Policy, write_policy
from runtime import distributed
from runtime.files import UserError, write_whole
from runtime.fingerprints import MAY_CHANGE, settings_of

FORMAT = 1  # of progress.json; a later one may add to it
LOGS = ("metrics.jsonl", "rollouts.jsonl")  # lines after the checkpoint are cut, and written anew
CHECKPOINT = re.compile(r"checkpoint((_sft)?_\d+)?")
LEFTOVER = re.compile(rf"({CHECKPOINT.pattern}|best_\d+)\.(tmp|old)")


@dataclass
class Progress:
    sft_step: int = 0  # optimiser steps done in the supervised phase
    step: int = 0  # and in reinforcement learning
    positions: dict[str, int] = field(default_factory=dict)  # LOGS -> bytes; `save` measures them
    best: dict | None = None  # {"step", "m_vIoU"} of the best evaluation so far


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    progress: Progress
    marks: dict  # of fingerprints
    format: int


# ----------------------------------------------------------------------------------------------------------
# Writing


def save(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, progress: Progress, marks: dict
) -> None:
    """Write a checkpoint in a run's folder, in place of one of the same name. Raises UserError on every rank
    if one of them cannot write; what was there stays."""

    def write_state(temporary: Path) -> None:
        place = temporary / "state"
        with warnings.catch_warnings(action="ignore"):  # that one process is one process
            dcp.save(_state(policy.model, optimizer), storage_writer=_Writer(place))
        if distributed.init()[0] == 0:
            logs = [folder.parent / name for name in LOGS]
            positions = {path.name: path.stat().st_size for path in logs if path.exists()}
            progress_now = dataclasses.asdict(dataclasses.replace(progress, positions=positions))
            paths = sorted([*place.iterdir(), *temporary.glob("*.safetensors")])
            files = {str(path.relative_to(temporary)): path.stat().st_size for path in paths}
            record = {"format": FORMAT, "progress": progress_now, "marks": marks, "files": files}
            write_whole(place / "progress.json", json.dumps(record, indent=2).encode())

    _write(folder, functools.partial(write_policy, policy), write_state)


def replace_best(run: Path, policy: Policy, step: int) -> None:
    """Write the model into best_STEP, and remove the one that was the best before. Raises UserError."""
    best = run / f"best_{step}"
    _write(best, functools.partial(write_policy, policy))
    distributed.on_rank0(lambda: _remove(path for path in run.glob("best_*") if path != best))


def note_best(folder: Path, best: dict) -> None:
    """Add to a checkpoint what its evaluation, which came later, has found."""

    def note() -> None:
        path = folder / "state/progress.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        record["progress"]["best"] = best
        write_whole(path, json.dumps(record, indent=2).encode())

    distributed.on_rank0(note)


def prune(run: Path, keep: int, spare: Iterable[Path] = ()) -> None:
    """Remove the checkpoints along the way, but for the newest `keep` that are whole, and those to spare."""

    def remove() -> None:
        numbered = [found.folder for found in _checkpoints(run)[0] if found.folder.name != "checkpoint"]
        _remove(folder for folder in numbered[:-keep] if folder not in spare)

    distributed.on_rank0(remove)


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The tensors that DCP writes, or reads into.

    torch's get_state_dict would write tied weights twice, even if they are frozen; and where AdamW has no
    state yet, it would count a step that was none, in the running optimizer, too.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def adam(p: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        return optimizer.state.get(p) or {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }

    adams = {name: adam(p) for name, p in trained.items()}
    return {"model": {name: p.detach() for name, p in trained.items()}, "adam": adams}


class _Writer(dcp.FileSystemWriter):
    def write_data(self, *arguments):
        """A full disk's error hides behind one of torch's zip writer, and would not reach the other ranks."""
        try:
            return super().write_data(*arguments)
        except RuntimeError as error:
            cause = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def _write(folder: Path, *parts: Callable[[Path], None]) -> None:
    """Fill a folder part by part and put it in its place. A part is done by all ranks, and where one of them
    fails, all raise UserError."""
    rank, _ = distributed.init()
    temporary, old = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))

    def begin(_: Path) -> None:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
            temporary.mkdir()

    def finish(_: Path) -> None:
        if rank == 0:
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)  # if it ends here, tidy takes this back
            temporary.rename(folder)
            shutil.rmtree(old, ignore_errors=True)

    for part in (begin, *parts, finish):
        problem = None
        try:
            part(temporary)
        except (OSError, UserError, CheckpointException) as error:
            problem = _reason(error)
        problems = [text for text in distributed.all_gather(problem) if text]
        if problems:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            distributed.barrier()  # for that: when one rank ends, torchrun ends the others
            remedy = "free some space, then start again with resume=auto"
            raise UserError(f"{folder}: cannot be written ({problems[0]}); {remedy}")


def _reason(error: BaseException) -> str:
    """In one line; DCP's error, which all ranks get, holds those of the ranks that failed."""
    cause = error.__cause__ or error
    if isinstance(error, CheckpointException):
        cause, _ = next(iter(error.failures.values()))
    if isinstance(cause, KeyboardInterrupt):
        raise cause
    return getattr(cause, "strerror", None) or f"{type(cause).__name__}: {cause}".partition("\n")[0]


def _remove(folders: Iterable[Path]) -> None:
    """What is half removed must not look whole; tidy removes the rest."""
    for folder in [folder for folder in folders if not LEFTOVER.fullmatch(folder.name)]:
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder.rename(temporary), ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------
# Finding


def last_checkpoint(run: Path) -> Checkpoint | None:
    """The one that is furthest on among those that are whole; the others get a line on stderr. Nothing is
    changed. Raises UserError where there are some, but none is whole."""

    def find() -> Checkpoint | None:
        whole, damaged = _checkpoints(run)
        print(*damaged, sep="", end="", file=sys.stderr)
        if damaged and not whole:
            raise UserError(
                f"resume: no checkpoint in {run} is whole; put one back, or set another output_dir"
            )
        return whole[-1] if whole else None

    return distributed.on_rank0(find)


def _checkpoints(run: Path) -> tuple[list[Checkpoint], list[str]]:
    """Those that are whole, the furthest last, and a line for each of the others. A NAME.old counts where
    there is no NAME; the run's end counts as further on than the checkpoint of a stop in its last step."""
    named = [path for path in run.glob("checkpoint*") if CHECKPOINT.fullmatch(path.name.removesuffix(".old"))]
    whole, damaged = [], []
    for folder in sorted(named):
        if folder.suffix == ".old" and folder.with_suffix("").exists():
            continue
        try:
            record = json.loads((folder / "state/progress.json").read_text(encoding="utf-8"))
            for name, size in record["files"].items():
                if (folder / name).stat().st_size != size:
                    raise ValueError(f"{name} is not {size} bytes long")
            progress = Progress(**{f.name: record["progress"][f.name] for f in dataclasses.fields(Progress)})
            whole.append(Checkpoint(folder, progress, record["marks"], record["format"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"{folder} is damaged and passed over ({type(error).__name__}: {error})\n")

    def standing(found: Checkpoint) -> tuple[int, int, bool]:
        return found.progress.sft_step, found.progress.step, found.folder.stem == "checkpoint"

    return sorted(whole, key=standing), damaged


# ----------------------------------------------------------------------------------------------------------
# Going on


def load(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint into the model and its AdamW, bit for bit. Raises UserError if it cannot be read."""
    state = _state(model, optimizer)
    _read(folder, state)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = state["adam"][name]


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Put the weights that a checkpoint has trained into another model of its kind, such as the frozen
    reference, rounded to its dtypes. Raises UserError, or OSError where there is none."""
    saved = dcp.FileSystemReader(folder / "state").read_metadata().state_dict_metadata
    names = [key.removeprefix("model.") for key in saved if key.startswith("model.")]
    parameters = dict(model.named_parameters())
    _read(folder, {"model": {name: parameters[name].detach() for name in names}})


def _read(folder: Path, state: dict[str, dict]) -> None:
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(state, checkpoint_id=folder / "state")
    except CheckpointException as error:
        raise UserError(f"{folder}: cannot be read ({_reason(error)}); remove it, and start again") from None


def tidy(run: Path) -> None:
    """Mend or remove what a killed run has left half done; for the first rank alone."""
    for path in [path for path in run.glob("*") if LEFTOVER.fullmatch(path.name)]:
        if path.suffix == ".old" and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
        else:
            shutil.rmtree(path, ignore_errors=True)


def cut_back(run: Path, progress: Progress) -> None:
    """Cut the logs back to where they were; for the first rank alone. Raises UserError, and cuts none, if one
    is shorter than that."""
    paths = [run / name for name in LOGS if name in progress.positions or (run / name).exists()]
    for path in paths:
        length, before = path.stat().st_size if path.exists() else 0, progress.positions.get(path.name, 0)
        if length < before:
            found = f"{path}: has {length} bytes, and had {before} when the checkpoint was written"
            raise UserError(f"{found}; put it back, or choose another output_dir")
    for path in paths:
        os.truncate(path, progress.positions.get(path.name, 0))


# ----------------------------------------------------------------------------------------------------------
# Whether it is the same run


def refuse_other(found: Checkpoint, config: Config, marks: dict) -> None:
    """Raise ConfigError if the checkpoint is of another run than the marks."""
    where = f"resume: {found.folder} was made"
    again = "; go back to that, or choose another output_dir"
    if found.format > FORMAT:
        raise ConfigError(f"{where} by a newer version of this program{again}")
    then, now = (
        settings_of(Config()) | found.marks["settings"],
        marks["settings"],
    )  # new ones had their default
    changed = [
        key
        for key in {**then, **now}
        if key.split(".")[0] not in MAY_CHANGE and then.get(key, "unknown") != now.get(key, "unknown")
    ]
    if changed:
        before, after = (
            [f"{key}: {values.get(key, 'unknown')}" for key in changed] for values in (then, now)
        )
        raise ConfigError(
            f"{where} with {', '.join(before)}, and this run asks for {', '.join(after)}{again}"
        )
    if found.marks["model"] != marks["model"]:
        raise ConfigError(f"{where} from another model than {config.model} is now{again}")
    if found.marks["data"] != marks["data"]:
        files = f"{config.train_annotations} and {config.eval_annotations}"
        raise ConfigError(f"{where} with other sentences or boxes than are in {files} now{again}")
    if found.progress.step > config.steps:
        raise ConfigError(f"{where} after {found.progress.step} steps; steps: {config.steps} cannot be fewer")
