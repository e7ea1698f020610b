"""files.py: files appear whole or not at all, what cannot be read is named, scripts end in one line."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.files import DataError, read_json, read_jsonl, write_jsonl, write_whole

ROOT = Path(__file__).parent.parent.parent


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"old", b"", b"new" * 100):
        write_whole(path, content)
        assert path.read_bytes() == content and os.listdir(tmp_path) == ["a.json"]
    write_jsonl([{"a": 1}], path)
    write_jsonl([{"a": 2}, {}], path, append=True)
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{}\n'


def test_files_that_cannot_be_written(tmp_path, full_disk):
    """The error names the file that was asked for; what was there stays, and nothing else is left behind."""
    path, folder = tmp_path / "a.json", tmp_path / "folder"
    path.write_text("old")
    folder.mkdir()
    cases = [(folder, errno.EISDIR), (tmp_path / "no" / "a", errno.ENOENT), (path / "a", errno.ENOTDIR)]
    for place, number in cases:
        with pytest.raises(OSError) as caught:
            write_whole(place, b"new")
        assert (caught.value.errno, caught.value.filename) == (number, str(place))
    with full_disk(), pytest.raises(OSError) as caught:
        write_whole(path, b"new" * 100)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a.json", "folder"]


def test_lines_of_json(tmp_path):
    """A byte order mark, Windows' line ends, a blank line, and what str.splitlines splits in a string."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y\x85z"}\r\n\r\n{"a": 2, "b": 3}'.encode())
    assert read_jsonl(path, "a") == [{"a": "x\u2028y\x85z"}, {"a": 2, "b": 3}]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"5", b'{"b": 1}', b'{"a": "\xff"}', b"[" * 100_000])
@pytest.mark.parametrize("skip_cut", [False, True])
def test_broken_lines_are_named(tmp_path, line, skip_cut):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 1}\n')
    with pytest.raises(DataError, match=r'a\.jsonl, line 2: is no JSON object with "a"'):
        read_jsonl(path, "a", skip_cut=skip_cut)
    path.write_bytes(b'{"a": 1}\n{"a":')  # as a kill leaves it
    if skip_cut:
        assert read_jsonl(path, "a", skip_cut=True) == [{"a": 1}]


@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_files_that_cannot_be_read(tmp_path, read):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(DataError, match=r"cannot be read \(.*\); check the path"):
            read(path)


def script(body, **environment):
    """(exit code, stderr) of a script that run_script runs, whose output is cut off by head."""
    code = f"import os, time\nfrom runtime.files import DataError, run_script\ndef main():\n    {body}\n"
    code += "run_script(main, 'the output', 'free some space', 'stopped: resume')"
    command = ["bash", "-c", 'set -o pipefail; "$0" -c "$1" | head -1', sys.executable, code]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


SAID = {
    "raise DataError('a.json: is empty; fetch it')": "error: a.json: is empty; fetch it\n",
    "open('/none/a')": "error: /none/a: No such file or directory; free some space\n",
    "raise OSError(28, 'No space left')": "error: the output: No space left; free some space\n",
    "raise KeyboardInterrupt": "stopped: resume\n",
    "print('a\\n' * 1_000_000)": "",  # head has read enough
}


@pytest.mark.parametrize("body", SAID)
@pytest.mark.parametrize("size", ["1", "2"])
def test_scripts_end_in_one_line(body, size):
    assert script(body, WORLD_SIZE=size) == (1, SAID[body])


@pytest.mark.parametrize(("rank", "error"), [("1", "DataError('of rank 0')"), ("0", "RuntimeError('lost')")])
def test_what_another_rank_says_better(rank, error):
    """A rank waits before it speaks; here it is ended in the meantime, as by torchrun."""
    body = f"time.sleep = lambda _: os._exit(9); raise {error}"
    assert script(body, WORLD_SIZE="2", RANK=rank) == (9, "")
