"""The five rewards of STVG-o1 (section 3.2): what an answer is worth.

    python rewards.py FILE.jsonl [CONFIG.yaml ...] > scored.jsonl      score saved answers; needs no model

**To try another reward**, write a function of an answer and the truth in a file of yours, and name it, with
its weight, beside the paper's five:

    def smoothness(answer, truth):                 # my_rewards.py
        ...

    rewards: {think: 0.5, my_rewards.py:smoothness: 0.2}

It gets what the functions below get: an Answer whose boxes are in [0, 1] of the frame, and the Truth. What
these may hold, and what a reward is tried on before training, stands in README.md, "Another reward". It may
import everything here (`from rewards import giou, common_steps`). Weight 0 only logs it.

Bounds, for any text and any truth with boxes in [0, 1]: format and consistency are 0 or 1; temporal is in
[0, 1]; a box earns GIoU - L1 >= -1 - 4, so spatial is in [-5, 1] and think in [0, 6]. With the paper's
weights the total is in (-9, 5], without thinking boxes in (-4, 4]. It is 5 (4) exactly for a truth on the
text's integer grid written by format_answer, and 0 for a text that is no answer.
"""

import difflib
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from prompts import Answer, parse_answer
from runtime.files import ConfigError, read_jsonl, read_yaml, run_script
from runtime.plugins import RewardError, call_plugin, load_plugins, plugins
from samples import Box, Truth

# Eq. 10, and within the spatial reward Eq. 8.
WEIGHTS = {"format": 1.0, "consistency": 1.0, "temporal": 1.0, "spatial": 1.0, "think": 0.5} | {
    "giou": 1.0,
    "l1": 1.0,
}
# What is scored and logged: the spatial reward apart for the two lists of boxes.
TERMS = ("format", "consistency", "temporal", "spatial_think", "spatial_pred", "think")
MISSING: Box = (0.0, 0.0, 0.0, 0.0)  # stands for a box that the answer leaves out; it is not valid


# ----------------------------------------------------------------------------------------------------------
# Geometry of two boxes, xyxy in [0, 1]


def is_valid(box: Box) -> bool:
    """Whether the box has an inside. (Two flipped sides would give a positive area, and a GIoU above 1.)"""
    x1, y1, x2, y2 = box
    return x1 < x2 and y1 < y2


def area(box: Box) -> float:
    x1, y1, x2, y2 = box
    return (x2 - x1) * (y2 - y1)


def intersection(a: Box, b: Box) -> float:
    """Area that two valid boxes share; in the units of `area`."""
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
# The rewards: functions of an answer (its boxes in [0, 1] of the frame) and the truth. They never loop over
# the steps that an answer names, so that "0 - 99999" costs what "0 - 1" costs.


def consistency_reward(answer: Answer, truth: Truth) -> float:
    """1 if every list of boxes names the steps of the span, each once and in order; else 0 (Eq. 4)."""
    lists = [answer.pred] if answer.think is None else [answer.think, answer.pred]
    length = answer.end - answer.start + 1
    return float(
        all(len(items) == length for items in lists)
        and all(step == answer.start + k for items in lists for k, (step, _) in enumerate(items))
    )


def temporal_reward(answer: Answer, truth: Truth) -> float:
    """IoU of the two spans, in steps (Eq. 5). Where they share a step, their union is their hull."""
    shared = min(answer.end, truth.span[1]) - max(answer.start, truth.span[0]) + 1
    hull = max(answer.end, truth.span[1]) - min(answer.start, truth.span[0]) + 1
    return max(shared, 0) / hull


def common_steps(answer: Answer, truth: Truth) -> list[int]:
    """The steps in both spans (T∩ of Eq. 7) that have a truth box."""
    first, last = max(answer.start, truth.span[0]), min(answer.end, truth.span[1])
    return sorted(step for step in truth.boxes if first <= step <= last)


