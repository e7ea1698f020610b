"""FILE.jsonl is a rollouts.jsonl or predictions.jsonl of a run, or made by hand: one JSON object a line. Keys
that are not listed here pass through untouched:

    {"completion": str,                                  the text to score
     "truth": {"span": [first, last],                    steps, inclusive
               "boxes": {"5": [x1, y1, x2, y2], ...}},   step -> box in [0, 1]
     "scale": [1000, 1000],                              optional: (width, height) that the text's boxes are
                                                         divided by
     "think": true,                                      false: answers without <think_bbox>
     "step": 1, "id": "clip 7"}                          optional: lines with the same two are a group

Each line of the output is the same object with new "rewards" and, in a group of two or more, "advantage". A
summary goes to stderr. With --html there are no lines; the page has the summary, and the answers with their
boxes of the groups where the reward and vIoU disagree most.
"""

import argparse
import json
import reprlib
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import exploits
import page
import rewards
from config import Config, ConfigError, load_config
from files import DataError, read_jsonl, write_whole
from prompts import Truth
from rewards import PARTS, REWARDS, Score, is_number, plugins, score, terms_of

HEADS = ("reward", "mean", "min", "max", "spread", "vIoU r", "share", "decides")
LEGEND = (
    "spread: standard deviation within a group, mean over the groups. vIoU r: Spearman's rank correlation"
    " with the vIoU of the final boxes, over all answers. share: how much of the total's spread within groups"
    " is this term's, with its weight; the shares add up to 1, and that of a term that works against the rest"
    " is negative. decides: share of the groups with a spread in which the term has the largest share."
)
SHOWN = 20  # groups, or single answers, on a page
CELLS = 16  # steps of a clip that are drawn at most


@dataclass(frozen=True)
class Line:
    """One line of the file, scored."""

    record: dict  # as it goes out
    truth: Truth
    score: Score


def main(arguments: list[str]) -> None:
    """Score every line, then write: a file with a faulty line writes nothing. Raises DataError that names
    file and line, ConfigError, RewardError, and OSError where the page cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python rewards.py",
        description=rewards.__doc__,
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", metavar="FILE.jsonl", help="answers to score, as described below")
    what.add_argument("--exploits", action="store_true", help="score a catalogue of cheats instead")
    words = "YAML files and key=value settings: whose `rewards` to use (default: the paper's)"
    parser.add_argument("--config", nargs="+", default=[], metavar="C", help=words)
    parser.add_argument("--html", metavar="OUT.html", help="write a page instead of lines")
    options = parser.parse_args(arguments)
    if options.exploits and options.html:
        parser.error("--html goes with FILE.jsonl")
    config = read_config(options.config)
    if options.exploits:
        print(exploits.report(config.rewards, config.think))
        return
    lines, groups = score_file(Path(options.file), config)
    table = term_table(lines, groups, config.rewards)
    if options.html:
        write_whole(Path(options.html), draw_page(options.file, lines, groups, table).encode())
    else:
        sys.stdout.write("".join(output_lines(options.file, lines)))
        sys.stdout.flush()
    print(summary(lines, groups, table), file=sys.stderr)


def read_config(words: list[str]) -> Config:
    """The settings of --config. Raises ConfigError."""
    files = [word for word in words if "=" not in word]
    if words and not files:
        raise ConfigError(f"--config {words[0]}: name a YAML file first, such as configs/toy.yaml")
    return load_config(files, [word for word in words if "=" in word]) if words else Config()


# ----------------------------------------------------------------------------------------------------------
# From lines to scores


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def read_truth(value: object) -> Truth:
    """The "truth" of a line, checked. Raises ValueError that says what to write instead."""
    form = '{"span": [first, last], "boxes": {"5": [x1, y1, x2, y2], ...}}'
    _require(isinstance(value, dict) and {"span", "boxes"} <= value.keys(), f'"truth": write {form}')
    span, boxes = value["span"], value["boxes"]
    integers = isinstance(span, list) and len(span) == 2 and all(is_number(i, 0, 1e9, int) for i in span)
    remedy = "write [first, last], integers from 0, with first <= last"
    _require(integers and span[0] <= span[1], f"truth span {reprlib.repr(span)}: {remedy}")
    _require(isinstance(boxes, dict), f"truth boxes {reprlib.repr(boxes)}: write {form}")
    remedy = "write a step and numbers from 0 to 1 (shares of the frame), x1 <= x2, y1 <= y2"
    for step, box in boxes.items():
        good = step.isascii() and step.isdigit() and len(step) < 10
        good = good and isinstance(box, list) and len(box) == 4 and all(is_number(v, 0, 1) for v in box)
        good = good and box[0] <= box[2] and box[1] <= box[3]
        _require(good, f"truth box {reprlib.repr(step)}: {reprlib.repr(box)}: {remedy}")
    return Truth(tuple(span), {int(step): tuple(map(float, box)) for step, box in boxes.items()})


def score_record(record: dict, weights: dict) -> Line:
    """Score one object of the input; an advantage of earlier rewards goes. Raises ValueError that says what
    is wrong with it, or with a reward of one's own."""
    completion, think = record["completion"], record.get("think", True)
    scale = record.get("scale", [1000, 1000])
    _require(isinstance(completion, str), f'"completion" is {reprlib.repr(completion)}: write a string')
    _require(isinstance(think, bool), f'"think" is {reprlib.repr(think)}: write true or false')
    sizes = isinstance(scale, list) and len(scale) == 2 and all(is_number(v, 1, 99999) for v in scale)
    _require(sizes, f'"scale" is {reprlib.repr(scale)}: write [width, height], numbers from 1 to 99999')
    truth = read_truth(record["truth"])
    scored = score(completion, truth, tuple(scale), weights, think)
    _require(not scored.fault, scored.fault)
    kept = {key: value for key, value in record.items() if key != "advantage"}
    return Line(kept | {"rewards": scored.rewards}, truth, scored)


