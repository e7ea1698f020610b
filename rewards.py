"""The five rewards of STVG-o1 (section 3.2), and rewards of your own beside them.

    python rewards.py FILE.jsonl [--config C] [--html OUT.html]    score a file of answers, without any model
    python rewards.py --exploits [--config C]                      what cheating earns beside honest play

(bench.py and exploits.py.) **To try another reward**, write a function of an answer and the truth in a file
of your own, and name it in the configuration, with its weight, beside the paper's five:

    def smoothness(answer, truth):                 # my_rewards.py
        ...

    rewards: {think: 0.5, my_rewards.py:smoothness: 0.2}

It is called for every answer that parses, and sees what the built-in rewards see: an Answer whose boxes are
in [0, 1] of the frame (answer.span, answer.think_boxes, answer.pred_boxes: step -> box), and the Truth (span,
boxes), and changes neither. Whatever is here can be imported: `from rewards import giou, temporal_reward`.
Total, logs, curves and bench follow from the name; with weight 0 it is only watched.

Bounds. For any text, and any truth with boxes in [0, 1]: format and consistency are 0 or 1, temporal is in
[0, 1], one box earns GIoU - L1 >= -1 - 4, so spatial is in [-5, 1] and think in [0, 6]. With the paper's
weights the total is in (-9, 5], without thinking boxes in (-4, 4]. It is exactly 5 (4) for a truth on the
text's integer grid that is written by format_answer, and exactly 0 for a text that is no answer.
"""

import functools
import hashlib
import math
import re
import reprlib
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prompts import Answer, parse_answer
from runtime.files import UserError, run_script
from samples import Box, Truth

WEIGHTS = {"format": 1.0, "consistency": 1.0, "temporal": 1.0, "spatial": 1.0, "think": 0.5}  # Eq. 10
REWARDS = tuple(WEIGHTS)
# Of the spatial reward: the weights of its two parts (Eq. 8), and two guards that are off (not in the paper).
WEIGHTS |= {"giou": 1.0, "l1": 1.0}
# empty_overlap: what it is where the two spans share no step that can be judged; 0 is the paper's.
# missed_step: weight in its mean of each true step that the answer's span leaves out, which then earns -1
# (without a common step the lower of the two).
WEIGHTS |= {"empty_overlap": 0.0, "missed_step": 0.0}
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
# The rewards: functions of an answer, its boxes in [0, 1], and the truth. Steps are never enumerated from the
# numbers of an answer: "0 - 99999" costs what "0 - 1" costs.


def consistency_reward(answer: Answer, truth: Truth) -> float:
    """1 if every list of boxes names exactly the steps of the span, in order and once each; else 0."""
    lists = [answer.pred] if answer.think is None else [answer.think, answer.pred]
    length = answer.end - answer.start + 1
    return float(  # Eq. 4
        all(len(items) == length for items in lists)
        and all(step == answer.start + k for items in lists for k, (step, _) in enumerate(items))
    )


def temporal_reward(answer: Answer, truth: Truth) -> float:
    """IoU of two spans counted in steps, in [0, 1]. Where they share a step, their union is their hull."""
    shared = min(answer.end, truth.span[1]) - max(answer.start, truth.span[0]) + 1
    hull = max(answer.end, truth.span[1]) - min(answer.start, truth.span[0]) + 1
    return max(shared, 0) / hull  # Eq. 5


def common_steps(answer: Answer, truth: Truth) -> list[int]:
    """The steps in both spans (T∩ of Eq. 7) that have a truth box."""
    first, last = max(answer.start, truth.span[0]), min(answer.end, truth.span[1])
    return sorted(step for step in truth.boxes if first <= step <= last)


def spatial_reward(answer: Answer, truth: Truth, which: str = "pred", weights: dict = WEIGHTS) -> float:
    """Mean of GIoU - L1 over the common steps, in [-5, 1] with the paper's weights; 0 if there is none.

    which: the list of boxes, "pred" or "think". That 0 is the paper's, and it is more than a bad box earns:
    until boxes are better than nothing, the reward pays for missing the interval (README, "Assumptions"). The
    two guards in WEIGHTS, off by default, change that.
    """
    boxes, steps = getattr(answer, f"{which}_boxes"), common_steps(answer, truth)
    pairs = [(boxes.get(step, MISSING), truth.boxes[step]) for step in steps]
    values = [weights["giou"] * giou(b, g) - weights["l1"] * l1(b, g) for b, g in pairs]  # Eq. 8
    inside = [step for step in truth.boxes if truth.span[0] <= step <= truth.span[1]]
    missed = weights["missed_step"] * (len(inside) - len(steps))
    if not steps:
        return min(weights["empty_overlap"], -1.0) if missed else float(weights["empty_overlap"])
    return (sum(values) - missed) / (len(steps) + missed)  # Eq. 6 and 7


