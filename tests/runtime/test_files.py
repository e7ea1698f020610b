"""files.py: files appear whole or not at all, what cannot be read is named, scripts end in one line."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.files import DataError, disk_remedy, leftovers, read_json, read_jsonl, write_jsonl, write_whole

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
    with full_disk(), pytest.raises(OSError) as caught:  # of 14 bytes more 5 would fit
        write_jsonl([{"a": 2}, {"b": 3}], path, append=True)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old"


def test_what_a_kill_leaves(tmp_path, monkeypatch):
    """It is known by its name, and nothing else is taken for it."""
    monkeypatch.setattr(Path, "replace", lambda *_: None)  # the rename does not happen
    for name in ("a.json", "b.json", "a.jsonl"):
        write_whole(tmp_path / name, b"half")
    left = {path.name: path for path in leftovers(tmp_path, "a.json", "a*.jsonl")}
    assert len(left) == 2 and len(os.listdir(tmp_path)) == 3 and not any(n.startswith("b") for n in left)
    others = ["a.json.tmp", "a.json.0123456.tmp", "a.json.012345678.tmp", "a.json.0123456g.tmp", "a.json"]
    for name in [*others, "xa.json.01234567.tmp", "a.json.01234567.tmp.mine", "a.json.copy.01234567.tmp"]:
        (tmp_path / name).write_text("mine")
    assert {path.name for path in leftovers(tmp_path, "a.json", "a*.jsonl")} == set(left)


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
    with pytest.raises(DataError, match=r'a\.jsonl, line 2: is no JSON object(:| with "a";) .*'):
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
    code += "run_script(main, 'the output', 'stopped: resume')"
    command = ["bash", "-c", 'set -o pipefail; "$0" -c "$1" | head -1', sys.executable, code]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


SAID = {
    "raise DataError('a.json: is empty; fetch it')": "error: a.json: is empty; fetch it\n",
    "open('/none/a')": "error: /none/a: No such file or directory; check the path\n",
    "raise OSError(28, 'No space left')": "error: the output: No space left; free some space\n",
    "raise OSError(30, 'Read-only', '/a')": "error: /a: Read-only; choose a place that can be written\n",
    "raise KeyboardInterrupt": "stopped: resume\n",
    "print('a\\n' * 1_000_000)": "",  # head has read enough
}


@pytest.mark.parametrize("body", SAID)
@pytest.mark.parametrize("size", ["1", "2"])
def test_scripts_end_in_one_line(body, size):
    assert script(body, WORLD_SIZE=size) == (1, SAID[body])


REMEDIES = {
    "free some space": ["ENOSPC", "EDQUOT"],
    "free some space, or raise ulimit -f": ["EFBIG"],
    "choose a place that can be written": ["EROFS"],
    "change its permissions, or choose another place": ["EACCES", "EPERM"],
    "raise ulimit -n": ["EMFILE"],
    "check the disk": ["EIO"],
    "check the path": ["ENOENT", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP"],
}


@pytest.mark.parametrize(("remedy", "name"), [(text, name) for text in REMEDIES for name in REMEDIES[text]])
def test_the_remedy_is_that_of_the_fault(remedy, name):
    """Also where Rust says it, or DCP for a rank."""
    number = getattr(errno, name)
    for error in (
        OSError(number, os.strerror(number), "/a/Errno 5"),
        ValueError(f"I/O error: {os.strerror(number)} (os error {number})"),
        ValueError(f"RuntimeError: \n (Rank 1):\n [Errno {number}] {os.strerror(number)}\n"),
    ):
        assert disk_remedy(error) == remedy
    assert disk_remedy(ValueError("no reason")) == "check the path"


def test_letters_that_the_terminal_lacks():
    """In a sentence, in a path that is not UTF-8, in a message."""
    body = r"print('\u4eba \xe9 \udcff', flush=True); raise DataError('\u4eba.json: is empty')"
    code = f"from runtime.files import DataError, run_script\ndef main():\n    {body}\nrun_script(main, 'a')"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1:strict"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert (done.stdout, done.stderr) == (b"\\u4eba \xe9 \\udcff\n", b"error: \\u4eba.json: is empty\n")


@pytest.mark.parametrize(("rank", "error"), [("1", "DataError('of rank 0')"), ("0", "RuntimeError('lost')")])
def test_what_another_rank_says_better(rank, error):
    """A rank waits before it speaks; here it is ended in the meantime, as by torchrun."""
    body = f"time.sleep = lambda _: os._exit(9); raise {error}"
    assert script(body, WORLD_SIZE="2", RANK=rank) == (9, "")
