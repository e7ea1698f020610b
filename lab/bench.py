"""Show what each reward does in saved answers: mean, spread, decisions.

    python -m lab.bench FILE.jsonl [--config C ...]   rollouts.jsonl, predictions.jsonl, or lines of your own
    python -m lab.bench RUN [--config C ...]          RUN/rollouts.jsonl, with the weights in RUN/config.yaml
    python -m lab.bench ... --html PAGE.html          the same as a page for the browser

The answers are scored again, without any model. Each line is a JSON object:

    {"completion": str,                                  the text to score
     "truth": {"span": [first, last],                    steps, inclusive
               "boxes": {"5": [x1, y1, x2, y2], ...}},   step -> box in [0, 1]
     "scale": [1000, 1000],                              optional: what the text's boxes are divided by
     "think": true,                                      optional: false for answers without <think_bbox>
     "step": 1, "group": 0, "id": "clip 7",              optional: what is equal in all three makes a group;
     "generation": 0}                                    without "group", generation 0 begins a new one

The page adds the best and the worst answer of the groups with the largest spread: on frames if the
configuration names annotations with their "id" and videos, else on grey. It needs matplotlib.

Columns: the mean, minimum and maximum of a term, without its weight. spread: standard deviation within a
group, mean over the groups. vIoU r: Spearman's rank correlation with the vIoU of the final boxes, over all
answers. share: how much of the total's spread within groups is this term's, with its weight; the shares add
up to 1, and that of a term that works against the rest is negative. decides: share of the groups with a
spread in which the term has the largest share.
"""

import argparse
import dataclasses
import json
import sys
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import Config, load_config
from rewards import TERMS, score
from runtime.files import DataError, UserError, iterate_jsonl, run_script, write_whole
from runtime.plugins import load_plugins, plugins, plugins_note
from samples import Truth

FORM = (
    '"completion": a string, "truth": {"span": [first, last], "boxes": {"5": [x1, y1, x2, y2]}} (boxes in'
    ' [0, 1]), "scale": [width, height], "think": true or false'
)
GROUPS = 6  # on the page, at most
HINT = "\nThe columns are explained by python -m lab.bench --help."
HEADS = ("mean", "min", "max", "spread", "vIoU r", "share", "decides")


@dataclass(frozen=True)
class Scored:
    """What is kept of N answers: numbers, since a run leaves gigabytes of text."""

    values: np.ndarray  # (N, T + 1): the T terms of term_weights, then the total
    vious: np.ndarray  # (N,): vIoU of the final boxes
    parsed: int  # number of answers that parse
    groups: list[list[int]]  # the answers, counted from 0, of each group of two or more