def think_reward(answer: Answer, truth: Truth, weights: dict = WEIGHTS) -> float:
    """What the final boxes gain over the thinking boxes, in [0, 6] with the paper's weights."""
    pred, think = (spatial_reward(answer, truth, which, weights) for which in ("pred", "think"))
    return max(pred - think, 0.0)  # Eq. 9


def total_reward(terms: dict[str, float], weights: dict = WEIGHTS) -> float:
    """The weighted sum of the five rewards and of one's own; giou and l1 have already had their say in the
    spatial terms."""
    rewards = terms | {"spatial": terms["spatial_think"] + terms["spatial_pred"]}
    return sum(weights[name] * rewards[name] for name in (*REWARDS, *plugins(weights)))  # Eq. 10


# ----------------------------------------------------------------------------------------------------------
# Rewards of one's own


class RewardError(FloatingPointError):
    """A reward that is no finite number; the message (Score.fault) names it, and the answer."""


def plugins(weights: dict) -> tuple[str, ...]:
    """Of the names in a configuration's `rewards`, those of the form FILE.py:FUNCTION."""
    return tuple(name for name in weights if name not in WEIGHTS)


def plugin_files(weights: dict) -> list[str]:
    """The files that those functions stand in."""
    return sorted({name.rpartition(":")[0] for name in plugins(weights)})


def terms_of(weights: dict) -> tuple[str, ...]:
    """The names of all terms that are scored and logged: TERMS, and one's own."""
    return (*TERMS, *plugins(weights))


def weights_of_terms(weights: dict) -> dict[str, float]:
    """The weight of each of terms_of in the total."""
    names = (*REWARDS, *plugins(weights))
    return {term: weights[name] for name in names for term in PARTS.get(name, (name,))}


@functools.cache
def load_file(path: str) -> tuple[types.ModuleType, str]:
    """Run a file with rewards, once: the module, and a short mark of its text as it was then. path: relative
    to where you are. Raises UserError that says what is wrong."""
    module = types.ModuleType(path)
    module.__file__ = str(Path(path).absolute())
    sys.modules[path] = module  # where dataclasses, for one, look for it
    try:
        source = Path(path).read_bytes()
        exec(compile(source, module.__file__, "exec"), module.__dict__)
    except FileNotFoundError as error:
        remedy = "correct the path, which is relative to where you are"
        raise UserError(f"rewards: there is no file {module.__file__}; {remedy}") from error
    except (Exception, SystemExit) as error:  # whatever stands in the file
        line = _last_line(error, path)
        raise UserError(f"rewards: {path} cannot be loaded: {_one_line(error)}{line}; correct it") from error
    return module, hashlib.sha256(source).hexdigest()[:12]


def load_function(name: str) -> Callable[[Answer, Truth], float]:
    """FILE.py:FUNCTION -> the function. Raises UserError that says what is wrong with it."""
    path, _, function = name.rpartition(":")
    module, _ = load_file(path)
    if not callable(getattr(module, function, None)):
        raise UserError(f"rewards: {path} has no function {function!r}; write FILE.py:FUNCTION")
    return getattr(module, function)


def load_plugins(weights: dict) -> None:
    """Load all of one's own, before hours of work depend on them. Raises UserError."""
    for name in plugins(weights):
        load_function(name)


