"""Rewards of your own: functions named FILE.py:FUNCTION among a configuration's `rewards`."""

import functools
import hashlib
import math
import sys
import traceback
import types
from pathlib import Path

from runtime.files import UserError


class RewardError(FloatingPointError):
    """A reward failed or is not finite; the message names the reward and the answer."""


def plugins(weights: dict) -> tuple[str, ...]:
    """Those names in `rewards` that are of the form FILE.py:FUNCTION."""
    return tuple(name for name in weights if ":" in name)


@functools.cache
def load_file(path: str) -> tuple[types.ModuleType, str]:
    """Run a file of rewards, once. Returns the module and a fingerprint of its text. Raises UserError.

    path: relative to the current directory. The file is run from its text, so that no other module of that
    name and no stale bytecode can take its place.
    """
    module = types.ModuleType(path)
    module.__file__ = str(Path(path).absolute())
    sys.modules[path] = module  # dataclasses look for it there
    try:
        source = Path(path).read_bytes()
        exec(compile(source, module.__file__, "exec"), module.__dict__)
    except FileNotFoundError:
        raise UserError(f"rewards: there is no file {module.__file__}; correct the path") from None
    except (Exception, SystemExit) as error:  # whatever the file does
        raise UserError(f"rewards: {path} cannot be loaded: {_reason(error, path)}; correct it") from error
    return module, hashlib.sha256(source).hexdigest()[:12]


def load_function(name: str):
    """FILE.py:FUNCTION -> the function. Raises UserError."""
    path, _, function = name.rpartition(":")
    module, _ = load_file(path)
    if not callable(getattr(module, function, None)):
        raise UserError(f"rewards: {path} has no function {function!r}; write FILE.py:FUNCTION")
    return getattr(module, function)


def load_plugins(weights: dict) -> None:
    """Load all plug-ins before hours of work depend on them. Raises UserError."""
    for name in plugins(weights):
        load_function(name)


def plugin_fingerprints(weights: dict) -> dict[str, str]:
    """file -> a fingerprint of its text when it was loaded, for the files of all plug-ins."""
    files = sorted({name.rpartition(":")[0] for name in plugins(weights)})
    return {path: load_file(path)[1] for path in files}


def call_plugin(name: str, answer, truth, completion: str) -> float:
    """The plug-in's reward of an answer. Raises RewardError where it fails or is not finite."""
    try:
        value = float(load_function(name)(answer, truth))
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
