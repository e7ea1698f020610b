"""The paper's Tables 5-8 from finished runs, with the paper's figures beside.

    python evaluate.py --table RUN ...      (`python ablate.py` makes the runs, and prints them, too)

A run is recognised by its settings, not by its name: reinforcement learning or not, supervised steps or not,
thinking boxes or not, and the rewards, as the files in configs/ablations/ set them, one for each row. Runs of
a row must agree in all else that is learned from but the seed (check_alike). The whole method is a row of
every table.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from config import Config, load_config
from metrics import COLUMNS, Row
from rewards import WEIGHTS
from runtime.files import DataError, get, read_json
from runtime.fingerprints import settings_of

ROWS = Path(__file__).parent.parent / "configs/ablations"
PAPER = {  # file in ROWS -> the paper's figures, on HC-STVG v1 test; of some there is only m_vIoU
    "base": dict(zip(COLUMNS, (25.6, 19.1, 20.2, 12.6), strict=True)),
    "sft": dict(zip(COLUMNS, (53.5, 28.6, 45.2, 21.9), strict=True)),
    "rft": dict(zip(COLUMNS, (58.5, 41.8, 68.7, 38.9), strict=True)),
    "rft_think": dict(zip(COLUMNS, (60.3, 44.1, 73.3, 43.5), strict=True)),
    "no_think_reward": dict(zip(COLUMNS, (59.3, 42.2, 69.1, 39.9), strict=True)),
    "giou_only": dict(zip(COLUMNS, (58.6, 40.6, 67.6, 36.6), strict=True)),
    "l1_only": dict(zip(COLUMNS, (58.5, 39.9, 67.0, 34.6), strict=True)),
    "lambda_0.2": {"m_vIoU": 42.5},
    "lambda_1.0": {"m_vIoU": 43.8},
}


@dataclass(frozen=True)
class Table:
    title: str
    rows: dict[str, str]  # file in ROWS -> how the row is called
    columns: tuple[str, ...] = COLUMNS


TABLES = (
    Table(
        "Table 5: from the base model to the whole method",
        {
            "base": "base model, untrained",
            "sft": "supervised fine-tuning",
            "rft": "RFT, no thinking boxes",
            "rft_think": "RFT + thinking boxes",
        },
    ),
    Table(
        "Table 6: the think reward",
        {"no_think_reward": "without the think reward", "rft_think": "with the think reward"},
    ),
    Table(
        "Table 7: the spatial reward",
        {"giou_only": "GIoU only", "l1_only": "L1 only", "rft_think": "GIoU + L1"},
    ),
    Table(
        "Table 8: the weight of the think reward",
        {"lambda_0.2": "λ = 0.2", "rft_think": "λ = 0.5", "lambda_1.0": "λ = 1.0"},
        ("m_vIoU",),
    ),
)


@dataclass(frozen=True)
class Run:
    folder: Path
    config: Config
    scores: Row  # after training, on the held-out split, protocol native, in percent
    row: str  # file in ROWS with these settings; empty: there is none


# ----------------------------------------------------------------------------------------------------------
# From folders to runs


def read_runs(paths: list[str | Path]) -> list[Run]:
    """Finished runs of train.py. Raises DataError that names the folder which is none."""
    known = known_rows()
    return [read_run(Path(path), known) for path in paths]


def known_rows() -> dict[str, dict]:
    """File in ROWS -> its distinction."""
    return {row: distinction(load_config(ROWS / f"{row}.yaml")) for row in PAPER}


def read_run(folder: Path, known: dict[str, dict]) -> Run:
    """known: as of known_rows."""
    for name in ("config.yaml", "summary.json"):
        if not (folder / name).is_file():
            raise DataError(
                f"{folder}: is no finished run of train.py (it has no {name}); wait for its end, finish"
                " it with resume=auto, or leave it out"
            )
    config, summary = load_config(folder / "config.yaml"), folder / "summary.json"
    content = read_json(str(summary))
    scores = get(str(summary), content, "after") if isinstance(content, dict) else None
    if not isinstance(scores, dict) or not scores.keys() >= set(COLUMNS):
        raise DataError(f"{summary}: holds no scores after training; was it written by train.py?")
    ours = distinction(config)
    return Run(folder, config, scores, next((row for row, theirs in known.items() if theirs == ours), ""))


def distinction(config: Config) -> dict:
    """What tells the rows of Tables 5-8 apart, by dotted names: whether there are steps, thinking boxes, and
    with which rewards it learns. A reward of one's own with weight 0 is only watched."""
    learns = {"steps": config.steps > 0, "sft.steps": config.sft.steps > 0, "think": config.think}
    if config.steps:
        used = {name: weight for name, weight in config.rewards.items() if weight or name in WEIGHTS}
        learns |= {f"rewards.{name}": weight for name, weight in used.items()}
    return learns


