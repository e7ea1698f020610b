"""FILE.jsonl is a rollouts.jsonl or predictions.jsonl of a run, or made by hand: one JSON object a line. Keys
that are not listed here pass through untouched:

    {"completion": str,                                  the text to score
     "truth": {"span": [first, last],                    steps, inclusive
               "boxes": {"5": [x1, y1, x2, y2], ...}},   step -> box in [0, 1]
     "scale": [1000, 1000],                              optional: (width, height) that the text's boxes are
                                                         divided by
     "think": true,                                      optional: false for answers without <think_bbox>;
                                                         if not given, as in --config
     "step": 1, "id": "clip 7"}                          optional: lines with the same two are a group

Each line of the output is the same object with new "rewards" and, in a group of two or more, "advantage". A
summary goes to stderr. With --html there are no lines; the page has the summary, and the answers with their
boxes of the groups where the reward and vIoU disagree most.
"""

import argparse
import itertools
import json
import reprlib
import sys
import textwrap
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

import rewards
from config import Config, ConfigError, load_config
from lab import exploits, page
from prompts import Answer, parse_answer
from rewards import TERMS, score
from runtime.files import DataError, iterate_jsonl, open_to_read, write_whole
from runtime.plugins import load_plugins, plugins
from samples import Truth

HEADS = ("reward", "mean", "min", "max", "spread", "vIoU r", "share", "decides")
LEGEND = (
    "spread: standard deviation within a group, mean over the groups. vIoU r: Spearman's rank correlation"
    " with the vIoU of the final boxes, over all answers. share: how much of the total's spread within groups"
    " is this term's, with its weight; the shares add up to 1, and that of a term that works against the rest"
    " is negative. decides: share of the groups with a spread in which the term has the largest share."
)
OPEN = 3  # of them that are not folded away
SHOWN = 20  # groups, or single answers, on a page
CELLS = 16  # steps of a clip that are drawn at most


@dataclass(frozen=True)
class Line:
    """What a line of the file says, checked."""

    completion: str
    truth: Truth
    scale: tuple[float, float]
    think: bool


@dataclass(frozen=True)
class Scored:
    """What is kept of a file of N answers: numbers, for a run leaves gigabytes of answers."""

    values: dict[str, np.ndarray]  # term, or "total" -> (N,)
    vious: np.ndarray  # (N,): vIoU of the final boxes
    parsed: int  # so many of the answers parse
    groups: list[list[int]]  # of two lines or more, by their numbers from 0
    advantages: np.ndarray  # (N,): Eq. 11; NaN for a line without a group


def is_number(value: object, low: float, high: float, kind=int | float) -> bool:
    """A number in [low, high], which NaN is not; neither are JSON's true and false."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def terms_of(weights: dict) -> tuple[str, ...]:
    return (*TERMS, *plugins(weights))


def weights_of_terms(weights: dict) -> dict[str, float]:
    """The weight of each term in the total."""
    spatial = dict.fromkeys(("spatial_think", "spatial_pred"), weights["spatial"])
    return {term: (weights | spatial)[term] for term in terms_of(weights)}


def main(arguments: list[str]) -> None:
    """Score every line, then read the file again and write: a file with a faulty line writes nothing.

    Raises UserError: DataError that names file and line, ConfigError, or what load_plugins raises. With
    --exploits RewardError; OSError where the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python rewards.py",
        description=rewards.__doc__,
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", metavar="FILE.jsonl", help="answers to score, as described below")
    parser.add_argument("--exploits", action="store_true", help="score a catalogue of cheats instead")
    words = "YAML files and key=value settings: whose `rewards` to use (default: the paper's)"
    parser.add_argument("--config", nargs="+", default=[], metavar="C", help=words)
    parser.add_argument("--html", metavar="OUT.html", help="write a page instead of lines")
    options = parser.parse_args(arguments)
    if options.file is None and options.config and options.config[-1].endswith(".jsonl"):
        options.file = options.config.pop()  # `--config C FILE.jsonl`
    if (options.file is None) != options.exploits or (options.exploits and options.html):
        parser.error("name a FILE.jsonl, perhaps with --html, or --exploits")
    config = read_config(options.config)
    load_plugins(config.rewards)
    if options.exploits:
        print(exploits.report(config.rewards, config.think))
        return
    with open_answers(options.file) as file:
        scored = score_file(file, config)
        table = term_table(scored, config.rewards)
        if options.html:
            write_whole(Path(options.html), draw_page(file, scored, table, config).encode())
        else:
            sys.stdout.writelines(output_lines(file, scored))
            sys.stdout.flush()
    print(summary(scored, table), file=sys.stderr)