def spatial_reward(answer: Answer, truth: Truth, which: str = "pred", weights: dict = WEIGHTS) -> float:
    """R_spa of one list of boxes, "pred" or "think": the mean of GIoU - L1 over the common steps (Eq. 6-8).

    In [-5, 1] with the paper's weights, and 0 without a common step. That 0 is the paper's, and it is more
    than a bad box earns: until boxes are better than nothing, the reward pays for missing the interval.
    """
    boxes, steps = getattr(answer, f"{which}_boxes"), common_steps(answer, truth)
    pairs = [(boxes.get(step, MISSING), truth.boxes[step]) for step in steps]
    values = [weights["giou"] * giou(b, g) - weights["l1"] * l1(b, g) for b, g in pairs]  # Eq. 8
    return sum(values) / len(values) if values else 0.0  # Eq. 6 and 7


def think_reward(answer: Answer, truth: Truth, weights: dict = WEIGHTS) -> float:
    """What the final boxes gain over the thinking boxes; in [0, 6] with the paper's weights (Eq. 9)."""
    pred, think = (spatial_reward(answer, truth, which, weights) for which in ("pred", "think"))
    return max(pred - think, 0.0)


def total_reward(terms: dict[str, float], weights: dict = WEIGHTS) -> float:
    """The weighted sum of the five rewards (Eq. 10) and of the plug-ins."""
    rewards = terms | {"spatial": terms["spatial_think"] + terms["spatial_pred"]}
    five = ("format", "consistency", "temporal", "spatial", "think")
    return sum(weights[name] * rewards[name] for name in (*five, *plugins(weights)))


# ----------------------------------------------------------------------------------------------------------
# From a text to its score


@dataclass(frozen=True)
class Score:
    answer: Answer | None  # in the numbers of the text; None: the text does not parse
    rewards: dict[str, float]  # TERMS and plug-ins, each without its weight, and "total"
    diagnostics: dict[str, float]  # of `diagnose`; logged, no part of the reward


def score(
    completion: str,
    truth: Truth,
    scale: tuple[int, int] = (1000, 1000),
    weights: dict = WEIGHTS,
    think: bool = True,
) -> Score:
    """Score one answer. No text makes it raise; a plug-in may: RewardError, which names it and the answer.

    scale: (width, height) that divides the text's coordinates (TextFormat.scale). weights: any of WEIGHTS,
    and each FILE.py:FUNCTION that load_plugins has loaded. think: False for answers without thinking boxes;
    their two terms are then 0. An answer whose span is empty (last step < first step) keeps its format
    reward alone.
    """
    weights = WEIGHTS | weights
    parsed = parse_answer(completion, think)
    terms = dict.fromkeys((*TERMS, *plugins(weights), "total"), 0.0)
    if parsed is None:
        return Score(None, terms, diagnose(None, truth, scale))
    answer = parsed.in_frame(scale)
    terms["format"] = 1.0  # Eq. 3: it has parsed
    terms["consistency"] = consistency_reward(answer, truth)
    terms["temporal"] = temporal_reward(answer, truth)
    terms["spatial_pred"] = spatial_reward(answer, truth, "pred", weights)
    if think:
        terms["spatial_think"] = spatial_reward(answer, truth, "think", weights)
        terms["think"] = think_reward(answer, truth, weights)
    for name in plugins(weights):
        terms[name] = call_plugin(name, answer, truth, completion)
    terms["total"] = total_reward(terms, weights)
    if not math.isfinite(terms["total"]):  # a weight or a plug-in's value is too large
        raise RewardError(f"the total reward is {terms['total']} ({terms}); the answer was {completion!r}")
    return Score(parsed, terms, diagnose(parsed, truth, scale))


