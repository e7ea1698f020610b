"""What a run reports: metrics.jsonl, the same numbers in TensorBoard and Weights & Biases (`log_to`), and the
seconds and memory of a step."""

import contextlib
import dataclasses
import importlib.util
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from config import Config, ConfigError
from runtime.files import read_jsonl, write_jsonl, write_whole

PARTS = ("decode", "rollout", "score", "reference", "update", "wait")  # of a step
DRIFT_STEPS, DRIFT_LEAST = 30, 15  # steps that drifts_apart looks at, at most and at least


class Clock:
    """The seconds of each part of a step: `with clock("rollout"): ...` adds the block's time to that part.

    In nested blocks only the inner one counts, so that no second counts twice. On CUDA the ends of a block
    wait for the kernels that were started before, so that these count in the right block.
    """

    def __init__(self):
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._running: list[str] = []  # nested parts; the time goes to the last
        self._began = self._counted = time.perf_counter()  # the start of the step; up to when time is counted

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._count()
        self._running.append(part)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def lap(self) -> dict[str, float]:
        """The seconds since the last lap, of each of PARTS and of the whole "step"."""
        self._count()
        seconds = {**self._seconds, "step": self._counted - self._began}
        self._seconds, self._began = dict.fromkeys(PARTS, 0.0), self._counted
        return seconds

    def _count(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._counted
        self._counted = now


clock = Clock()  # of this process


def peak_memory() -> float:
    """The most memory that this process has held so far, in GB of 10^9 bytes: by tensors on its GPU (the CUDA
    context and the allocator's reserve come on top), or without a GPU in the machine's memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")  # on Linux; ru_maxrss begins there with the parent's peak
    found = status.is_file() and re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
    peak = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # a Mac counts in bytes


class Log:
    """metrics.jsonl of a run, and the trackers of `log_to`, which show the same numbers."""

    def __init__(self, run: Path, config: Config):
        """Raises ConfigError where a tracker cannot be used."""
        self._path, self._lines = run / "metrics.jsonl", 0
        self._trackers = [TRACKERS[name](run, config) for name in sorted(set(config.log_to))]
        if self._trackers and self._path.is_file():  # of a resumed run: what its checkpoint has kept
            for metrics in read_jsonl(self._path, "phase", "step"):
                self._send(metrics)

    def write(self, metrics: dict) -> None:
        """Add a line. metrics: "phase", "step", and numbers by name, which may be nested."""
        write_jsonl([metrics], self._path, append=True)
        self._send(metrics)

    def close(self) -> None:
        """Wait until the trackers have everything."""
        for tracker in self._trackers:
            tracker.close()

    def _send(self, metrics: dict) -> None:
        numbers = flatten({metrics["phase"]: {**metrics, "step": None}})  # the step is the x axis
        for tracker in self._trackers:
            tracker.send(numbers, metrics["step"], self._lines)
        self._lines += 1


class TensorBoard:
    """Event files in run/tensorboard. `tensorboard --logdir runs` shows them."""

    def __init__(self, run: Path, config: Config):
        from torch.utils.tensorboard import SummaryWriter

        # Hides what an earlier start wrote, all of which Log sends again: a phase counts its own steps, so
        # there is no step from which to hide.
        self._writer = SummaryWriter(run / "tensorboard", purge_step=0)

    def send(self, numbers: dict[str, float], step: int, line: int) -> None:
        for tag, number in numbers.items():
            self._writer.add_scalar(tag, number, step)
        self._writer.flush()  # a kill would lose the queue

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of the project "stvg-o1" at Weights & Biases, or with WANDB_MODE=offline files in run/wandb.

    Its history can only grow. The number of a row is the line's in metrics.jsonl, so that a line which the
    service has is not sent again. Offline each start writes all lines; `wandb sync` keeps the later files.
    """

    def __init__(self, run: Path, config: Config):
        import wandb

        known = run / "wandb_id"
        same = known.read_text() if known.is_file() else None
        settings = {"project": "stvg-o1", "name": run.resolve().name, "dir": run, "id": same}
        try:
            self._run = wandb.init(**settings, resume="allow", config=dataclasses.asdict(config))
        except wandb.Error as error:  # such as no key, no network
            reason = " ".join(str(error).split())
            raise ConfigError(f"log_to: wandb: {reason}; wandb login, or set WANDB_MODE=offline") from error
        write_whole(known, self._run.id.encode())
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # the x axis

    def send(self, numbers: dict[str, float], step: int, line: int) -> None:
        if line >= self._run.starting_step:
            self._run.log({**numbers, "step": step}, step=line)

    def close(self) -> None:
        self._run.finish(exit_code=0 if sys.exception() is None else 1)  # the run's exception, in `closing`


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def check_trackers(config: Config) -> None:
    """Raise ConfigError where `log_to` names a package that is not installed."""
    for name in config.log_to:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder ./wandb, as wandb makes it, is no package
            raise ConfigError(f"log_to: {name} is not installed; pip install {name}, or leave it out")


def drifts_apart(recent: list[tuple[float, float]]) -> bool:
    """Whether the reward rises while the vIoU falls: the policy has found something that pays and is not the
    task. recent: (reward, vIoU) of the last steps, whose straight lines must both be steeper than twice the
    standard error of their slopes."""
    if len(recent) < DRIFT_LEAST:
        return False
    values = np.array(recent)  # (T, 2)
    steps = np.arange(len(values)) - (len(values) - 1) / 2  # (T,)
    slopes = steps @ values / (steps @ steps)  # (2,), of the least-squares lines
    residuals = values - values.mean(axis=0) - np.outer(steps, slopes)  # (T, 2)
    errors = np.sqrt((residuals**2).sum(axis=0) / (len(values) - 2) / (steps @ steps))
    reward, viou = slopes
    rounding = 1e-9 / len(values)
    return bool(reward > 2 * errors[0] + rounding and viou < -2 * errors[1] - rounding)


def flatten(tree: dict) -> dict[str, float]:
    """The numbers in nested dicts, by their keys joined with "/"."""
    flat = {key: value for key, value in tree.items() if isinstance(value, int | float)}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": number for name, number in flatten(value).items()}
    return flat


def summarize(records: list[dict], diagnostics: list[dict], num_generations: int) -> dict[str, float]:
    """The means of a step's rollouts on all ranks; docs/glossary.md says what healthy values are.

    records: lines of rollouts.jsonl, num_generations for each prompt. diagnostics: rewards.diagnose of each.
    """
    rewards = [record["rewards"] for record in records]
    groups = {  # of each term, and the total: (prompts, G)
        name: np.array([terms[name] for terms in rewards]).reshape(-1, num_generations) for name in rewards[0]
    }
    totals = groups.pop("total")
    spread = totals.std(axis=1, ddof=1)  # (prompts,)
    return {
        "reward": float(totals.mean()),
        "reward_std": float(spread.mean()),  # within a group: what the advantages are made of
        "zero_spread": float((spread < 1e-6).mean()),
        **{name: float(values.mean()) for name, values in groups.items()},
        "std": {name: float(values.std(axis=1, ddof=1).mean()) for name, values in groups.items()},
        **{name: float(np.mean([values[name] for values in diagnostics])) for name in diagnostics[0]},
        "length": float(np.mean([record["length"] for record in records])),
        "truncated": float(np.mean([record["truncated"] for record in records])),
        "prompts": len(spread),  # fewer than batch_size where videos cannot be read
    }
