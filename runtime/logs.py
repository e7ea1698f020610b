"""What a run reports: metrics.jsonl, the same numbers in TensorBoard and Weights & Biases (`log_to`), and the
seconds and memory of a step."""

import contextlib
import dataclasses
import importlib.util
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from config import Config, ConfigError
from prompts import where_it_fails
from runtime.files import read_jsonl, write_jsonl, write_whole

PARTS = ("decode", "rollout", "score", "reference", "update", "wait")  # of a step
DRIFT_STEPS, DRIFT_LEAST = 30, 15  # steps that warning_of looks at: at most, and at least for drift
KL_LEAST = 0.05  # nats a token; less is a policy that has hardly moved


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


WARNINGS = {  # name, as the bar shows it -> what is the matter, and what to do (docs/glossary.md)
    "cut off": "most answers are cut off, and earn nothing: raise max_new_tokens (python -m lab.check_data"
    " CONFIG prints how long true answers are)",
    "unreadable": "hardly any answer parses, and the others earn nothing: teach the form first"
    " (sft.steps=200), and check max_new_tokens, coordinates, and the prompt",
    "no spread": "the answers of a group earn the same, so none is better than another: raise temperature or"
    " num_generations, or give a reward that tells them apart",
    "no gradient": "the gradient is 0, so no weight changes: check lora.targets, freeze_vision, and that the"
    " weights in rewards are not 0",
    "KL alone grows": "the policy moves away from the reference, and its reward does not rise: lower"
    " learning_rate, raise kl_beta, or enlarge the batch",
    "drift": "the reward rises while vIoU falls, so something pays that is not the task: look at the sampled"
    " answers (python -m lab.pictures RUN) and at python -m lab.exploits",
}


def parse_report(records: list[dict], config: Config, example: bool = True) -> str:
    """How many of some answers parse, how many are cut off, and how the first of the others begins.

    records: lines of rollouts.jsonl or predictions.jsonl. Unreadable videos have no answers.
    """
    answers = [record for record in records if "unreadable" not in record]
    wrong = [record["completion"] for record in answers if record["span"] is None]
    cut = sum(record["truncated"] for record in answers)
    text = f"{len(answers) - len(wrong)} of {len(answers)} answers parse, {cut} cut off"
    text += f" at max_new_tokens={config.max_new_tokens}"
    if wrong and example:
        begins, place = " ".join(wrong[0].split())[:80], where_it_fails(wrong[0], config.think)
        text += f"; one that does not parse begins {begins!r} ({place})"
    return text


def before_report(records: list[dict], config: Config) -> str:
    """The same before training; if fewer than a fifth parse, with an example and a remedy."""
    few = sum(record["span"] is not None for record in records) < 0.2 * len(records)
    cut = sum(record.get("truncated", False) for record in records) > 0.5 * len(records)
    warning = f"\nwarning: {WARNINGS['cut off' if cut else 'unreadable']}" if few else ""
    return f"before training {parse_report(records, config, example=few)}{warning}"


def warning_of(metrics: dict, recent: list[dict]) -> tuple[str, float]:
    """The first of WARNINGS that holds in a step ("" for none; the later ones often follow from it), and how
    bad it is, from 0 to 1.

    metrics: a step's line of metrics.jsonl. recent: the lines of up to DRIFT_STEPS steps, this one the last.
    """
    shares = {
        "cut off": (metrics["truncated"], 0.5),
        "unreadable": (1 - metrics["format"], 0.9),
        "no spread": (metrics["zero_spread"], 0.9),
        "no gradient": (float(metrics["grad_norm"] == 0), 0.5),  # a loss of exactly 0 alone is healthy
        "KL alone grows": (float(kl_alone_grows(recent)), 0.5),
        "drift": (metrics["drift"], 0.5),
    }
    return next(((name, share) for name, (share, most) in shares.items() if share > most), ("", 0.0))


def count_warnings(lines: list[dict]) -> dict[str, int]:
    """name -> in how many steps it was given, of those in the last step or in half of them. lines: of
    metrics.jsonl, phase grpo."""
    counts = Counter(line["warning"] for line in lines if "warning" in line)
    last = lines[-1].get("warning") if lines else None
    return {name: count for name, count in counts.items() if name == last or count * 2 >= len(lines)}


def final_warnings(counts: dict[str, int], steps: int) -> list[str]:
    """A line for each of count_warnings of so many steps."""
    return [f"warning, in {count} of {steps} steps: {WARNINGS[name]}" for name, count in counts.items()]


def drifts_apart(recent: list[dict]) -> bool:
    """Whether the reward rises while the vIoU falls: the policy has found something that pays and is not the
    task. recent: lines of metrics.jsonl, of the last steps."""
    if len(recent) < DRIFT_LEAST:
        return False
    return trend(recent, "reward") > 0 > trend(recent, "viou_pred")


def kl_alone_grows(recent: list[dict]) -> bool:
    """Whether over DRIFT_STEPS steps the KL rises, from its first to its last third to more than twice, and
    neither the reward nor the vIoU does."""
    if len(recent) < DRIFT_STEPS:
        return False
    kl, third = [line["kl"] for line in recent], DRIFT_STEPS // 3
    now, then = np.mean(kl[-third:]), np.mean(kl[:third])
    moves = trend(recent, "kl") > 0 and now > max(2 * then, KL_LEAST)
    return bool(moves and trend(recent, "reward") <= 0 and trend(recent, "viou_pred") <= 0)


def trend(recent: list[dict], key: str) -> int:
    """1 if a straight line through the values rises, -1 if it falls, by more than twice the standard error of
    its slope; else 0."""
    values = np.array([line[key] for line in recent])  # (T,)
    steps = np.arange(len(values)) - (len(values) - 1) / 2  # (T,)
    slope = steps @ values / (steps @ steps)  # of the least-squares line
    residuals = values - values.mean() - steps * slope  # (T,)
    error = np.sqrt((residuals**2).sum() / (len(values) - 2) / (steps @ steps))
    return int(np.sign(slope)) if abs(slope) > 2 * error + 1e-9 / len(values) else 0


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