def main(arguments: list[str]) -> None:
    """Raises DataError, which names file and record, ConfigError, RewardError."""
    parser = argparse.ArgumentParser(
        "python -m lab.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="FILE.jsonl | RUN", type=Path)
    words = "YAML files and key=value settings whose `rewards` to use (default: the run's, or the paper's)"
    parser.add_argument("--config", nargs="+", default=[], metavar="C", help=words)
    parser.add_argument("--html", type=Path, metavar="PAGE.html", help="write a page, too")
    options = parser.parse_args(arguments)
    path, words = options.path, options.config
    config = read_config(words)
    if path.is_dir():
        if not words:
            config = load_config(path / "config.yaml")
            print(plugins_note(config.rewards, path / "config.yaml"), end="", file=sys.stderr)
        path /= "rollouts.jsonl"
    scored = score_file(path, config)
    print(text := summary(scored, config.rewards))
    if options.html:
        write_page(options.html, text, path, scored, config)
        print("page:", options.html)


def read_config(words: list[str]) -> Config:
    """The settings of --config, with the plug-ins loaded. Raises ConfigError, or UserError for a plug-in."""
    config = load_config([word for word in words if "=" not in word], [word for word in words if "=" in word])
    load_plugins(config.rewards, config.think)
    return config


def term_weights(weights: dict) -> dict[str, float]:
    """The weight of each term in the total: TERMS, then the plug-ins."""
    weights = weights | dict.fromkeys(("spatial_think", "spatial_pred"), weights["spatial"])
    return {term: weights[term] for term in (*TERMS, *plugins(weights))}


def score_file(path: Path, config: Config) -> Scored:
    """Score every line, one at a time. Raises DataError, and RewardError if a plug-in fails."""
    numbers, parsed, starts, groups = array("d"), 0, Counter(), {}
    names = (*term_weights(config.rewards), "total")
    for k, record in enumerate(iterate_jsonl(path, "completion", "truth", skip_cut=True)):
        try:
            completion, truth, scale, think = read_record(record, config.think)
        except ValueError as error:
            raise DataError(f"{path}, record {k + 1}: {error}") from error
        scored = score(completion, truth, scale, config.rewards, think)
        numbers.extend([*(scored.rewards[name] for name in names), scored.diagnostics["viou_pred"]])
        parsed += scored.answer is not None
        if record.keys() & {"group", "id"}:
            key = json.dumps([record.get(name) for name in ("step", "group", "id")])
            # without its number, a second group of a sentence in a step begins with generation 0
            starts[key] += "group" not in record and record.get("generation") == 0
            groups.setdefault((key, starts[key]), []).append(k)
    values = np.array(numbers).reshape(-1, len(names) + 1)
    return Scored(values[:, :-1], values[:, -1], parsed, [g for g in groups.values() if len(g) > 1])


def read_record(record: dict, think: bool) -> tuple[str, Truth, tuple[float, float], bool]:
    """(completion, truth, scale, think) of a line. think: if the line does not say. Raises ValueError."""
    given = {"truth": record["truth"], "scale": record.get("scale", [1000, 1000])}
    given["think"] = record.get("think", think)
    try:
        (first, last), (width, height) = given["truth"]["span"], given["scale"]
        boxes = {int(step): tuple(map(float, box)) for step, box in given["truth"]["boxes"].items()}
        good = all(0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1 for x1, y1, x2, y2 in boxes.values())
        good = good and 0 <= first <= last and width > 0 < height and given["think"] in (True, False)
        good = good and isinstance(record["completion"], str)
    except (ValueError, TypeError, KeyError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"{json.dumps(given)[:200]} cannot be used; write {FORM}")
    return record["completion"], Truth((first, last), boxes), (width, height), given["think"]


def term_table(scored: Scored, weights: dict) -> dict[str, list[float]]:
    """term, and "total" -> a number for each of HEADS; NaN where it has no meaning."""
    values, terms = scored.values, term_weights(weights)
    spread, share, decides = within_groups(values, scored.groups, np.array([*terms.values()]))
    columns = [values.mean(axis=0), values.min(axis=0), values.max(axis=0), spread]
    columns += [[spearman(column, scored.vious) for column in values.T], [*share, np.nan], [*decides, np.nan]]
    return {name: [column[k] for column in columns] for k, name in enumerate((*terms, "total"))}


def within_groups(values: np.ndarray, groups: list[list[int]], weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Spread of each column (T + 1,), and of each term its share and how often it decides (T,), (T,).

    values: (N, T + 1), the terms and last their total. weights: (T,). A term's part of the spread in a group
    is the covariance of the weighted term with the total; equal largest parts share the decision. NaN without
    groups, or if no group has a spread.
    """
    nothing = np.full(len(weights), np.nan)
    if not groups:
        return np.append(nothing, np.nan), nothing, nothing
    centred = [values[group] - values[group].mean(axis=0) for group in groups]  # (G, T + 1) each
    spread = np.mean([np.sqrt((d**2).sum(axis=0) / (len(d) - 1)) for d in centred], axis=0)
    parts = weights * [d[:, -1] @ d[:, :-1] for d in centred]  # (groups, T)
    whole = np.array([d[:, -1] @ d[:, -1] for d in centred])  # (groups,)
    ordered = whole > 1e-12
    if not ordered.any():
        return spread, nothing, nothing
    shares = parts[ordered] / whole[ordered, None]
    largest = shares > shares.max(axis=1, keepdims=True) - 1e-9
    decides = (largest / largest.sum(axis=1, keepdims=True)).mean(axis=0)
    return spread, parts.sum(axis=0) / whole.sum(), decides


def ranks(values: np.ndarray) -> np.ndarray:
    """(N,) -> (N,): 1 for the least; equal values (but for rounding) share the mean of their ranks."""
    _, inverse, counts = np.unique(np.round(values, 9), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of (N,) and (N,), in [-1, 1]; NaN if one of them is constant."""
    p, q = (ranks(values) - (len(values) + 1) / 2 for values in (a, b))
    scale = np.sqrt((p @ p) * (q @ q))
    return float(p @ q / scale) if scale else np.nan


def summary(scored: Scored, weights: dict) -> str:
    lines = [f"{len(scored.vious)} answers, {scored.parsed} of them parse; {len(scored.groups)} groups"]
    if not len(scored.vious):
        return lines[0]
    table = term_table(scored, weights)
    width = max(map(len, table)) + 2
    lines.append(" " * width + "".join(f"{head:>9}" for head in HEADS))
    for name, numbers in table.items():
        cells = ("-" if np.isnan(number) else f"{number:z.3f}" for number in numbers)  # z: no -0.000
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
    if (r := table["total"][HEADS.index("vIoU r")]) < 0:
        lines.append(f"The total falls where vIoU rises (r = {r:.2f}): this reward prefers worse answers.")
    return "\n".join(lines) + HINT


def write_page(file: Path, text: str, path: Path, scored: Scored, config: Config) -> None:
    """Write the page. text: of `summary`. path: of the answers. Raises UserError, and OSError."""
    try:
        from lab import page, sheet
    except ImportError as error:
        raise UserError(f"--html: {error}; pip install -r requirements-dev.txt") from error
    totals, samples, cards = scored.values[:, -1], {}, []
    divided = sorted(scored.groups, key=lambda group: -totals[group].std())[:GROUPS]
    ends = [(group[totals[group].argmax()], group[totals[group].argmin()]) for group in divided]
    wanted, lines = set(sum(ends, ())), iterate_jsonl(path, "completion", "truth", skip_cut=True)
    records = {k: record for k, record in enumerate(lines) if k in wanted}
    for annotations in filter(None, (config.train_annotations, config.eval_annotations)):
        try:
            samples |= page.load_by_id(annotations, config)
        except (UserError, OSError) as error:
            print(f"no frames: {error}", file=sys.stderr)
    for pair in ends:
        answers = []
        for k, title in zip(pair, ("BEST", "WORST"), strict=True):
            rewards = dict(zip((*term_weights(config.rewards), "total"), scored.values[k], strict=True))
            record = {"scale": [1000, 1000], "think": config.think} | records[k] | {"rewards": rewards}
            own, scores = dataclasses.replace(config, think=record["think"]), {"reward": rewards["total"]}
            answers.append(sheet.show_answer(record, title, scores | {"vIoU": scored.vious[k]}, own))
        if sample := samples.get(record.get("id")):
            sentence, clip = sample.sentence, sheet.read_shown_clip(sample, config.text_format.step_seconds)
        else:
            sentence, clip = record.get("sentence", "sentence not known"), sheet.grey_clip(answers)
        cards.append(sheet.Card(sentence, record.get("id", "no id"), clip, answers))
    words = "The best and the worst answer of the groups with the largest spread"
    unread = page.unread_note(cards)
    said = {"printed": text.removesuffix(HINT), "explained": __doc__.rpartition("\n\n")[2]}
    content = page.fill(f"Rewards of {path}", unread=unread, **said, cards_are=words, cards=cards)
    write_whole(file, content.encode(errors="replace"))


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]), "standard output")