def read_config(words: list[str]) -> Config:
    """The settings of --config. Raises ConfigError."""
    files = [word for word in words if "=" not in word]
    if words and not files:
        raise ConfigError(f"--config {words[0]}: name a YAML file first, such as configs/toy.yaml")
    return load_config(files, [word for word in words if "=" in word]) if words else Config()


# ----------------------------------------------------------------------------------------------------------
# From lines to scores


def open_answers(path: str) -> BinaryIO:
    """A file that can be read twice. Raises DataError."""
    file = open_to_read(path)
    if not file.seekable():
        file.close()
        raise DataError(f"{path}: is read twice, which a pipe cannot be; write it to a file first")
    return file


def read_records(file: BinaryIO) -> Iterator[dict]:
    """The objects of the file, one at a time from its beginning. Raises DataError."""
    file.seek(0)
    return iterate_jsonl(file, "completion", "truth")


def read_again(file: BinaryIO, scored: Scored) -> Iterator[tuple[int, dict]]:
    """The objects that were scored, numbered from 0; not those that a run has added since."""
    return zip(range(len(scored.vious)), read_records(file), strict=False)


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


def read_line(record: dict, think: bool) -> Line:
    """One object of the input, checked. think: where it does not say. Raises ValueError that says what to
    write instead."""
    completion, think = record["completion"], record.get("think", think)
    scale = record.get("scale", [1000, 1000])
    _require(isinstance(completion, str), f'"completion" is {reprlib.repr(completion)}: write a string')
    _require(isinstance(think, bool), f'"think" is {reprlib.repr(think)}: write true or false')
    sizes = isinstance(scale, list) and len(scale) == 2 and all(is_number(v, 1, 99999) for v in scale)
    _require(sizes, f'"scale" is {reprlib.repr(scale)}: write [width, height], numbers from 1 to 99999')
    return Line(completion, read_truth(record["truth"]), tuple(scale), think)


def score_file(file: BinaryIO, config: Config) -> Scored:
    """Score all lines, and see that they can be written. Raises DataError for the first that is faulty."""
    names = (*terms_of(config.rewards), "total")
    numbers, parsed, found = array("d"), 0, {}
    for k, record in enumerate(read_records(file)):
        try:
            line = read_line(record, config.think)
            scored = score(line.completion, line.truth, line.scale, config.rewards, line.think)
            output_line(record, scored.rewards)
        except ValueError as error:
            raise DataError(f"{file.name}, line {k + 1}: {error}") from error
        numbers.extend(scored.rewards[name] for name in names)
        numbers.append(scored.diagnostics["viou_pred"])
        parsed += scored.answer is not None
        if "id" in record:
            found.setdefault(group_key(record), []).append(k)
    *columns, vious = np.array(numbers).reshape(-1, len(names) + 1).T
    values = dict(zip(names, columns, strict=True))
    groups = [group for group in found.values() if len(group) > 1]
    advantages = advantages_of(values["total"], groups, config.scale_rewards)
    for k in itertools.chain(*groups):
        if not np.isfinite(advantages[k]):  # the rewards are finite, but not their differences
            wrong = f"the advantage is {advantages[k]}; write rewards that are nearer 0"
            raise DataError(f"{file.name}, line {k + 1}: {wrong}")
    return Scored(values, vious, parsed, groups, advantages)


def group_key(record: dict) -> str:
    """Equal for the answers to one prompt in one step."""
    return json.dumps([record.get("step"), record["id"]])


def advantages_of(totals: np.ndarray, groups: list[list[int]], scale_rewards: bool) -> np.ndarray:
    """(N,) -> (N,): Eq. 11 in every group; NaN for the lines without one."""
    advantages = np.full(len(totals), np.nan)
    if groups:
        import torch  # takes seconds, and predictions have no groups

        from grpo import group_advantages

        for group in groups:
            advantages[group] = group_advantages(torch.from_numpy(totals[group]), scale_rewards).numpy()
    return advantages