def diagnose(parsed: Answer | None, truth: Truth, scale: tuple[int, int]) -> dict[str, float]:
    """What to watch beside the reward (docs/glossary.md); all 0 for a text that does not parse."""
    names = ("overlap", "span_ratio", "one_step", "invalid_boxes", "out_of_frame", "copied", "think_gap")
    names += ("tiou", "viou_think", "viou_pred")
    if parsed is None:
        return dict.fromkeys(names, 0.0)
    answer = parsed.in_frame(scale)
    text_boxes = [box for _, box in (*(parsed.think or ()), *parsed.pred)]
    boxes = [box for _, box in (*(answer.think or ()), *answer.pred)]
    steps = answer.end - answer.start + 1
    gap = 0.0
    if answer.think is not None:
        gap = spatial_reward(answer, truth, "pred") - spatial_reward(answer, truth, "think")
    tiou = temporal_reward(answer, truth)
    values = (
        float(tiou > 0),  # the span meets the truth's
        max(steps, 0) / (truth.span[1] - truth.span[0] + 1),
        float(steps == 1),
        sum(not is_valid(box) for box in boxes) / len(boxes),  # share of boxes without an inside
        sum(any(v > scale[k % 2] for k, v in enumerate(box)) for box in text_boxes) / len(text_boxes),
        float(answer.think == answer.pred),
        gap,  # R_spa of the final boxes - R_spa of the thinking boxes
        tiou,
        _viou(answer, truth, "think"),
        _viou(answer, truth, "pred"),
    )
    return dict(zip(names, values, strict=True))


def _viou(answer: Answer, truth: Truth, which: str) -> float:
    """Sum of IoU over the common steps / steps of the union of the spans."""
    boxes, steps = getattr(answer, f"{which}_boxes"), common_steps(answer, truth)
    shared = sum(iou(boxes.get(step, MISSING), truth.boxes[step]) for step in steps)
    return float(shared / (max(answer.end, truth.span[1]) - min(answer.start, truth.span[0]) + 1))


# ----------------------------------------------------------------------------------------------------------
# The script


def checked_weights(weights: object, where: str) -> dict[str, float]:
    """Weights of `rewards`, as floats. Plug-ins are not loaded here. Raises ConfigError."""
    allowed = f"write a number from -1e6 to 1e6 for any of {', '.join(WEIGHTS)}, or for FILE.py:FUNCTION"
    if not isinstance(weights, dict):
        raise ConfigError(f"{where}: rewards: {weights!r} must be `key: value` lines; {allowed}")
    for key, value in weights.items():
        if not (type(value) in (int, float) and -1e6 <= value <= 1e6):
            raise ConfigError(f"{where}: rewards: the weight of {key} is {value!r}; {allowed}")
        if key not in WEIGHTS and not re.fullmatch(r".+\.py:\w+", str(key)):
            close = [f"did you mean {name}? " for name in difflib.get_close_matches(str(key), WEIGHTS, 1)]
            raise ConfigError(f"{where}: rewards: there is no weight {key!r}; {''.join(close)}{allowed}")
    return {key: float(value) for key, value in weights.items()}


def main(arguments: list[str]) -> None:
    """Write the lines of rollouts.jsonl or predictions.jsonl with new "rewards"; print the means."""
    if not arguments or arguments[0].startswith("-"):
        sys.exit(__doc__.strip())
    weights, scored = {}, []
    for path in map(Path, arguments[1:]):
        weights |= checked_weights(read_yaml(path).get("rewards", {}), str(path))
    load_plugins(weights)
    for record in read_jsonl(Path(arguments[0]), "completion", "truth"):
        boxes = {int(step): tuple(box) for step, box in record["truth"]["boxes"].items()}
        truth, scale = Truth(tuple(record["truth"]["span"]), boxes), record.get("scale", (1000, 1000))
        scored.append(score(record["completion"], truth, scale, weights, record.get("think", True)).rewards)
        print(json.dumps(record | {"rewards": scored[-1]}))
    for name in scored[0] if scored else ():
        print(f"{name:>24} {sum(rewards[name] for rewards in scored) / len(scored):8.3f}", file=sys.stderr)


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]), "standard output")