def compared_settings(config: Config) -> dict:
    """All settings that matter for the scores, by dotted names: those that must stay when a run goes on, and
    what it begins with, learns from, and for how long."""
    more = ("model", "train_annotations", "steps")
    return settings_of(config) | {name: getattr(config, name) for name in more}


def check_alike(runs: list[Run]) -> None:
    """Raises DataError where runs would be averaged, or compared, that differ in more than they should: those
    of one row in the seed, those of different rows in what may make up a row, and in the number of steps
    where one has none. The model may be another where one thinks and one does not: the toy's have learned
    different answers."""
    settings = [compared_settings(run.config) for run in runs]
    for (first, theirs), (run, ours) in itertools.combinations(zip(runs, settings, strict=True), 2):
        free = {"seed"} if run.row == first.row else {"seed", "think", "rewards", "sft"}
        if ours["think"] != theirs["think"]:
            free.add("model")
        if not (ours["steps"] and theirs["steps"]):
            free.add("steps")
        for key in {**ours, **theirs}:
            one, other = ours.get(key), theirs.get(key)
            if key.split(".")[0] not in free and one != other:
                raise DataError(
                    f"{run.folder}: {key} is {one}, in {first.folder} it is {other}; leave out one of them"
                )


# ----------------------------------------------------------------------------------------------------------
# From runs to tables


def format_tables(runs: list[Run]) -> str:
    """Tables 5-8 in Markdown, for each held-out split of the runs its own; below them the runs that are no
    row of theirs. Raises DataError as check_alike does."""
    parts = []
    for data in dict.fromkeys(run.config.eval_annotations for run in runs):
        rows: dict[str, list[Run]] = {}
        for run in runs:
            if run.config.eval_annotations == data:
                rows.setdefault(run.row, []).append(run)
        others = rows.pop("", [])
        check_alike([run for same in rows.values() for run in same])
        parts.append(
            f"After training, on {data}, protocol native; mean ± standard deviation of runs that differ in"
            " the seed. The paper's figures are of Qwen2.5-VL-7B on HC-STVG v1."
        )
        parts += [format_table(table, rows) for table in TABLES]
        if others:
            names = ", ".join(str(run.folder) for run in others)
            parts.append(f"In no row of these tables, since none has their settings: {names}")
    return "\n\n".join(parts)


def format_table(table: Table, runs: dict[str, list[Run]]) -> str:
    """One table in Markdown. runs: file in ROWS -> its runs."""
    lines = [["", "runs", *(head for column in table.columns for head in (column, "paper"))]]
    for row, name in table.rows.items():
        same = runs.get(row, [])
        cells = [
            cell
            for column in table.columns
            for cell in (average([run.scores[column] for run in same]), f"{PAPER[row][column]:.1f}")
        ]
        lines.append([name, str(len(same)), *cells])
    return f"{table.title}\n\n{markdown(lines)}"


def average(values: list[float]) -> str:
    """Mean ± sample standard deviation, of one value the value itself."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "not run"
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def markdown(lines: list[list[str]]) -> str:
    """A table in Markdown that is one in a terminal, too; the first of the lines is its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def main(paths: list[str | Path]) -> None:
    """Print the tables of these run folders. Raises DataError."""
    print(format_tables(read_runs(paths)))
