"""Rewards of your own: functions named FILE.py:FUNCTION among a configuration's `rewards`.

To run a file is to trust it. Only load_plugins runs one, and only for a configuration that the user has named
on the command line; of the config.yaml that lies in a run folder the text of such files is compared, no more.
"""

import contextlib
import functools
import hashlib
import math
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from prompts import Answer, format_answer, from_text_box
from runtime.files import UserError, few
from samples import Truth


class RewardError(FloatingPointError):
    """A reward failed or is not finite; the message names the reward and the answer."""


FUNCTIONS: dict[str, Callable] = {}  # FILE.py:FUNCTION -> the function, of all that load_plugins has loaded


def plugin_names(weights: dict) -> list[str]:
    """Those names in `rewards` that are of the form FILE.py:FUNCTION."""
    return [name for name in weights if ":" in name]


def plugins(weights: dict) -> list[str]:
    """Those of them that are loaded; the others are never computed."""
    return [name for name in plugin_names(weights) if name in FUNCTIONS]


@functools.cache
def read_source(path: str) -> bytes:
    """The text of a file of rewards when this process first asked for it. Raises UserError.

    path: relative to the current directory, in which the file must lie.
    """
    file = Path(path).resolve()
    if not file.is_relative_to(Path.cwd()):
        raise UserError(f"rewards: {path} is not below the current directory {Path.cwd()}; copy it there")
    if not file.is_file():
        raise UserError(f"rewards: there is no file {Path(path).absolute()}; correct the path")
    return file.read_bytes()


