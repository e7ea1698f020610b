"""The five rewards of STVG-o1 (section 3.2), and a bench that scores a file of answers without any model.

    python rewards.py FILE.jsonl > scored.jsonl

Each line of the file is one JSON object; keys that are not listed here pass through untouched:

    {"completion": str,                                  the text to score
     "truth": {"span": [first, last],                    steps, inclusive
               "boxes": {"5": [x1, y1, x2, y2], ...}},   step -> box in [0, 1]
     "scale": [1000, 1000],                              optional: (width, height) that the text's boxes are
     "think": true}                                      divided by; false: answers without <think_bbox>

Each line of the output is the same object plus "rewards"; a summary goes to stderr. The bench always uses
the paper's weights: where lines hold "rewards" already, as a run's rollouts.jsonl do, they are replaced, and
so are the totals of a run with other weights.

**To try another reward, edit this file**: write a function of an answer and the truth, give it a weight in
WEIGHTS, and set terms["its name"] in `score`. Configuration, total, log, curves and this bench follow from
WEIGHTS. tests/test_rewards.py pins the paper's five: it will tell you what your term changes.

Bounds. For any text, and any truth with boxes in [0, 1]: format and consistency are 0 or 1, temporal is in
[0, 1], one box earns GIoU - L1 >= -1 - 4, so spatial is in [-5, 1] and think in [0, 6]. With the paper's
weights the total is in (-9, 5], without thinking boxes in (-4, 4]. It is exactly 5 (4) for a truth on the
text's integer grid that is written by format_answer, and exactly 0 for a text that is no answer.
"""

import json
import reprlib
import sys
from dataclasses import dataclass

from prompts import Answer, Box, Truth, from_text_box, parse_answer

WEIGHTS = {"format": 1.0, "consistency": 1.0, "temporal": 1.0, "spatial": 1.0, "think": 0.5}  # Eq. 10
REWARDS = tuple(WEIGHTS)
WEIGHTS |= {"giou": 1.0, "l1": 1.0}  # the two parts of the spatial reward, Eq. 8
# What is scored and logged: the rewards, with the spatial one apart for the two lists of boxes.
PARTS = {"spatial": ("spatial_think", "spatial_pred")}
TERMS = tuple(term for name in REWARDS for term in PARTS.get(name, (name,)))

Span = tuple[int, int]  # first and last step, inclusive; empty where last < first
MISSING: Box = (0.0, 0.0, 0.0, 0.0)  # stands for a box that the answer leaves out, and is not valid


# ----------------------------------------------------------------------------------------------------------
# Geometry of two boxes, xyxy in [0, 1]


def is_valid(box: Box) -> bool:
    """A box has an inside. (Two flipped sides would make a positive area, and a GIoU above 1.)"""
    x1, y1, x2, y2 = box
    return x1 < x2 and y1 < y2


def area(box: Box) -> float:
    x1, y1, x2, y2 = box
    return (x2 - x1) * (y2 - y1)