def score_file(path: Path, config: Config) -> tuple[list[Line], list[list[int]]]:
    """All lines, with advantages, and the groups: lists of their numbers, from 0. Raises DataError."""
    lines = []
    for number, record in enumerate(read_jsonl(path, "completion", "truth"), 1):
        try:
            lines.append(score_record(record, config.rewards))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    groups = groups_of([line.record for line in lines])
    if groups:
        add_advantages(lines, groups, config.scale_rewards)
    return lines, groups


def groups_of(records: list[dict]) -> list[list[int]]:
    """The answers to one prompt in one step: where they stand. Lines without an "id" belong to no group."""
    found = {}
    for k, record in enumerate(records):
        if "id" in record:
            found.setdefault(json.dumps([record.get("step"), record["id"]]), []).append(k)
    return [group for group in found.values() if len(group) > 1]


def add_advantages(lines: list[Line], groups: list[list[int]], scale_rewards: bool) -> None:
    """Give every line of a group its "advantage" (Eq. 11)."""
    import torch  # takes seconds, and predictions have no groups

    from grpo import group_advantages

    for group in groups:
        totals = torch.tensor([lines[k].score.rewards["total"] for k in group], dtype=torch.float64)
        for k, advantage in zip(group, group_advantages(totals, scale_rewards).tolist(), strict=True):
            lines[k].record["advantage"] = advantage


def output_lines(path: str, lines: list[Line]) -> list[str]:
    """Raises DataError for what JSON cannot hold, such as a NaN that was passed through."""
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(json.dumps(line.record, allow_nan=False) + "\n")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: cannot be written as JSON: {error}") from error
    return texts


# ----------------------------------------------------------------------------------------------------------
# What the terms do


def term_table(lines: list[Line], groups: list[list[int]], weights: dict) -> list[list]:
    """A row for every term and for the total, in the order of HEADS; None where a number has no meaning."""
    if not lines:
        return []
    values = {
        name: np.array([line.score.rewards[name] for line in lines]) for name in (*terms_of(weights), "total")
    }
    vious = np.array([line.score.diagnostics["viou_pred"] for line in lines])
    shares, decides = shares_of(values, groups, weights)
    rows = []
    for name, of_all in values.items():
        spread = np.mean([of_all[group].std(ddof=1) for group in groups]) if groups else None
        row = [of_all.mean(), of_all.min(), of_all.max(), spread, spearman(of_all, vious)]
        row += [shares.get(name), decides.get(name)]
        rows.append([name, *(value if value is None else float(value) for value in row)])
    return rows


def shares_of(
    values: dict[str, np.ndarray], groups: list[list[int]], weights: dict
) -> tuple[dict[str, float], dict[str, float]]:
    """What every term adds to the spread of the total within groups: cov(weighted term, total) / var(total),
    both summed over the groups; and in which share of the groups it adds most (equal ones share a group).

    values: term, or "total" -> (N,). Empty where no group has a spread.
    """
    weight = {
        part: weights[name] for name in (*REWARDS, *plugins(weights)) for part in PARTS.get(name, [name])
    }
    centred = {
        name: [of_all[group] - of_all[group].mean() for group in groups] for name, of_all in values.items()
    }
    totals = centred["total"]
    spread = np.array([total @ total for total in totals])  # (groups,)
    if not (spread > 1e-12).any():
        return {}, {}
    products = np.array(
        [
            [w * (own @ total) for own, total in zip(centred[name], totals, strict=True)]
            for name, w in weight.items()
        ]
    )  # (terms, groups)
    shares = products.sum(axis=1) / spread.sum()
    within = products[:, spread > 1e-12] / spread[spread > 1e-12]
    largest = within > within.max(axis=0) - 1e-9
    decides = (largest / largest.sum(axis=0)).mean(axis=1)
    return dict(zip(weight, shares, strict=True)), dict(zip(weight, decides, strict=True))


