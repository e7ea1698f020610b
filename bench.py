"""The reward bench: score a file of answers again, without any model (`python rewards.py FILE.jsonl`).

Each line of the file is one JSON object; keys that are not listed here pass through untouched:

    {"completion": str,                                  the text to score
     "truth": {"span": [first, last],                    steps, inclusive
               "boxes": {"5": [x1, y1, x2, y2], ...}},   step -> box in [0, 1]
     "scale": [1000, 1000],                              optional: (width, height) that the text's boxes are
                                                         divided by
     "think": true}                                      false: answers without <think_bbox>

Each line of the output is the same object plus "rewards"; a summary goes to stderr.
"""

import json
import reprlib
import sys

from prompts import Truth
from rewards import TERMS, is_number, score


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


def score_line(line: bytes) -> dict:
    """One line of the bench's input -> the object to write. Raises ValueError that says what is wrong."""
    try:
        record = json.loads(line, parse_constant=lambda name: _require(False, f"{name} is no JSON number"))
    except ValueError as error:
        where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"not valid JSON ({where}): write one JSON object a line") from error
    _require(isinstance(record, dict), 'not a JSON object: write {"completion": ..., "truth": ...}')
    for key in ("completion", "truth"):
        _require(key in record, f'"{key}" is missing')
    completion, think = record["completion"], record.get("think", True)
    scale = record.get("scale", [1000, 1000])
    _require(isinstance(completion, str), f'"completion" is {reprlib.repr(completion)}: write a string')
    _require(isinstance(think, bool), f'"think" is {reprlib.repr(think)}: write true or false')
    sizes = isinstance(scale, list) and len(scale) == 2 and all(is_number(v, 1, 99999) for v in scale)
    _require(sizes, f'"scale" is {reprlib.repr(scale)}: write [width, height], numbers from 1 to 99999')
    scored = score(completion, read_truth(record["truth"]), tuple(scale), think=think)
    return record | {"rewards": scored.rewards}


def summary(rewards: list[dict[str, float]]) -> str:
    """For people: how many answers, how many of them parse; mean, least and greatest value of every term."""
    lines = [f"{len(rewards)} answers, {sum(r['format'] for r in rewards):.0f} of them parse"]
    if rewards:
        lines.append(f"{'reward':<14}{'mean':>9}{'min':>9}{'max':>9}")
        for term in (*TERMS, "total"):
            values = [r[term] for r in rewards]
            mean = sum(values) / len(values)
            lines.append(f"{term:<14}{mean:>9.3f}{min(values):>9.3f}{max(values):>9.3f}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Score every line, then write: a file with a faulty line writes nothing. Errors name file and line."""
    path, rewards, output = arguments[0], [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = score_line(line)
                output.append(json.dumps(record, allow_nan=False) + "\n")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            rewards.append(record["rewards"])
    sys.stdout.write("".join(output))
    sys.stdout.flush()
    print(summary(rewards), file=sys.stderr)
