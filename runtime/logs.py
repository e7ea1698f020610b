"""What a run reports and leaves behind beside its checkpoints: its folder, the metrics of its steps and where
their time went, pictures."""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from config import Config
from runtime.files import read_jsonl, write_jsonl
from runtime.trackers import TRACKERS, check_trackers

PARTS = ("decode", "rollout", "score", "reference", "update", "wait")  # of a step


# ----------------------------------------------------------------------------------------------------------
# Time and memory


class Clock:
    """Where the time of a step goes: `with clock("rollout"): ...` adds the block's seconds to that part.

    Within another block only the inner part runs, so that no second counts twice. On CUDA the ends of a block
    wait for the kernels that were started before, which then count where they belong.
    """

    def __init__(self):
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._running: list[str] = []  # parts that have begun; the time goes to the last
        self._began = self._counted = time.perf_counter()  # this step; until then its time has been given

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Raises ValueError for a part that is not one of PARTS."""
        if part not in PARTS:
            raise ValueError(f"{part!r} is not one of {', '.join(PARTS)}")
        self._count()
        self._running.append(part)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def lap(self) -> dict[str, float]:
        """Seconds of each of PARTS, and of the whole "step", since the last split; begins anew."""
        self._count()
        seconds = {**self._seconds, "step": self._counted - self._began}
        self._seconds, self._began = dict.fromkeys(PARTS, 0.0), self._counted
        return seconds

    def _count(self) -> None:
        """Give the time since the last call to the part that runs."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._counted
        self._counted = now


clock = Clock()  # of this process


def peak_memory() -> float:
    """The most memory that this process has held so far, in GB of 10^9 bytes: of its GPU by tensors (what the
    CUDA context and the allocator's reserve take comes on top); without a GPU, of the machine."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")  # Linux; there ru_maxrss begins with that of the process above
    found = status.is_file() and re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
    peak = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # a Mac counts in bytes


# ----------------------------------------------------------------------------------------------------------
# Metrics and trackers


class Log:
    """metrics.jsonl of a run, and the trackers of `log_to`, which show the same numbers.

    A run that goes on from a checkpoint keeps the first lines of metrics.jsonl. Trackers cannot be cut back;
    they are sent again what the file holds, and each takes care that nothing shows twice.
    """

    def __init__(self, run: Path, config: Config):
        """Raises ConfigError where a tracker cannot be used."""
        check_trackers(config)
        self.run = run
        self.trackers = [TRACKERS[name](run, config) for name in sorted(set(config.log_to))]
        self._lines = 0
        if self.trackers and (run / "metrics.jsonl").is_file():
            for metrics in read_jsonl(run / "metrics.jsonl", "phase", "step"):
                self._send(metrics)

    def write(self, metrics: dict) -> None:
        """metrics: "phase", "step", and numbers by name, which may be nested; trackers call those
        phase/name/name."""
        write_jsonl([metrics], self.run / "metrics.jsonl", append=True)
        self._send(metrics)

    def picture(self, tag: str, path: Path, step: int) -> None:
        """Send a PNG file to the trackers, beside the numbers of the last line. Needs pillow."""
        for tracker in self.trackers:
            tracker.picture(tag, path, step, self._lines - 1)

    def close(self) -> None:
        """Wait until the trackers have everything."""
        for tracker in self.trackers:
            tracker.close()

    def _send(self, metrics: dict) -> None:
        numbers = flatten({metrics["phase"]: {**metrics, "step": None}})  # the step is the x axis
        for tracker in self.trackers:
            tracker.numbers(numbers, metrics["step"], self._lines)
        self._lines += 1


DRIFT_STEPS, DRIFT_LEAST = 30, 15  # steps that drifts_apart looks at, at most and at least


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