def output_line(record: dict, earned: dict[str, float], advantage: float | None = None) -> str:
    """An object as it goes out; an advantage of earlier rewards goes. Raises ValueError for what JSON cannot
    hold, such as a NaN that would pass through."""
    out = {key: value for key, value in record.items() if key != "advantage"} | {"rewards": earned}
    if advantage is not None:
        out["advantage"] = advantage
    try:
        return json.dumps(out, allow_nan=False) + "\n"
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be written as JSON: {error}") from error


def output_lines(file: BinaryIO, scored: Scored) -> Iterator[str]:
    """All lines as they go out."""
    for k, record in read_again(file, scored):
        earned = {name: float(of_all[k]) for name, of_all in scored.values.items()}
        advantage = float(scored.advantages[k])
        yield output_line(record, earned, None if np.isnan(advantage) else advantage)


# ----------------------------------------------------------------------------------------------------------
# What the terms do


def term_table(scored: Scored, weights: dict) -> list[list]:
    """A row for every term and for the total, in the order of HEADS; None where a number has no meaning."""
    if not len(scored.vious):
        return []
    shares, decides = shares_of(scored.values, scored.groups, weights)
    rows = []
    for name, of_all in scored.values.items():
        spread = spread_within(of_all, scored.groups) if scored.groups else None
        row = [of_all.mean(), of_all.min(), of_all.max(), spread, spearman(of_all, scored.vious)]
        row += [shares.get(name), decides.get(name)]
        rows.append([name, *(value if value is None else float(value) for value in row)])
    return rows


