"""The paper's Tables 5-8 of finished runs, beside the paper's figures (a part of lab.ablate and lab.compare).

A run stands in the row whose settings it has (configs/ablations/ROW.yaml), whatever its folder is called.
Runs of a row may differ in the seed alone, and are averaged.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from config import Config, load_config
from metrics import COLUMNS, Row
from rewards import WEIGHTS
from runtime.files import DataError, read_json
from runtime.fingerprints import MAY_CHANGE

ROWS = Path(__file__).parent.parent / "configs/ablations"
PAPER = {  # ROW -> the paper's figures on HC-STVG v1 test, in the order of COLUMNS
    "base": (25.6, 19.1, 20.2, 12.6),
    "sft": (53.5, 28.6, 45.2, 21.9),
    "rft": (58.5, 41.8, 68.7, 38.9),
    "rft_think": (60.3, 44.1, 73.3, 43.5),
    "no_think_reward": (59.3, 42.2, 69.1, 39.9),
    "giou_only": (58.6, 40.6, 67.6, 36.6),
    "l1_only": (58.5, 39.9, 67.0, 34.6),
    "lambda_0.2": (59.5, 42.5, 70.9, 40.6),
    "lambda_1.0": (60.5, 43.8, 72.4, 42.9),
}
TABLES = {  # title -> ROW -> its name in the table
    "Table 5: from the base model to the whole method": {
        "base": "base model, untrained",
        "sft": "supervised fine-tuning",
        "rft": "RFT, no thinking boxes",
        "rft_think": "RFT + thinking boxes",
    },
    "Table 6: the think reward": {"no_think_reward": "without it", "rft_think": "with it"},
    "Table 7: the spatial reward": {"giou_only": "GIoU only", "l1_only": "L1 only", "rft_think": "GIoU + L1"},
    "Table 8: its weight, λ": {"lambda_0.2": "λ = 0.2", "rft_think": "λ = 0.5", "lambda_1.0": "λ = 1.0"},
}
NOTE = "mean ± standard deviation over the seeds. The paper's figures: Qwen2.5-VL-7B on HC-STVG v1."


@dataclass(frozen=True)
class Run:
    folder: Path
    config: Config
    row: str  # the row it belongs to, a key of PAPER; empty if none
    scores: Row  # after training, on the held-out split, protocol native, in percent


def row_of(config: Config) -> str:
    """The row with this kind of training and these rewards; empty if there is none."""

    def identity(config: Config) -> tuple:
        rewards = {name: weight for name, weight in config.rewards.items() if weight or name in WEIGHTS}
        return config.think, config.steps > 0, config.sft.steps > 0, rewards if config.steps else None

    ours = identity(config)
    return next((row for row in PAPER if identity(load_config(ROWS / f"{row}.yaml")) == ours), "")


def read_run(folder: Path) -> Run:
    """A finished run of train.py. Raises DataError."""
    if not (folder / "summary.json").is_file():
        raise DataError(f"{folder}: is no finished run (it has no summary.json); finish it, or leave it out")
    config = load_config(folder / "config.yaml")
    return Run(folder, config, row_of(config), read_json(str(folder / "summary.json"))["after"])


def check_comparable(runs: list[Run]) -> None:
    """Raises DataError if two runs differ in more than the seed and what makes up their rows."""
    compared = set(vars(Config())) - MAY_CHANGE | {"model", "train_annotations", "eval_annotations", "steps"}
    for first, run in itertools.combinations(runs, 2):
        a, b = first.config, run.config
        free = {"seed"} if run.row == first.row else {"seed", "think", "rewards", "sft"}
        free |= set() if a.think == b.think else {"model"}  # the toy has a checkpoint for each
        free |= set() if a.steps and b.steps else {"steps"}
        for key in sorted(compared - free):
            one, other = getattr(a, key), getattr(b, key)
            if one != other:
                raise DataError(f"{run.folder}: {key} is {other}, in {first.folder} {one}; leave one out")


def format_tables(runs: list[Run]) -> str:
    """Tables 5-8 in Markdown, of runs that stand in a row. Raises DataError as check_comparable does."""
    check_comparable(runs)
    parts = [f"After training, on {runs[0].config.eval_annotations}, protocol native; {NOTE}"]
    return "\n\n".join(
        [*parts, *(f"{title}\n\n{format_table(rows, runs)}" for title, rows in TABLES.items())]
    )


def tables_of_rows(runs: list[Run]) -> str:
    """format_tables of those runs that stand in a row, if they stand in more than one, else "". A reason not
    to compare them takes the place of the tables."""
    known = [run for run in runs if run.row]
    try:
        return format_tables(known) if len({run.row for run in known}) > 1 else ""
    except DataError as error:
        return f"Tables 5-8 of the paper are left out: {error}"


def format_table(rows: dict[str, str], runs: list[Run]) -> str:
    """One of TABLES in Markdown: mean ± sample standard deviation; of a single run its scores."""
    lines = [["", "runs", *(head for name in COLUMNS for head in (name, "paper"))]]
    for row, title in rows.items():
        same = [run.scores for run in runs if run.row == row]
        lines.append([title, str(len(same))])
        for name, figure in zip(COLUMNS, PAPER[row], strict=True):
            ours = mean_text([scores[name] for scores in same]) if same else "not run"
            lines[-1] += [ours, str(figure)]
    return markdown(lines)


def mean_text(values: Sequence[float], digits: int = 1) -> str:
    """The mean of the values of some runs; of more than one with their sample standard deviation."""
    text = f"{mean(values):z.{digits}f}"  # z: no -0.0
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(lines: list[list[str]]) -> str:
    """A table in Markdown whose columns are aligned. lines: the cells, the heads first."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