def call(name: str, answer: Answer, truth: Truth) -> tuple[float, str]:
    """What a function of one's own says of an answer; not a number, and what it raised, where it fails."""
    try:
        return float(load_function(name)(answer, truth)), ""
    except (Exception, SystemExit) as error:  # ends the run, on all ranks and with the answer (Score.fault)
        return math.nan, f"{name} raised {_one_line(error)}{_last_line(error, name.rpartition(':')[0])}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _last_line(error: BaseException, path: str) -> str:
    """Where in the file an error came up, for the end of a message."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == Path(path).absolute()]
    return f" (line {lines[-1]})" if lines else ""


# ----------------------------------------------------------------------------------------------------------
# From a text to its score


@dataclass(frozen=True)
class Score:
    answer: Answer | None  # in the numbers of the text; None: the text does not parse
    rewards: dict[str, float]  # terms_of, unweighted (but for giou and l1), and "total"
    diagnostics: dict[str, float]  # see diagnose; for logs, no part of the reward
    fault: str = ""  # a reward that is no finite number, and the answer: whoever trusts `rewards` looks first


def score(
    completion: str,
    truth: Truth,
    scale: tuple[int, int] = (1000, 1000),
    weights: dict = WEIGHTS,
    think: bool = True,
) -> Score:
    """Score one answer: every term, the total, what to watch. Never raises for any text; bounds see above.

    scale: (width, height) that the text's coordinates are divided by (TextFormat.scale). weights: all of
    WEIGHTS or some, and FILE.py:FUNCTION. think: False for answers without thinking boxes, whose two terms
    are then 0. An answer whose span is empty (last step < first step) keeps, by the equations, its format
    reward alone; guards and rewards of one's own judge it, too.
    """
    weights = check_weights(weights)
    parsed = parse_answer(completion, think)
    terms, faults = dict.fromkeys((*terms_of(weights), "total"), 0.0), []
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
        terms[name], raised = call(name, answer, truth)
        faults += [raised] if raised else []
    terms["total"] = total_reward(terms, weights)
    faults += [f"the reward {name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
    fault = f"{faults[0]}; the answer was {completion!r}" if faults else ""
    return Score(parsed, terms, diagnose(parsed, truth, scale), fault)


def check_weights(weights: dict) -> dict[str, float]:
    """All of WEIGHTS, the given ones replaced, and one's own, which are not loaded yet. Raises ValueError for
    a name that is neither in WEIGHTS nor of the form FILE.py:FUNCTION, and for a value that is not a number
    from -1e6 to 1e6 (so that every reward of this file stays finite)."""
    allowed = f"write numbers from -1e6 to 1e6 for any of {', '.join(WEIGHTS)}, or for FILE.py:FUNCTION"
    for key, value in weights.items():
        if not is_number(value, -1e6, 1e6):
            raise ValueError(f"rewards: the weight {key} is {reprlib.repr(value)}; {allowed}")
        if key not in WEIGHTS and not re.fullmatch(r".+\.py:\w+", str(key)):
            raise ValueError(f"rewards: there is no weight {key!r}; {allowed}")
    if weights.get("missed_step", 0) < 0:
        raise ValueError(f"rewards: missed_step is {weights['missed_step']}; write a number from 0 to 1e6")
    return {key: float(value) for key, value in {**WEIGHTS, **weights}.items()}


def is_number(value: object, low: float, high: float, kind=int | float) -> bool:
    """A number in [low, high], which NaN is not; neither are JSON's true and false."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def diagnose(parsed: Answer | None, truth: Truth, scale: tuple[int, int]) -> dict[str, float]:
    """What to watch beside the reward; all 0 for a text that does not parse.

    overlap        1 if the answer's span meets the truth's: falls when the policy learns to miss it
    span_ratio     steps of the answer / steps of the truth: falls when it learns to name one easy step only
    one_step       1 if the answer's span is a single step
    invalid_boxes  share of the listed boxes that have no inside
    out_of_frame   share of the listed boxes that reach beyond the frame, and are cut off there
    copied         1 if the final boxes are the thinking boxes
    think_gap      spatial reward of the final boxes - that of the thinking boxes, with the paper's weights
    tiou           the temporal reward
    viou_think, viou_pred   sum of IoU over the common steps / steps of the union of the spans
    """
    names = ("overlap", "span_ratio", "one_step", "invalid_boxes", "out_of_frame", "copied", "think_gap")
    names += ("tiou", "viou_think", "viou_pred")
    if parsed is None:
        return dict.fromkeys(names, 0.0)
    answer, listed = parsed.in_frame(scale), (*(parsed.think or ()), *parsed.pred)
    steps = answer.end - answer.start + 1
    tiou = temporal_reward(answer, truth)
    invalid = sum(not is_valid(box) for _, box in (*(answer.think or ()), *answer.pred)) / len(listed)
    outside = sum(any(value > scale[k % 2] for k, value in enumerate(box)) for _, box in listed) / len(listed)
    gap = 0.0
    if answer.think is not None:
        gap = spatial_reward(answer, truth, "pred") - spatial_reward(answer, truth, "think")
    values = (float(tiou > 0), max(steps, 0) / (truth.span[1] - truth.span[0] + 1), float(steps == 1))
    values += (invalid, outside, float(answer.think == answer.pred), gap)
    values += (tiou, _viou(answer, truth, "think"), _viou(answer, truth, "pred"))
    return dict(zip(names, values, strict=True))


def _viou(answer: Answer, truth: Truth, which: str) -> float:
    boxes, steps = getattr(answer, f"{which}_boxes"), common_steps(answer, truth)
    shared = sum(iou(boxes.get(step, MISSING), truth.boxes[step]) for step in steps)
    return float(shared / (max(answer.end, truth.span[1]) - min(answer.start, truth.span[0]) + 1))


if __name__ == "__main__":
    from lab import bench

    run_script(lambda: bench.main(sys.argv[1:]), "standard output", "check the path and the free space")