def centred(of_all: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    """(N,) -> (M,): the values in the groups, one group after the other, less the mean of their group."""
    values, sizes = of_all[np.concatenate(groups)], np.array([len(group) for group in groups])
    return values - np.repeat(sums(values, groups) / sizes, sizes)


def sums(values: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    """(M,) -> (groups,): sums over each group, of values that stand as those of centred."""
    return np.add.reduceat(values, np.cumsum([0, *(len(group) for group in groups[:-1])]))


def spread_within(of_all: np.ndarray, groups: list[list[int]]) -> float:
    """Standard deviation (n - 1) within a group, mean over the groups."""
    variances = sums(centred(of_all, groups) ** 2, groups) / [len(group) - 1 for group in groups]
    return float(np.sqrt(variances).mean())


def shares_of(
    values: dict[str, np.ndarray], groups: list[list[int]], weights: dict
) -> tuple[dict[str, float], dict[str, float]]:
    """What every term adds to the spread of the total within groups: cov(weighted term, total) / var(total),
    both summed over the groups; and in which share of the groups it adds most (equal ones share a group).

    values: term, or "total" -> (N,). Empty where no group has a spread.
    """
    if not groups:
        return {}, {}
    weight = weights_of_terms(weights)
    total = centred(values["total"], groups)
    spread = sums(total**2, groups)  # (groups,)
    if not (spread > 1e-12).any():
        return {}, {}
    products = np.array(  # (terms, groups)
        [w * sums(centred(values[name], groups) * total, groups) for name, w in weight.items()]
    )
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


def headline(scored: Scored, table: list[list]) -> list[str]:
    """The sentences above and below the table."""
    first = f"{len(scored.vious)} answers, {scored.parsed} of them parse; {len(scored.groups)} groups"
    r = table[-1][HEADS.index("vIoU r")] if table else None
    if r is not None and r < 0:
        return [first, f"The total falls where vIoU rises (r = {r:.2f}): this reward prefers worse answers."]
    return [first]


def cells(numbers: list[float | None]) -> list[str]:
    return ["-" if number is None else f"{number:.3f}" for number in numbers]


def summary(scored: Scored, table: list[list]) -> str:
    """For people, in a terminal."""
    first, *warning = headline(scored, table)
    if not table:
        return first
    width = max(len(row[0]) for row in table) + 2
    texts = [first, f"{HEADS[0]:<{width}}" + "".join(f"{head:>9}" for head in HEADS[1:])]
    for name, *numbers in table:
        texts.append(f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells(numbers)))
    return "\n".join([*texts, *textwrap.wrap(LEGEND, 108), *warning])


# ----------------------------------------------------------------------------------------------------------
# The page


def draw_page(file: BinaryIO, scored: Scored, table: list[list], config: Config) -> str:
    """The summary, and answers with their boxes: of the groups where the orders by total and by vIoU differ
    most, or, where there are none, the answers whose total ranks furthest above their vIoU."""
    totals, vious, groups = scored.values["total"], scored.vious, scored.groups
    if groups:
        agreement = [spearman(totals[group], vious[group]) for group in groups]
        order = sorted(range(len(groups)), key=lambda k: 1 if agreement[k] is None else agreement[k])
        chosen = [groups[k] for k in order[:SHOWN]]
        title = "Groups where the reward and vIoU disagree most"
    else:
        ahead = ranks(totals) - ranks(vious) if len(totals) else totals
        chosen = [[int(k)] for k in np.argsort(-ahead, kind="stable")[:SHOWN]]
        title = "Answers that the reward ranks furthest above their vIoU"
    first, *warning = headline(scored, table)
    weights = ", ".join(f"{name}: {weight:g}" for name, weight in config.rewards.items())
    terms = page.section(
        "Terms",
        page.paragraph(f"{file.name}, with the rewards {weights}. {first}."),
        page.table(list(HEADS), [[name, *cells(numbers)] for name, *numbers in table]),
        *map(page.paragraph, [LEGEND, *warning]),
    )
    wanted = {k for group in chosen for k in group}
    records = {k: record for k, record in read_again(file, scored) if k in wanted}
    parts = [draw_group(scored, {k: records[k] for k in group}, config.think) for group in chosen]
    more = [page.details(f"{len(parts) - OPEN} more", *parts[OPEN:])] if len(parts) > OPEN else []
    answers = page.section(title, page.legend(), *parts[:OPEN], *more)
    return page.document(f"Rewards of {Path(file.name).name}", terms + answers)


def draw_group(scored: Scored, records: dict[int, dict], think: bool) -> str:
    """The answers to one prompt, the best reward first. records: number of a line -> its object."""
    order = sorted(records, key=lambda k: -scored.values["total"][k])
    lines = [read_line(records[k], think) for k in order]
    answers = [parse_answer(line.completion, line.think) for line in lines]
    record, truth = records[order[0]], lines[0].truth
    names = [f"{key} {record[key]}" for key in ("step", "id") if key in record]
    steps = steps_to_draw(truth, answers)
    terms = [term for term in scored.values if term != "total"]
    rows, drawings = [], []
    for place, (k, line, answer) in enumerate(zip(order, lines, answers, strict=True)):
        label, total, viou = records[k].get("generation", place), scored.values["total"][k], scored.vious[k]
        advantage = None if np.isnan(scored.advantages[k]) else scored.advantages[k]
        rows.append([f"{label}", total, advantage, viou, *(scored.values[term][k] for term in terms)])
        drawings.append(
            page.paragraph(f"answer {label}: total {total:.2f}, vIoU {viou:.2f}")
            + page.tubes(line.truth, answer and answer.in_frame(line.scale), steps)
            + page.details("text", page.verbatim(line.completion))
        )
    sentence = [page.paragraph(str(record["sentence"]))] if "sentence" in record else []
    span = page.paragraph(f"The event is steps {truth.span[0]} to {truth.span[1]}.")
    title = page.heading(", ".join(names) or "an answer")
    table = page.table(["answer", "total", "advantage", "vIoU", *terms], rows)
    return "\n".join([title, *sentence, span, table, page.grid(*drawings)])


def steps_to_draw(truth: Truth, answers: list[Answer | None]) -> list[int]:
    """From the first to the last step of the truth and of the answers near it, CELLS of them at most."""
    first, last = truth.span
    spans = [answer.span for answer in answers if answer is not None]
    begin = max(min([first, *(span[0] for span in spans)]), first - CELLS // 2, 0)
    end = min(max([last, *(span[1] for span in spans)]), last + CELLS // 2)
    return sorted({round(step) for step in np.linspace(begin, end, min(CELLS, end - begin + 1))})