@functools.cache
def load_file(path: str) -> types.ModuleType:
    """Run a file of rewards, once. Raises UserError.

    The file is run from its text, so that no other module of that name and no stale bytecode can take its
    place.
    """
    module, source = types.ModuleType(path), read_source(path)
    module.__file__ = str(Path(path).absolute())
    sys.modules[path] = module  # dataclasses look for it there
    try:
        exec(compile(source, module.__file__, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # whatever the file does
        raise UserError(f"rewards: {path} cannot be loaded: {_reason(error, path)}; correct it") from error
    return module


def load_plugins(weights: dict, think: bool = True) -> None:
    """Load all plug-ins and try them out, before hours of work depend on them. Raises UserError.

    weights: `rewards` of a configuration that the user has named, never those of a run folder. think: whether
    answers have thinking boxes.
    """
    for name in plugin_names(weights):
        path, _, function = name.rpartition(":")
        if not callable(found := getattr(load_file(path), function, None)):
            raise UserError(f"rewards: {path} has no function {function!r}; write FILE.py:FUNCTION")
        FUNCTIONS[name] = found
        try_out(name, think)


# Boxes of an event in steps 4 to 7, step -> box, in the numbers of a text whose coordinates go to 1000.
SCALE = (1000, 1000)
TRUE = {4: (200, 200, 400, 800), 5: (220, 200, 440, 800), 6: (240, 190, 480, 810), 7: (260, 180, 500, 820)}
NEAR = {4: (210, 200, 420, 790), 5: (220, 210, 450, 800), 6: (260, 190, 480, 840), 7: (270, 180, 540, 820)}
AWKWARD = {  # what is awkward -> the span and the boxes, of both lists
    "the true boxes in both lists": ((4, 7), TRUE),
    "the same box in every step": ((4, 7), dict.fromkeys(NEAR, NEAR[4])),
    "a box without area": ((4, 7), NEAR | {5: (300, 300, 300, 300)}),
    "a box with a flipped side": ((4, 7), NEAR | {5: (450, 210, 220, 800)}),
    "a box with two flipped sides": ((4, 7), NEAR | {5: (450, 800, 220, 210)}),
    "boxes without area": ((4, 7), dict.fromkeys(NEAR, (300, 300, 300, 300))),
    "boxes with flipped sides": ((4, 7), dict.fromkeys(NEAR, (420, 790, 210, 200))),
    "a box far larger than the frame": ((4, 7), NEAR | {5: (0, 0, 99999, 99999)}),
    "a list without the span's first and last step": ((4, 7), {5: NEAR[5], 6: NEAR[6]}),
    "a list of steps outside the span": ((4, 7), {0: NEAR[4], 1: NEAR[5]}),
    "an empty span": ((90, 3), NEAR),
    "an empty span of length 0": ((5, 4), NEAR),
    "a single step": ((5, 5), {5: NEAR[5]}),
    "a span far beyond the clip": ((4, 99999), NEAR),
    "a span that misses the event": ((8, 11), {step + 4: box for step, box in NEAR.items()}),
}


def awkward_cases(think: bool) -> Iterator[tuple[str, Answer, Truth]]:
    """Name, answer in the numbers of its text, and truth of the cases that a reward is tried on."""
    true, near = tuple(TRUE.items()), tuple(NEAR.items())
    truth = Truth((4, 7), {step: from_text_box(box, SCALE) for step, box in true})
    ordinary = Answer(4, 7, true if think else None, near)
    yield "an ordinary answer", ordinary, truth
    for name, (span, boxes) in AWKWARD.items():
        items = tuple(boxes.items())
        yield name, Answer(*span, items if think else None, items), truth
    yield "steps listed twice and backwards", replace(ordinary, pred=near[::-1] * 2), truth
    if think:
        yield "a draft of other steps", replace(ordinary, think=true[:2], pred=near[2:]), truth
    yield "a truth that stands still", ordinary, replace(truth, boxes=dict.fromkeys(TRUE, truth.boxes[4]))
    yield "a truth without a box in some steps", ordinary, replace(truth, boxes={5: truth.boxes[5]})
    yield "a truth of one step", ordinary, Truth((5, 5), {5: truth.boxes[5]})


@functools.cache
def try_out(name: str, think: bool) -> None:
    """Call a loaded plug-in, once in a process, on answers that training brings sooner or later. Raises
    UserError, which says what it did on the first that it fails on, and names others."""
    failed = {}
    for what, answer, truth in awkward_cases(think):
        try:
            call_plugin(name, answer.in_frame(SCALE), truth, format_answer(answer))
        except RewardError as error:
            failed[what] = error
    if failed:
        first, *others = failed
        also = f"; it also fails on {few(others)}" if others else ""
        raise UserError(f"rewards: tried on {first} (training brings such cases): {failed[first]}{also}")


def plugins_note(weights: dict, where: str | Path) -> str:
    """A line that names the plug-ins which are not computed, as they stand in a run folder; "" for none."""
    names = [name for name in plugin_names(weights) if name not in FUNCTIONS]
    what = f"note: not computed, as only {where} names it: {few(names)}"
    return f"{what}; to run this code, write rewards.{names[0]}=WEIGHT yourself\n" if names else ""


def plugin_fingerprints(weights: dict) -> dict[str, str]:
    """file -> a fingerprint of its text, for the files of all plug-ins. None of them is run."""
    found = dict.fromkeys(sorted(name.rpartition(":")[0] for name in plugin_names(weights)), "missing")
    for path in found:
        with contextlib.suppress(UserError, OSError):
            found[path] = hashlib.sha256(read_source(path)).hexdigest()[:12]
    return found


def call_plugin(name: str, answer: Answer, truth: Truth, completion: str) -> float:
    """The reward that a loaded plug-in gives. Raises RewardError where it fails or is not finite.

    answer: in [0, 1] of the frame. The plug-in gets copies, so that what it does to their boxes stays there.
    """
    try:
        value = float(FUNCTIONS[name](replace(answer), replace(truth, boxes=dict(truth.boxes))))
    except (Exception, SystemExit) as error:  # whatever the function does
        reason = _reason(error, name.rpartition(":")[0])
        raise RewardError(f"{name} raised {reason}; the answer was {completion!r}") from error
    if not math.isfinite(value):
        raise RewardError(f"the reward {name} is {value}; the answer was {completion!r}")
    return value


def _reason(error: BaseException, path: str) -> str:
    """Kind and message of an error in one line, with the line of the file where it came up."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == Path(path).absolute()]
    where = f" (line {lines[-1]})" if lines else ""
    return " ".join(f"{type(error).__name__}: {error}".split()) + where
