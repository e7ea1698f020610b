"""files.py: files appear whole or not at all, and what cannot be read is named."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.files import DataError, read_jsonl, write_whole

ROOT = Path(__file__).parent.parent.parent


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"old", b"", b"new" * 100):
        write_whole(path, content)
        assert path.read_bytes() == content and os.listdir(tmp_path) == ["a.json"]


def test_files_that_cannot_be_written(tmp_path, full_disk):
    """The error names the file that was asked for, what was there stays, and nothing else is left behind."""
    path, folder = tmp_path / "a.json", tmp_path / "folder"
    path.write_text("old")
    folder.mkdir()
    cases = [(folder, errno.EISDIR), (tmp_path / "no" / "a", errno.ENOENT), (path / "a", errno.ENOTDIR)]
    for place, number in cases:
        with pytest.raises(OSError) as caught:
            write_whole(place, b"new")
        assert (caught.value.errno, caught.value.filename) == (number, str(place))
        assert caught.value.strerror == os.strerror(number)
    with full_disk(), pytest.raises(OSError) as caught:
        write_whole(path, b"new" * 100)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a.json", "folder"]


def test_lines_of_json(tmp_path):
    """A byte order mark, Windows' line ends, and what str.splitlines takes for a line end inside a string."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y\x85z"}\r\n{"a": 2, "b": 3}'.encode())
    assert read_jsonl(path, "a") == [{"a": "x\u2028y\x85z"}, {"a": 2, "b": 3}]
    path.write_text("")
    assert read_jsonl(path, "a") == []


@pytest.mark.parametrize(
    "line", [b"{", b"", b"[1]", b"5", b'"a b"', b'{"b": 1}', b'{"a": "\xff"}', b"[" * 100_000, b"\xff\xfe"]
)
def test_broken_lines_are_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 1}\n')
    for skip_cut in (False, True):
        with pytest.raises(DataError, match=r'a\.jsonl, line 2: is no JSON object with "a"; correct'):
            read_jsonl(path, "a", skip_cut=skip_cut)


def test_a_cut_last_line_is_left_out_where_that_is_allowed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a":')
    assert read_jsonl(path, "a", skip_cut=True) == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="line 3"):
        read_jsonl(path, "a")
    path.write_text('{"a": 1}\n{"a":\n')  # it has its newline: not cut, but broken
    with pytest.raises(DataError, match="line 2"):
        read_jsonl(path, "a", skip_cut=True)


def test_lines_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(DataError, match=r"cannot be read \(.*\); check the path") as caught:
            read_jsonl(path, "a")
        assert str(caught.value).startswith(f"{path}: ")


def script(tmp_path, body):
    """A script that run_script runs: its process, done."""
    path = tmp_path / "script.py"
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom files import DataError, run_script\n"
    end = "\nrun_script(main, 'the output', 'free some space', 'stopped: go on')\n"
    path.write_text(f"{head}def main():\n    {body}{end}", encoding="utf-8")
    return subprocess.run(
        f"{sys.executable} {path} | head -1", shell=True, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise DataError('a.json: is empty; fetch it')", "error: a.json: is empty; fetch it\n"),
        ("open('/none/a')", "error: /none/a: No such file or directory; free some space\n"),
        (
            "raise OSError(28, 'No space left on device')",
            "error: the output: No space left on device; free s",
        ),
        ("raise KeyboardInterrupt", "stopped: go on\n"),
        ("print('a\\n' * 1_000_000)", ""),  # head has read enough
    ],
)
def test_scripts_end_in_one_line(tmp_path, body, said):
    done = script(tmp_path, body)
    assert done.stderr.startswith(said) and done.stderr.count("\n") == (1 if said else 0)