def intersection(a: Box, b: Box) -> float:
    """Area that two valid boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def iou(a: Box, b: Box) -> float:
    """Intersection over union, in [0, 1]; 0 where a box is not valid."""
    if not (is_valid(a) and is_valid(b)):
        return 0.0
    shared = intersection(a, b)
    return shared / (area(a) + area(b) - shared)


def giou(a: Box, b: Box) -> float:
    """Generalised IoU (Rezatofighi et al., 2019), in [-1, 1]; -1 where a box is not valid."""
    if not (is_valid(a) and is_valid(b)):
        return -1.0
    union = area(a) + area(b) - intersection(a, b)
    hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    return iou(a, b) - (hull - union) / hull


def l1(a: Box, b: Box) -> float:
    """Sum of the four coordinate differences, in [0, 4]."""
    return sum(abs(p - q) for p, q in zip(a, b, strict=True))


# ----------------------------------------------------------------------------------------------------------
# The rewards. Steps are never enumerated from the numbers of an answer: "0 - 99999" costs what "0 - 1" costs.


def consistency_reward(span: Span, *lists: tuple[tuple[int, Box], ...]) -> float:
    """1 if every list of boxes names exactly the steps of the span, in order and once each; else 0."""
    first, last = span
    return float(  # Eq. 4
        all(len(items) == last - first + 1 for items in lists)
        and all(step == first + k for items in lists for k, (step, _) in enumerate(items))
    )


def temporal_reward(span: Span, truth_span: Span) -> float:
    """IoU of two spans counted in steps, in [0, 1]. Where they share a step, their union is their hull."""
    shared = min(span[1], truth_span[1]) - max(span[0], truth_span[0]) + 1
    hull = max(span[1], truth_span[1]) - min(span[0], truth_span[0]) + 1
    return max(shared, 0) / hull  # Eq. 5


def common_steps(span: Span, truth: Truth) -> list[int]:
    """The steps in both spans (T∩ of Eq. 7) that have a truth box."""
    first, last = max(span[0], truth.span[0]), min(span[1], truth.span[1])
    return sorted(step for step in truth.boxes if first <= step <= last)


def spatial_reward(span: Span, boxes: dict[int, Box], truth: Truth, weights: dict = WEIGHTS) -> float:
    """Mean of GIoU - L1 over the common steps, in [-5, 1] with the paper's weights; 0 if there is none.

    That 0 is the paper's, and it is more than a bad box earns: until boxes are better than nothing, the
    reward pays for missing the interval (README, "Assumptions").
    """
    steps = common_steps(span, truth)
    pairs = [(boxes.get(step, MISSING), truth.boxes[step]) for step in steps]
    values = [weights["giou"] * giou(b, g) - weights["l1"] * l1(b, g) for b, g in pairs]  # Eq. 8
    return sum(values) / len(steps) if steps else 0.0  # Eq. 6 and 7


def think_reward(spatial_think: float, spatial_pred: float) -> float:
    """What the final boxes gain over the thinking boxes, in [0, 6] with the paper's weights."""
    return max(spatial_pred - spatial_think, 0.0)  # Eq. 9


def total_reward(terms: dict[str, float], weights: dict = WEIGHTS) -> float:
    """The weighted sum of the five rewards; giou and l1 have already had their say in the spatial terms."""
    rewards = terms | {"spatial": terms["spatial_think"] + terms["spatial_pred"]}
    return sum(weights[name] * rewards[name] for name in REWARDS)  # Eq. 10


# ----------------------------------------------------------------------------------------------------------
# From a text to its score


@dataclass(frozen=True)
class Score:
    answer: Answer | None  # None: the text does not parse
    rewards: dict[str, float]  # TERMS, unweighted (but for giou and l1), and "total"
    diagnostics: dict[str, float]  # see diagnose; for logs, no part of the reward


def score(
    completion: str,
    truth: Truth,
    scale: tuple[int, int] = (1000, 1000),
    weights: dict = WEIGHTS,
    think: bool = True,
) -> Score:
    """Score one answer: every term, the total, what to watch. Never raises for any text; bounds see above.

    scale: (width, height) that the text's coordinates are divided by (TextFormat.scale). weights: all of
    WEIGHTS or some. think: False for answers without thinking boxes, whose two terms are then 0. An answer
    whose span is empty (last step < first step) keeps, by the equations, its format reward alone.
    """
    weights = check_weights(weights)
    answer = parse_answer(completion, think)
    terms = dict.fromkeys((*TERMS, "total"), 0.0)
    if answer is None:
        return Score(None, terms, diagnose(None, truth, scale))
    span = (answer.start, answer.end)
    lists = (answer.think, answer.pred) if think else (answer.pred,)
    terms["format"] = 1.0  # Eq. 3: it has parsed
    terms["consistency"] = consistency_reward(span, *lists)
    terms["temporal"] = temporal_reward(span, truth.span)
    terms["spatial_pred"] = spatial_reward(span, boxes_by_step(answer.pred, scale), truth, weights)
    if think:
        terms["spatial_think"] = spatial_reward(span, boxes_by_step(answer.think, scale), truth, weights)
        terms["think"] = think_reward(terms["spatial_think"], terms["spatial_pred"])
    terms["total"] = total_reward(terms, weights)
    return Score(answer, terms, diagnose(answer, truth, scale))


def boxes_by_step(items: tuple[tuple[int, Box], ...], scale: tuple[int, int]) -> dict[int, Box]:
    """A list of the answer -> step: box in [0, 1]. Of a step that is named twice the first box counts."""
    return {step: from_text_box(box, scale) for step, box in reversed(items)}


