"""Did it help? Compare finished runs: settings, held-out scores, reward terms, curves.

    python -m lab.compare RUN [RUN ...] [--output FOLDER]     RUN: an output_dir of train.py

Runs that differ in the seed alone are a group (runs/new_seed*). Printed are the settings in which groups
differ; held-out scores (protocol `native`) and reward terms, before -> after training, ± standard deviation
over the seeds; and how far each group is from the first, or a single one from its own start, sentence by
sentence. FOLDER (default: `compared` in the last run) gets a page, with curves. No reward is executed.

What the interval means: other held-out sentences, or other seeds, would have given another difference. Of 100
such intervals about 95 hold the difference over endless sentences and seeds. It has two parts:

    sentences   the percentile bootstrap: 10,000 times, as many sentences as there are, drawn with replacement
    seeds       each of these draws is moved at random, about as far as the runs of a group are apart, and
                further where there are few runs to tell that from (Student's t)

With one run a group nobody knows how far seeds are apart. Twice the sentences' part is then allowed for them,
as the toy needs (docs/lab.md); elsewhere that is a guess. "no difference shown" (the interval holds 0, or
there are fewer than 20 sentences) proves no equality, and of 20 equal pairs about one looks different.
"""

import hashlib
import itertools
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data import load_samples
from lab.tables import Run, markdown, mean_text, read_run, tables_of_rows
from metrics import COLUMNS, native_scores, summarize, tube_of
from rewards import TERMS
from runtime.files import DataError, is_number, read_jsonl, run_script, write_whole
from runtime.fingerprints import MAY_CHANGE
from runtime.plugins import plugin_names
from runtime.predictions import read_predictions
from samples import Sample

ASKED = ("eval_limit", "fps", "time_unit", "eval_temperature")  # what the held-out split was asked, and how
IGNORED = MAY_CHANGE - {"model", "train_annotations", "steps"} | {"seed"}
RESAMPLES, AT_ONCE, LEAST = 10_000, 100, 20  # of the bootstrap; in memory at once; sentences that it needs
VERDICT = ["difference [95 %]", ""]  # heads of the last two columns of a comparison
UNKNOWN_SEEDS = 2.0  # their part of the interval with one run a group, in standard errors of the sentences

Table = list[list[str]]  # the heads, then the rows


@dataclass(frozen=True, eq=False)
class Group:
    """K runs that differ in the seed alone."""

    name: str  # as shown
    runs: list[Run]
    settings: dict[str, str]
    values: dict[str, np.ndarray]  # COLUMNS (in percent) and reward terms: (K, 2, S), before and after


def read_groups(folders: list[Path]) -> list[Group]:
    """The runs in these folders. Raises DataError for runs that cannot be compared.

    A seed that comes again with the same settings begins another group: it may be the code that differs.
    """
    for k, folder in enumerate(folders):
        if any(folder.resolve() == other.resolve() for other in folders[:k]):
            raise DataError(f"{folder} is named twice; leave one out")
    runs = [read_run(folder) for folder in folders]
    first, config = runs[0], runs[0].config
    for run, key in itertools.product(runs, ASKED):
        if (other := getattr(run.config, key)) != (one := getattr(config, key)):
            other, one = (value or "all" if key == "eval_limit" else value for value in (other, one))
            raise DataError(f"{run.folder}: {key} is {other}, in {first.folder} {one}; leave one of them out")
    samples, _ = load_samples(config.dataset, config.eval_annotations, config.videos, config.vidor)
    samples = samples[: config.eval_limit or None]
    members: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        key = repr(settings_of(run))
        seeds = [other.config.seed for (k, _), group in members.items() if k == key for other in group]
        members.setdefault((key, seeds.count(run.config.seed)), []).append(run)
    groups = []
    for group in members.values():
        names = {re.sub(r"[-_.]*seed[-_]?\d+", "", str(run.folder)) for run in group}
        name = names.pop() if len(names) == 1 < len(group) else str(group[0].folder)
        name += f" ({len(group)} seeds)" if len(group) > 1 else ""
        values = [read_values(run, samples, first) for run in group]
        shared = [term for term in values[0] if all(term in one for one in values)]
        stacked = {term: np.stack([one[term] for one in values]) for term in shared}
        groups.append(Group(name, group, settings_of(group[0]), stacked))
    return groups


