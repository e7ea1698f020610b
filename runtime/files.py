"""Files are written whole or not at all; errors name the file, the line or record, the value and the remedy.
And a script ends in one line where its user can mend what is wrong."""

import contextlib
import errno
import json
import os
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import yaml

REMEDY = "correct or remove the record"
DISK_REMEDIES = {  # what the system says -> what to do
    ("ENOSPC", "EDQUOT"): "free some space",
    ("EFBIG",): "free some space, or raise ulimit -f",
    ("EROFS",): "choose a place that can be written",
    ("EACCES", "EPERM"): "change its permissions, or choose another place",
    ("EMFILE", "ENFILE"): "raise ulimit -n",
    ("EIO", "ESTALE"): "check the disk",
}


class UserError(ValueError):
    """Something that the user can mend; the message is one line that names it, the value and the remedy."""


class DataError(UserError):
    """Annotations or records that cannot be used."""


class ConfigError(UserError):
    """A setting that cannot be used; the message names the file, the key, the value and the remedy."""


class ModelError(UserError):
    """A checkpoint that cannot serve as the policy."""


def disk_remedy(error: Exception) -> str:
    """What to do about an OSError, or about one that a library reports in the text of its own error."""
    number = re.search(r"(?:Errno|os error) (\d+)", str(error))
    name = errno.errorcode.get(int(number[1])) if number else None
    return next((text for names, text in DISK_REMEDIES.items() if name in names), "check the path")


def check_first(check: Callable[[], object]) -> None:
    """Run a check of a script's words above its slow imports, on rank 0, whose message is enough."""
    if os.environ.get("RANK", "0") == "0":
        try:
            check()
        except UserError as error:
            sys.exit(f"error: {error}")


def run_script(main: Callable[[], None], place: str, stopped: str = "stopped") -> None:
    """Run a script's main function; an error that the user can mend is one line on stderr and exit code 1.

    place: what an OSError without a file name is about. stopped: said on Ctrl-C. A letter that the terminal's
    encoding lacks is printed as its number.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's
            stream.reconfigure(errors="backslashreplace")
    several, message = os.environ.get("WORLD_SIZE", "1") != "1", None
    wait = os.environ.get("RANK", "0") != "0"
    try:
        main()
    except (UserError, FloatingPointError) as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = stopped
    except BrokenPipeError:  # whoever reads the output, such as head, has enough
        message = ""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        message = f"error: {error.filename or place}: {error.strerror or error}; {disk_remedy(error)}"
    except Exception:
        if not several:
            raise
        message, wait = traceback.format_exc(), True  # it may come from the failure of another rank
    if several:
        if message and wait:
            time.sleep(3)  # torchrun ends this rank if another one has said the same, or the cause
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        os._exit(message is not None)  # no sys.exit: a thread of gloo may need the interpreter, and abort
    if message is not None:
        sys.exit(message or 1)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, then rename it. Raises OSError with the path as its filename, which that
    of a full disk lacks; what was there stays. A kill may leave NAME.8-digits.tmp: see `leftovers`."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # another rank may write it, too
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def leftovers(folder: Path, *names: str) -> list[Path]:
    """What kills of write_whole have left in a folder beside files of these names (patterns of glob)."""
    return [path for name in names for path in folder.glob(f"{name}.{'[0-9a-f]' * 8}.tmp")]


def write_json(value: object, path: Path) -> None:
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def write_jsonl(records: list[dict], path: Path, append: bool = False) -> None:
    """Write one JSON object a line: a whole new file, or with `append` more lines at its end, of which none
    stays where the disk is full."""
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    if append:
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while text := text[file.write(text) :]:
                    pass
            except OSError as error:
                file.truncate(end)
                raise OSError(error.errno, error.strerror, str(path)) from error
    else:
        write_whole(path, text)


def read_jsonl(path: str | Path, *keys: str, skip_cut: bool = False) -> list[dict]:
    """All objects of a file with one on each line. Raises DataError; see iterate_jsonl."""
    return list(iterate_jsonl(path, *keys, skip_cut=skip_cut))


def iterate_jsonl(path: str | Path, *keys: str, skip_cut: bool = False) -> Iterator[dict]:
    """Yield the objects of a file. Raises DataError, with file and line, for a line that is no JSON object
    with these keys.

    skip_cut: leave out a last line that is cut off, as a run leaves it that is killed while it writes.
    """
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if skip_cut and not line.endswith(b"\n"):
                    return
                raise DataError(f"{path}, line {number}: is no JSON object: {error}; {REMEDY}") from None
            lacking = keys if not isinstance(record, dict) else [key for key in keys if key not in record]
            if lacking or not isinstance(record, dict):
                wanted = ", ".join(f'"{key}"' for key in lacking)
                raise DataError(f"{path}, line {number}: is no JSON object with {wanted}; {REMEDY}")
            yield record


def _open(path: str | Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def read_json(path: str | Path, unique: bool = True) -> object:
    """Raises DataError. unique: refuse an object with a key twice, which takes five times as long."""
    with _open(path) as file:
        try:
            return json.load(file, object_pairs_hook=_unique if unique else None)
        except (ValueError, RecursionError) as error:  # the message of a syntax error says line and column
            raise DataError(f"{path}: is not a JSON file: {error}; correct it") from error


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """json alone would keep the last of two records with the same key, and say nothing."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        key = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {key!r} stands twice in one object; {REMEDY}")
    return dict(pairs)


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; YAML forbids them. Aliases, too, are refused:
    a few of them make a value that no memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"*{self.peek_event().anchor} is an alias; write the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key} stands there twice; keep one")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The settings of a file, {} if it is empty. Raises ConfigError."""
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); name a YAML file such as configs/toy.yaml"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError of a date, or of the text
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if settings is None:  # an empty file
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: must hold `key: value` lines, not {settings!r}")
    return settings


def file_and_split(annotations: str) -> tuple[str, str]:
    """FILE.jsonl:SPLIT -> the file, and the split whose lines are meant; "" means all lines."""
    file, colon, split = annotations.rpartition(":")
    return (file, split) if colon and file.endswith(".jsonl") else (annotations, "")


def get(where: str, record: dict, name: str) -> object:
    if name not in record:
        raise DataError(f"{where}: has no {name!r}; its keys are {', '.join(map(str, record)) or 'none'}")
    return record[name]


def is_number(value: object) -> bool:
    """Whether it is a number that can be a pixel or a frame: JSON also has true, NaN and 10 ** 400."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def short(value: object) -> str:
    """A value as an error message quotes it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def few(names: list[str]) -> str:
    """The first three of many names, as a message lists them."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
