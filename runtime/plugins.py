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
from collections.abc import Callable
from pathlib import Path

from runtime.files import UserError, few


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


def load_plugins(weights: dict) -> None:
    """Load all plug-ins, before hours of work depend on them. Raises UserError.

    weights: `rewards` of a configuration that the user has named, never those of a run folder.
    """
    for name in plugin_names(weights):
        path, _, function = name.rpartition(":")
        if not callable(found := getattr(load_file(path), function, None)):
            raise UserError(f"rewards: {path} has no function {function!r}; write FILE.py:FUNCTION")
        FUNCTIONS[name] = found


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


def call_plugin(name: str, answer, truth, completion: str) -> float:
    """The reward that a loaded plug-in gives. Raises RewardError where it fails or is not finite."""
    try:
        value = float(FUNCTIONS[name](answer, truth))
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