def settings_of(run: Run) -> dict[str, str]:
    """What can matter to a run, but for the seed: by dotted names, and the text of its reward files."""
    flat = {}
    for path in sorted((run.folder / "rewards").glob("*.py")):
        flat[f"rewards, text of {path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    for key, value in asdict(run.config).items():
        parts = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {}
        flat |= {} if key in IGNORED else parts or {key: value}
    return {key: str(value) for key, value in flat.items()}


def read_values(run: Run, samples: list[Sample], first: Run) -> dict[str, np.ndarray]:
    """name -> (2, S). Raises DataError where answers are missing or do not belong to `samples`, the sentences
    that the run `first` was asked."""
    columns: dict[str, list[float]] = {}
    for path in (run.folder / f"predictions{when}.jsonl" for when in ("_before", "")):
        if not path.is_file():
            raise DataError(f"{path}: there is no such file; train this run again, or leave it out")
        records = {record["id"]: record for record in read_predictions(path)}
        for sample in samples:
            truth, record = sample.truth(run.config.text_format.step_seconds), records.get(sample.id, {})
            boxes = {str(step): list(box) for step, box in truth.boxes.items()}
            if record.get("truth") != {"span": list(truth.span), "boxes": boxes}:
                asked = f"{sample.id!r} as it is in {first.config.eval_annotations} of {first.folder}"
                own = f"this run's split is {run.config.eval_annotations}; compare runs of one split"
                raise DataError(f"{path}: has no answer to {asked}; {own}")
            rewards = record.get("rewards")
            if not isinstance(rewards, dict) or not all(map(is_number, rewards.values())):
                raise DataError(f'{path}: "rewards" of {sample.id!r} must be numbers; leave this run out')
            row = summarize([native_scores(tube_of(record, sample, run.config), sample)])
            for name, value in ({name: row[name] for name in COLUMNS} | rewards).items():
                columns.setdefault(name, []).append(value)
    whole = {name: values for name, values in columns.items() if len(values) == 2 * len(samples)}
    return {name: np.array(values).reshape(2, -1) for name, values in whole.items()}


def intervals(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mean of second - first, and its 95 % interval as described above: (T, 3).

    first: (K, S, T), T values of S sentences in K runs; second: (L, S, T), of the same sentences.
    """
    rng, draws = np.random.default_rng(0), []
    differences = second.mean(axis=0) - first.mean(axis=0)  # (S, T)
    count, degrees = len(differences), len(first) + len(second) - 2
    for _ in range(RESAMPLES // AT_ONCE):
        places = rng.integers(count, size=(AT_ONCE, count)) + count * np.arange(AT_ONCE)[:, None]
        times = np.bincount(places.ravel(), minlength=AT_ONCE * count).reshape(AT_ONCE, count)
        draws.append(times @ differences / count)
    draws = np.concatenate(draws)  # (RESAMPLES, T)
    if degrees:
        squares = sum(values.mean(axis=1).var(axis=0) * len(values) for values in (first, second))  # (T,)
        seeds = np.sqrt(squares / degrees * (1 / len(first) + 1 / len(second)))
        moves = rng.standard_t(degrees, (RESAMPLES, 1))
    else:
        seeds, moves = UNKNOWN_SEEDS * draws.std(axis=0), rng.standard_normal((RESAMPLES, 1))
    bounds = np.percentile(draws + moves * seeds, [2.5, 97.5], axis=0)
    return np.array([differences.mean(axis=0), *bounds]).T


def comparison(groups: list[Group]) -> Table:
    """The table of two groups, or of one and its own start."""
    first, last = groups[0], groups[-1]
    unlike = unlike_terms(groups)
    names = list(dict.fromkeys([*first.values, *last.values]))
    both = [name for name in names if name in first.values.keys() & last.values.keys() - unlike]
    ends = (first, len(groups) - 1), (last, 1)  # 0: before training
    sides = [np.stack([group.values[name][:, when] for name in both], axis=2) for group, when in ends]
    found = dict(zip(both, intervals(*sides), strict=True))
    lines = [["", *(group.name for group in groups), *VERDICT]]
    for name in names:
        digits, more, less = (1, "better", "worse") if name in COLUMNS else (3, "higher", "lower")
        means = [group.values[name].mean(axis=2).T if name in group.values else [] for group in groups]
        cells = [" -> ".join(mean_text(values, digits) for values in pair) or "-" for pair in means]
        cells += ["", "other weights" if name in unlike else ""]
        if name in found:
            (_, low, high), enough = found[name], sides[0].shape[1] >= LEAST
            shown = more if enough and low > 0 else less if enough and high < 0 else "no difference shown"
            signed = (f"{number:+z.{digits}f}" for number in found[name])
            cells[-2:] = "{} [{}, {}]".format(*signed), shown
        lines.append([name, *cells])
    return lines


def unlike_terms(groups: list[Group]) -> set[str]:
    """The terms that other weights make another quantity: "total", in charts "reward"; R_spa."""
    changed = {row[0] for row in differences(groups)}
    unlike = {"total", "reward"} if any(key.startswith("rewards") for key in changed) else set()
    return unlike | ({*TERMS[3:]} if changed & {"rewards.giou", "rewards.l1"} else set())


def differences(groups: list[Group]) -> list[list[str]]:
    """Each setting in which groups differ, rewards first, with its values; "-" where a group has none."""
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    keys = sorted(keys, key=lambda key: not key.startswith("rewards"))
    rows = [[key, *(group.settings.get(key, "-") for group in groups)] for key in keys]
    return [row for row in rows if len({*row[1:]}) > 1 and not ("text of" in row[0] and "-" in row)]


def findings(groups: list[Group]) -> list[str | Table]:
    """What there is to say, in paragraphs and tables."""
    first, *others = groups
    count, split = first.values["m_tIoU"].shape[2], first.runs[0].config.eval_annotations
    parts = [f"{count} held-out sentences of {split}; before -> after training"]
    if rows := differences(groups):
        parts.append([["", *(group.name for group in groups)], *rows])
    elif others:
        parts.append("No setting differs. Does the code?")
    parts += [comparison([first, group]) for group in others] or [comparison(groups)]
    if len(first.runs) == 1 == min(len(group.runs) for group in others or groups):
        parts.append(
            "One run each: another seed alone may change as much, for which the intervals allow by a guess."
            "\nTo tell the reward from the seed, train two more of each: seed=1 output_dir=NAME_seed1, ..."
        )
    parts.append(tables_of_rows([run for group in groups for run in group.runs]))
    return [part for part in parts if part]


def report(groups: list[Group]) -> str:
    """The same as a text, tables in Markdown."""
    return "\n\n".join(part if isinstance(part, str) else markdown(part) for part in findings(groups))


def unlike_title(name: str, groups: list[Group]) -> str:
    """The title of a chart, which says what cannot be compared."""
    return f"{name} (other weights: not comparable)" if name in unlike_terms(groups) else name


def write_page(groups: list[Group], parts: list[str | Table], folder: Path) -> Path:
    """Write index.html and curves.png; returns the page. Raises ImportError without matplotlib."""
    from lab.page import WINDOW, fill
    from lab.pictures import CYCLE, Figure, save_figure, style

    curves: dict[str, list[tuple]] = {}  # what is shown -> group, steps, values
    for k, run in ((k, run) for k, group in enumerate(groups) for run in group.runs):
        lines = [m for m in read_jsonl(run.folder / "metrics.jsonl", "phase", "step") if m["phase"] == "grpo"]
        for name in ("reward", *TERMS, *plugin_names(run.config.rewards), "viou_pred", "kl", "length"):
            if points := [(line["step"], line[name]) for line in lines if name in line]:
                curves.setdefault(name, []).append((k, *zip(*points, strict=True)))

    def drawn(names: list[str], columns: int) -> Figure:
        rows, labels = -(-len(names) // columns), {}
        figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
        for place, name in enumerate(names, 1):
            axes = figure.add_subplot(rows, columns, place)
            for k, steps, values in curves[name]:
                means = [np.mean(values[max(0, n - WINDOW) : n]) for n in range(1, len(values) + 1)]
                (line,) = axes.plot(steps, means, color=CYCLE[k % len(CYCLE)])
                labels[groups[k].name.replace("$", r"\$")] = line
            axes.xaxis.get_major_locator().set_params(integer=True)
            style(axes, unlike_title(name, groups))
        figure.legend(labels.values(), labels, loc="outside lower center", frameon=False)
        return figure

    # On a narrow screen the verdict shall be seen without scrolling: it follows the name of the row.
    parts = [[[t[0], *t[-2:], *t[1:-2]] for t in p] if p[0][-2:] == VERDICT else p for p in parts]
    figures = {unlike_title(name, groups): drawn([name], 1) for name in curves}
    title = ", ".join(group.name for group in groups)
    how_to_read = f"over optimiser steps: means of the last {WINDOW}"
    page = fill(title, parts=parts, figures=figures, how_to_read=how_to_read, gains={})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "index.html", page.encode(errors="replace"))
    if curves:
        save_figure(drawn([*curves], 3), folder / "curves.png")
    return folder / "index.html"


def main(arguments: list[str]) -> None:
    parser = ArgumentParser("python -m lab.compare", description=__doc__)
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished run of train.py")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: `compared` in the last run")
    options = parser.parse_args(arguments)
    groups, folder = read_groups(options.runs), options.output or options.runs[-1] / "compared"
    print(report(groups), flush=True)
    try:
        print("\npage and curves:", write_page(groups, findings(groups), folder))
    except ImportError:
        print("\nfor a page and curves: pip install -r requirements-dev.txt")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]), "--output")
