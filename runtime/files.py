"""Files: written whole or not at all; JSON read with errors that name the file, the place and the value.
And how every script ends when something is wrong: in one line."""

import codecs
import contextlib
import errno
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

REMEDY = "correct or remove the record"


class UserError(ValueError):
    """Something that the user can mend; the message is one line that names it, the value and the remedy."""


class DataError(UserError):
    """Annotations that cannot be used; the message names the file, the record, the value and the remedy."""


class ModelError(UserError):
    """A checkpoint that cannot serve as the policy; the message names the folder and the remedy."""


def run_script(main: Callable[[], None], place: str, remedy: str, stopped: str = "stopped") -> None:
    """Run a script's main function; what a user can mend ends it with one line on stderr and exit code 1.

    place: what an OSError is about that names no file. remedy: what to do about any. stopped: said on Ctrl-C.
    """
    try:
        main()
    except (UserError, FloatingPointError) as error:
        _end(f"error: {error}")
    except KeyboardInterrupt:
        _end(stopped)
    except BrokenPipeError:  # whoever reads the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _end(f"error: {error.filename or place}: {error.strerror or error}; {remedy}")
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        reason = str(error).splitlines()[0]
        _end(f"error: rank {RANK} has lost another one, whose own message says why ({reason})", first=False)
    if RANKS > 1:
        leave_process(0)


RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
# What gloo and NCCL say when the other end is gone.
LOST = re.compile(r"gloo.*(closed|reset|refused|timed out)|Connection (closed|reset)|ncclRemoteError", re.S)


def _end(message: str, first: bool = RANK == 0) -> None:
    """Exit with a message. What is wrong with a setting all ranks find at once: the first one says it; the
    others wait to be ended by torchrun, and print only if that does not happen."""
    if RANKS == 1:
        sys.exit(message)
    if not first:
        time.sleep(3)
    print(message, file=sys.stderr)
    leave_process(1)


def leave_process(code: int) -> None:
    """End one of several ranks without taking the interpreter down: a thread of gloo may still want it, for
    the tensor that was exchanged last, and would abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside it first, then renamed. Raises OSError with the errno, the
    reason (strerror) and the path (filename), which a full disk's own error lacks; what was there stays."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # another rank may write it, too
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may not even have come into being
            temporary.unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_jsonl(records: list[dict], path: Path, append: bool = False) -> None:
    """One JSON object a line. A new file appears whole or not at all; with append, all lines are added at the
    end, or none."""
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    if append:
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(text) < len(text):  # the disk is full
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    else:
        write_whole(path, text)


def read_jsonl(path: Path, *keys: str, skip_cut: bool = False) -> list[dict]:
    """All objects of a file, as iterate_jsonl reads them. Raises DataError, also for a file that cannot be
    read."""
    with open_to_read(path) as file:
        return list(iterate_jsonl(file, *keys, skip_cut=skip_cut))


def open_to_read(path: str | Path) -> BinaryIO:
    """Raises DataError for a file that cannot be read."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def iterate_jsonl(file: BinaryIO, *keys: str, skip_cut: bool = False) -> Iterator[dict]:
    """The objects of an open file with one on each line, in its order, one at a time. Raises DataError that
    names the file and the line, for a line that is no JSON object with these keys.

    Lines end at newlines only: other line separators, such as U+2028, may stand in a JSON string. skip_cut:
    leave out a last line that has no newline and does not parse, which is what a run that was killed while
    it wrote leaves behind.
    """
    blank = 0  # the first of the blank lines that an editor may leave at the end, and only there
    for number, line in enumerate(file, 1):
        if not line.strip():
            blank = blank or number
            continue
        try:
            record = None if blank else json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
        except (ValueError, RecursionError):
            if skip_cut and not line.endswith(b"\n"):
                return
            record = None
        if not isinstance(record, dict) or not record.keys() >= set(keys):
            wanted = ", ".join(f'"{key}"' for key in keys)
            wrong = f"is no JSON object with {wanted}; correct or remove it"
            raise DataError(f"{file.name}, line {blank or number}: {wrong}")
        yield record


def read_json(path: str, unique: bool = True) -> object:
    """unique: refuse an object with the same key twice, which takes five times as long."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file, object_pairs_hook=_unique if unique else None)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # the message of a syntax error says line and column
        raise DataError(f"{path}: is not a JSON file: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. json itself would keep the last of two records with the same key, and say nothing."""
    record = {}
    for key, value in pairs:
        if key in record:
            raise DataError(f"the key {key!r} stands twice in one object; {REMEDY}")
        record[key] = value
    return record


def get(where: str, record: dict, name: str) -> object:
    if name not in record:
        raise DataError(f"{where}: has no {name!r}; its keys are {', '.join(map(str, record)) or 'none'}")
    return record[name]


def is_number(value: object) -> bool:
    """Whether it is a number that can be a pixel or a frame: JSON also has true, NaN and 10 ** 400."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def positive(where: str, record: dict, name: str) -> float:
    value = get(where, record, name)
    if not is_number(value) or value <= 0:
        raise DataError(f"{where}: {name} {short(value)} is not a number above 0")
    return float(value)


def positive_integer(where: str, record: dict, name: str) -> int:
    value = get(where, record, name)
    if not is_number(value) or value < 1 or value != int(value):
        raise DataError(f"{where}: {name} {short(value)} is not an integer of at least 1")
    return int(value)


def short(value: object) -> str:
    """A value as an error message quotes it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def few(names: list[str]) -> str:
    """The first three of many names, as a message lists them."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