def ranks(values: np.ndarray) -> np.ndarray:
    """(N,) -> (N,): 1 for the least; equal values share the mean of their ranks. What differs by rounding
    alone is equal."""
    _, inverse, counts = np.unique(np.round(values, 9), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation of (N,) and (N,), in [-1, 1]: Pearson's of the ranks. None where one is constant."""
    p, q = (ranks(values) - (len(values) + 1) / 2 for values in (a, b))
    scale = np.sqrt((p @ p) * (q @ q))
    return float(p @ q / scale) if scale else None


def headline(lines: list[Line], groups: list[list[int]], table: list[list]) -> list[str]:
    """The sentences above and below the table."""
    parsed = sum(line.score.answer is not None for line in lines)
    first = f"{len(lines)} answers, {parsed} of them parse; {len(groups)} groups"
    r = table[-1][HEADS.index("vIoU r")] if table else None
    if r is not None and r < 0:
        return [first, f"The total falls where vIoU rises (r = {r:.2f}): this reward prefers worse answers."]
    return [first]


def cells(numbers: list[float | None]) -> list[str]:
    return ["-" if number is None else f"{number:.3f}" for number in numbers]


def summary(lines: list[Line], groups: list[list[int]], table: list[list]) -> str:
    """For people, in a terminal."""
    first, *warning = headline(lines, groups, table)
    if not table:
        return first
    width = max(len(row[0]) for row in table) + 2
    texts = [first, f"{HEADS[0]:<{width}}" + "".join(f"{head:>9}" for head in HEADS[1:])]
    for name, *numbers in table:
        texts.append(f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells(numbers)))
    return "\n".join([*texts, *textwrap.wrap(LEGEND, 108), *warning])


# ----------------------------------------------------------------------------------------------------------
# The page


def draw_page(name: str, lines: list[Line], groups: list[list[int]], table: list[list]) -> str:
    """The summary, and answers with their boxes: of the groups where the orders by total and by vIoU differ
    most, or, where there are none, the answers whose total ranks furthest above their vIoU."""
    totals = np.array([line.score.rewards["total"] for line in lines])
    vious = np.array([line.score.diagnostics["viou_pred"] for line in lines])
    if groups:
        agreement = [spearman(totals[group], vious[group]) for group in groups]
        order = sorted(range(len(groups)), key=lambda k: 1 if agreement[k] is None else agreement[k])
        chosen = [groups[k] for k in order[:SHOWN]]
        title = "Groups where the reward and vIoU disagree most"
    else:
        ahead = ranks(totals) - ranks(vious) if lines else totals
        chosen = [[k] for k in np.argsort(-ahead, kind="stable")[:SHOWN]]
        title = "Answers that the reward ranks furthest above their vIoU"
    first, *warning = headline(lines, groups, table)
    terms = page.section(
        "Terms",
        page.paragraph(first),
        page.table(list(HEADS), [[name, *cells(numbers)] for name, *numbers in table]),
        *map(page.paragraph, [LEGEND, *warning]),
    )
    parts = [draw_group([lines[k] for k in group]) for group in chosen]
    answers = page.section(title, page.legend(), *parts)
    return page.document(f"Rewards of {Path(name).name}", terms + answers)


def draw_group(lines: list[Line]) -> str:
    """The answers to one prompt, the best reward first."""
    lines = sorted(lines, key=lambda line: -line.score.rewards["total"])
    record, truth = lines[0].record, lines[0].truth
    names = [f"{key} {record[key]}" for key in ("step", "id") if key in record]
    steps = steps_to_draw(lines)
    heads = ["answer", "total", "advantage", "vIoU"]
    heads += [term for term in lines[0].score.rewards if term != "total"]
    rows, drawings = [], []
    for k, line in enumerate(lines):
        earned = dict(line.score.rewards)
        total, viou = earned.pop("total"), line.score.diagnostics["viou_pred"]
        label = f"{line.record.get('generation', k)}"
        rows.append([label, total, line.record.get("advantage"), viou, *earned.values()])
        scale = tuple(line.record.get("scale", (1000, 1000)))
        answer = line.score.answer and line.score.answer.in_frame(scale)
        drawings.append(
            page.paragraph(f"answer {label}: total {total:.2f}, vIoU {viou:.2f}")
            + page.tubes(line.truth, answer, steps)
            + page.details("text", page.verbatim(line.record["completion"]))
        )
    sentence = [page.paragraph(str(record["sentence"]))] if "sentence" in record else []
    span = page.paragraph(f"The event is steps {truth.span[0]} to {truth.span[1]}.")
    title = page.heading(", ".join(names) or "an answer")
    return "\n".join([title, *sentence, span, page.table(heads, rows), page.grid(*drawings)])


def steps_to_draw(lines: list[Line]) -> list[int]:
    """From the first to the last step of the truth and of the answers near it, CELLS of them at most."""
    first, last = lines[0].truth.span
    spans = [line.score.answer.span for line in lines if line.score.answer is not None]
    begin = max(min([first, *(span[0] for span in spans)]), first - CELLS // 2, 0)
    end = min(max([last, *(span[1] for span in spans)]), last + CELLS // 2)
    return sorted({round(step) for step in np.linspace(begin, end, min(CELLS, end - begin + 1))})