def check_weights(weights: dict) -> dict[str, float]:
    """All of WEIGHTS, the given ones replaced. Raises ValueError for a name that is not in WEIGHTS, and for a
    value that is not a number from -1e6 to 1e6 (so that every reward stays finite)."""
    allowed = f"write numbers from -1e6 to 1e6 for any of {', '.join(WEIGHTS)}"
    for key, value in weights.items():
        if key not in WEIGHTS:
            raise ValueError(f"rewards: there is no weight {key!r}; {allowed}")
        if not _is_number(value, -1e6, 1e6):
            raise ValueError(f"rewards: the weight {key} is {reprlib.repr(value)}; {allowed}")
    return {key: float(weights.get(key, default)) for key, default in WEIGHTS.items()}


def diagnose(answer: Answer | None, truth: Truth, scale: tuple[int, int]) -> dict[str, float]:
    """What to watch beside the reward; all 0 for a text that does not parse.

    overlap        1 if the answer's span meets the truth's: falls when the policy learns to miss it
    span_ratio     steps of the answer / steps of the truth: falls when it learns to name one easy step only
    invalid_boxes  share of the listed boxes that have no inside
    copied         1 if the final boxes are the thinking boxes
    tiou           the temporal reward
    viou_think, viou_pred   sum of IoU over the common steps / steps of the union of the spans
    """
    names = ("overlap", "span_ratio", "invalid_boxes", "copied", "tiou", "viou_think", "viou_pred")
    if answer is None:
        return dict.fromkeys(names, 0.0)
    span, think = (answer.start, answer.end), answer.think or ()
    tiou = temporal_reward(span, truth.span)
    span_ratio = max(span[1] - span[0] + 1, 0) / (truth.span[1] - truth.span[0] + 1)
    listed = [from_text_box(box, scale) for _, box in (*think, *answer.pred)]
    invalid = sum(not is_valid(box) for box in listed) / len(listed)
    vious = [_viou(span, boxes_by_step(items, scale), truth) for items in (think, answer.pred)]
    values = (float(tiou > 0), span_ratio, invalid, float(answer.think == answer.pred), tiou, *vious)
    return dict(zip(names, values, strict=True))


def _viou(span: Span, boxes: dict[int, Box], truth: Truth) -> float:
    shared = sum(iou(boxes.get(step, MISSING), truth.boxes[step]) for step in common_steps(span, truth))
    return float(shared / (max(span[1], truth.span[1]) - min(span[0], truth.span[0]) + 1))


# ----------------------------------------------------------------------------------------------------------
# The bench


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_number(value: object, low: float, high: float, kind=int | float) -> bool:
    """A number in [low, high], which NaN is not; neither are JSON's true and false."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def read_truth(value: object) -> Truth:
    """The "truth" of a line, checked. Raises ValueError that says what to write instead."""
    form = '{"span": [first, last], "boxes": {"5": [x1, y1, x2, y2], ...}}'
    _require(isinstance(value, dict) and {"span", "boxes"} <= value.keys(), f'"truth": write {form}')
    span, boxes = value["span"], value["boxes"]
    integers = isinstance(span, list) and len(span) == 2 and all(_is_number(i, 0, 1e9, int) for i in span)
    remedy = "write [first, last], integers from 0, with first <= last"
    _require(integers and span[0] <= span[1], f"truth span {reprlib.repr(span)}: {remedy}")
    _require(isinstance(boxes, dict), f"truth boxes {reprlib.repr(boxes)}: write {form}")
    remedy = "write a step and numbers from 0 to 1 (shares of the frame), x1 <= x2, y1 <= y2"
    for step, box in boxes.items():
        good = step.isascii() and step.isdigit() and len(step) < 10
        good = good and isinstance(box, list) and len(box) == 4 and all(_is_number(v, 0, 1) for v in box)
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
    sizes = isinstance(scale, list) and len(scale) == 2 and all(_is_number(v, 1, 99999) for v in scale)
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


def main(path: str) -> None:
    """Score every line, then write: a file with a faulty line writes nothing. Errors name file and line."""
    rewards, output = [], []
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


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit()
    if len(sys.argv) != 2:
        sys.exit("usage: python rewards.py FILE.jsonl (what is in the file: see the top of rewards.py)")
    try:
        main(sys.argv[1])
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        place = error.filename or "standard output"
        sys.exit(f"error: {place}: {error.strerror}; check the path and the free space")
