"""clips.py: what worker processes and the cache do when all is well, and when it is not."""

import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from films import cut, numbers, write_film

from samples import Sample
from video.frames import VideoError, clip_frames, probe
from video.loader import Cache, FrameLoader, Workers

ROOT = Path(__file__).parent.parent.parent
SHOWN = {"fps": 2.0, "max_side": 112}


def make_sample(path, num_frames=60, begin_frame=0, file_frames=60):
    return Sample(
        id="a",
        video=str(path),
        sentence="it moves",
        width=160,
        height=90,
        num_frames=num_frames,
        fps=30.0,
        begin_frame=begin_frame,
        file_frames=file_frames,
        first_frame=0,
        stop_frame=1,
        boxes={0: (0.0, 0.0, 1.0, 1.0)},
    )


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """Three films of 2 s; at 2 frames a second frames 0, 15, 30, 45 are shown. To be read only."""
    folder = tmp_path_factory.mktemp("clips")
    return [write_film(folder / f"{n}.mp4", 60) for n in range(3)]


@pytest.fixture(scope="module")
def workers():
    """Two processes for the tests that do not mind what others did to them."""
    workers = Workers(2, timeout=30)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def lone():
    """One process, for the tests that kill it."""
    lone = Workers(1, timeout=30)
    yield lone
    lone.close()


@pytest.fixture
def clips():
    """clips(**changes) -> FrameLoader that are closed in the end."""
    made = []

    def make(**changes):
        made.append(FrameLoader(28, **{**SHOWN, **changes}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def children():
    """Process ids of our children that run clips.py, also those that ended and were not waited for."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{name}/cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(state[1]) == os.getpid() and ("clips.py" in command or state[0] == "Z"):
            found.append(int(name))
    return found


# ----------------------------------------------------------------------------------------------------------
# Worker processes


def test_a_job_is_done_elsewhere(workers):
    assert workers.submit(os.getpid).result() not in (os.getpid(), 0)
    assert workers.submit(divmod, 17, 5).result() == (3, 2)
    assert workers.submit(torch.get_num_threads).result() == 1


def test_results_are_those_of_the_function(workers, films):
    sample = make_sample(films[0])
    frames = workers.submit(clip_frames, sample, 2.0, 112, 28).result()
    assert numbers(frames) == [0, 15, 30, 45] and (frames == clip_frames(sample, 2.0, 112, 28)).all()
    assert workers.submit(probe, films[0]).result() == probe(films[0])


def test_an_error_comes_back_as_it_is(workers, tmp_path):
    before = workers.submit(os.getpid).result()
    with pytest.raises(VideoError, match=r"no\.mp4: no such video file; check the folder given as `videos`"):
        workers.submit(probe, str(tmp_path / "no.mp4")).result()
    with pytest.raises(ZeroDivisionError):
        workers.submit(divmod, 1, 0).result()
    assert workers.submit(os.getpid).result() == before  # and ends no process


def test_several_jobs_at_once(workers):
    begin = time.monotonic()
    wait([workers.submit(time.sleep, 0.01) for _ in range(2)])  # both run
    begin = time.monotonic()
    wait([workers.submit(time.sleep, 0.6) for _ in range(2)])
    assert time.monotonic() - begin < 1.15
    assert len({future.result() for future in [workers.submit(os.getpid) for _ in range(20)]}) <= 2


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        (os.kill, (0, signal.SIGKILL), r"the decoder crashed \(signal 9, SIGKILL\); .*use fewer workers"),
        (os.abort, (), r"the decoder crashed \(signal 6, SIGABRT\); re-encode"),
        (exec, ("import ctypes; ctypes.string_at(0)",), r"crashed \(signal 11, SIGSEGV\); re-encode"),
        (os._exit, (3,), r"the process that decodes it ended with code 3"),
    ],
)
def test_a_process_that_crashes_costs_its_job_only(lone, function, arguments, said):
    if function is os.kill:
        arguments = (lone.submit(os.getpid).result(), signal.SIGKILL)
    crash, after = lone.submit(function, *arguments), lone.submit(divmod, 17, 5)
    with pytest.raises(VideoError, match=said):
        crash.result(30)
    assert after.result(30) == (3, 2)


def test_a_process_killed_between_two_jobs(lone, tmp_path):
    os.kill(lone.submit(os.getpid).result(), signal.SIGKILL)
    time.sleep(0.2)
    sample = make_sample(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=r"a\.mp4: the decoder crashed \(signal 9"):
        lone.submit(clip_frames, sample, 2.0, 112, 28).result(30)
    assert lone.submit(divmod, 17, 5).result(30) == (3, 2)


HANG = """
import decord
reader = decord.VideoReader({path!r}, num_threads=1)
reader.get_batch([len(reader) - 1])
"""


def test_a_decoder_that_never_returns(tmp_path):
    """decord's seeking on a film with hidden frames spins and holds Python's lock: no thread of that process
    runs, so only the alarm can end it."""
    film = write_film(tmp_path / "a.mp4", 220, bf=0, x264_params="scenecut=0:keyint=infinite")
    path = cut(film, tmp_path / "cut.mp4", 4.37)
    workers = Workers(1, timeout=1.5)
    try:
        workers.submit(os.getpid).result()
        begin = time.monotonic()
        hangs, sleeps = workers.submit(exec, HANG.format(path=path)), workers.submit(time.sleep, 600)
        after = workers.submit(probe, path)
        with pytest.raises(VideoError, match=r"not decoded within 1\.5 s; re-encode it"):
            hangs.result(60)
        assert 1.4 < time.monotonic() - begin < 10
        with pytest.raises(VideoError, match=r"600: not decoded within 1\.5 s"):
            sleeps.result(60)
        assert after.result(60) == probe(path)
    finally:
        workers.close()


def test_closing_leaves_nothing_behind():
    """No process, no open file, no thread, no warning; a job that runs and those that wait are cancelled."""
    gc.collect()
    processes, files = set(children()), set(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        workers = Workers(2, timeout=600)
        with pytest.raises(VideoError):
            workers.submit(os._exit, 1).result()  # one that was lost
        running = [workers.submit(time.sleep, 600) for _ in range(2)]
        waiting = workers.submit(time.sleep, 600)
        while not all(future.running() for future in running):
            time.sleep(0.01)
        time.sleep(0.1)
        begin = time.monotonic()
        workers.close()
        assert time.monotonic() - begin < 5
        assert waiting.cancelled()
        for future in running:
            with pytest.raises(CancelledError):
                future.result()
        del workers, future, running, waiting
        gc.collect()
    assert not caught and set(children()) <= processes and len(os.listdir("/proc/self/fd")) <= len(files)


SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
from clips import Workers
workers = Workers(2, timeout=5)
ids = [workers.submit(eval, "__import__('os').getpid(), __import__('time').sleep(0.3)") for _ in range(2)]
print(*(future.result()[0] for future in ids), flush=True)
workers.submit(eval, "__import__('time').sleep(1)")
while True:
    time.sleep(0.02)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_processes_end_with_ours(how, tmp_path):
    """A Ctrl-C goes to the whole group of the terminal: only the script itself may hear of it. And a script
    that is killed cannot end anything."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)), encoding="utf-8")
    started = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    ids = [int(number) for number in started.stdout.readline().split()]
    assert len(set(ids)) == 2
    os.killpg(started.pid, how)
    _, said = started.communicate(timeout=30)
    assert said.count("Traceback") == (1 if how == signal.SIGINT else 0)
    assert "clips.py" not in said or how == signal.SIGINT
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{number}") for number in ids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_imports_nothing_of_the_script(workers):
    """Not transformers, for one: seconds and hundreds of megabytes each."""
    loaded = workers.submit(eval, "set(__import__('sys').modules)").result()
    assert {"video", "decord"} <= loaded
    assert not {"model", "train", "evaluate", "grpo", "transformers", "conftest", "pytest"} & loaded


# ----------------------------------------------------------------------------------------------------------
# FrameLoader


def test_with_and_without_processes(clips, films):
    samples = [make_sample(path) for path in films]
    plain, two = clips(), clips(workers=2)
    two.prefetch(samples)
    for sample in samples:
        frames = two.frames(sample)
        assert frames.dtype == torch.uint8 and frames.shape == (4, 56, 112, 3)
        assert torch.equal(frames, plain.frames(sample)) and numbers(frames) == [0, 15, 30, 45]


def test_no_warning_about_the_arrays(clips, films, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch says so where an array cannot be written to
        for changes in ({}, {"workers": 1}, {"cache": str(tmp_path)}, {"cache": str(tmp_path)}):
            clips(**changes).frames(make_sample(films[0]))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_clip(clips, films, tmp_path, workers):
    """One bad file in the window: the others are there, and asking again gives the error again."""
    missing = make_sample(tmp_path / "no.mp4")
    some = clips(workers=workers)
    some.prefetch([make_sample(films[0]), missing, make_sample(films[1])])
    for _ in range(2):
        with pytest.raises(VideoError, match=r"no\.mp4: no such video file"):
            some.frames(missing)
    assert len(some.frames(make_sample(films[1]))) == 4
    with pytest.raises(VideoError, match="max_side: 27 is less"):
        clips(workers=workers, max_side=27).frames(make_sample(films[0]))


def test_pictures_that_the_decoder_guessed_are_reported(clips, tmp_path, capsys):
    """A few bytes of a film are zero. Depending on which, libav gives up, or guesses and only says so: then
    the frames are taken, and what it said is passed on, once."""
    content = Path(write_film(tmp_path / "whole.mp4", 60)).read_bytes()
    some = clips(workers=2)
    for k in range(20, 90, 5):
        path = tmp_path / f"{k}.mp4"
        at = len(content) * k // 100
        path.write_bytes(content[:at] + bytes(12) + content[at + 12 :])
        try:
            some.frames(make_sample(path))
        except VideoError:
            continue
        said = capsys.readouterr().err
        if said:
            break
    assert (
        said.startswith(f"{path}: damaged, some pictures are the decoder's guess (") and said.count("\n") == 1
    )
    some.frames(make_sample(path))
    assert capsys.readouterr().err == ""


def test_what_decoders_write_is_not_shown(lone, capfd):
    """Complaints that are no damage are dropped; those that are stay with the file."""
    lone.submit(os.write, 2, b"[h264] mmco: unref short failure\n").result()
    assert lone.damaged == {}
    lone.submit(os.write, 2, b"noise\n[h264] error while decoding MB 0 19, bytestream -5\n").result()
    assert lone.damaged == {"2": "[h264] error while decoding MB 0 19, bytestream -5"}
    assert capfd.readouterr().err == ""


def test_a_bad_clip_is_not_tried_again(clips, tmp_path, monkeypatch, capsys):
    """With skip_bad an epoch later it is asked for again; each time could take video_timeout seconds."""
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    counted, some = Count(monkeypatch), clips(skip_bad=True)
    for _ in range(3):
        some.prefetch([make_sample(tmp_path / "bad.mp4")])
        assert some.frames(make_sample(tmp_path / "bad.mp4")) is None
        some.prefetch([])
    assert len(counted.asked) == 1 and capsys.readouterr().err.count("skipped: ") == 1


class Count:
    """clip_frames, counted, slowly if wanted."""

    def __init__(self, monkeypatch, seconds=0.0):
        self.asked, self.seconds = [], seconds
        monkeypatch.setattr("video.loader.clip_frames", self)

    def __call__(self, sample, *arguments):
        self.asked.append(sample)
        time.sleep(self.seconds)
        return clip_frames(sample, *arguments)


@pytest.mark.parametrize("workers", [0, 1])
def test_sentences_about_one_clip_share_its_frames(clips, films, monkeypatch, workers):
    some = clips(workers=workers)
    count = Count(monkeypatch)
    if workers:  # decode in the thread that would wait for the process, to be able to count
        monkeypatch.setattr(some.workers, "run", lambda function, *arguments: function(*arguments))
    first, second = make_sample(films[0]), replace(make_sample(films[0]), sentence="it stands", id="b")
    some.prefetch([first, second])
    assert some.frames(first) is not some.frames(second)
    assert torch.equal(some.frames(first), some.frames(second)) and len(count.asked) == 1
    part = make_sample(films[0], num_frames=30, begin_frame=15)  # another clip of the same file
    assert numbers(some.frames(part)) == [15, 30] and len(count.asked) == 2
    some.frames(part)  # not in the window: nobody said that it will be needed again
    assert len(count.asked) == 3
    some.prefetch([second])
    some.frames(first)
    assert len(count.asked) == 3  # still there
    some.prefetch([])
    some.frames(first)
    assert len(count.asked) == 4
    assert all(not sample.boxes for sample in count.asked)  # never sent along


def test_ahead_runs_ahead(clips, films, monkeypatch):
    """The clips are ready before they are asked for, while this thread does something else."""
    some = clips(workers=2)
    samples = [make_sample(path) for path in films]
    some.prefetch(samples)
    wait(list(some._window.values()), timeout=60)
    monkeypatch.setattr(some.workers, "run", None)  # from here on nothing can be decoded
    for sample in samples:
        assert numbers(some.frames(sample)) == [0, 15, 30, 45]


def test_what_leaves_the_window_is_not_begun(clips, films, monkeypatch):
    some = clips(workers=1)
    count = Count(monkeypatch, seconds=0.3)
    monkeypatch.setattr(some.workers, "run", lambda function, *arguments: function(*arguments))
    samples = [make_sample(films[0], num_frames=60 - n) for n in range(6)]
    some.prefetch(samples)
    some.frames(samples[0])
    some.prefetch(samples[4:])
    some.frames(samples[4])
    some.frames(samples[5])
    assert [60 - sample.num_frames for sample in count.asked] in ([0, 4, 5], [0, 1, 4, 5])
    assert len(some._window) == 2


# ----------------------------------------------------------------------------------------------------------
# The cache


def test_a_cached_clip_is_not_decoded_again(clips, films, tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(Path(films[0]).read_bytes())
    folder = tmp_path / "new" / "cache"  # made
    sample = make_sample(path)
    first = clips(cache=str(folder)).frames(sample)
    times = path.stat()
    path.write_bytes(bytes(times.st_size))  # no film any more, of the same size and time
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for workers in (0, 1):
        again = clips(cache=str(folder), workers=workers).frames(sample)
        assert torch.equal(first, again) and again.dtype == torch.uint8
    assert [entry.suffix for entry in folder.iterdir()] == [".npy"]
    assert (np.load(next(folder.iterdir())) == first.numpy()).all()
    with pytest.raises(VideoError):
        clips().frames(sample)


def test_what_makes_another_entry(clips, films, tmp_path):
    path, folder = tmp_path / "film.mp4", tmp_path / "cache"
    path.write_bytes(Path(films[0]).read_bytes())
    sample, count = make_sample(path), 0

    def new(sample, **changes):
        nonlocal count
        clips(cache=str(folder), **changes).frames(sample)
        before, count = count, len(list(folder.iterdir()))
        return count - before

    assert new(sample) == 1 and new(sample) == 0
    assert new(replace(sample, sentence="another", id="b", boxes={}, first_frame=3, stop_frame=9)) == 0
    assert new(sample, fps=4.0) == 1 and new(sample, max_side=84) == 1
    assert new(replace(sample, begin_frame=10, num_frames=50)) == 1
    assert new(replace(sample, num_frames=50)) == 1
    os.utime(path, ns=(0, 12345))
    assert new(sample) == 1
    os.utime(path, ns=(0, 12345))
    assert new(sample) == 0
    path.write_bytes(path.read_bytes() + bytes(8))
    os.utime(path, ns=(0, 12345))
    assert new(sample) == 1
    assert new(replace(sample, video=films[0])) == 1
    # A wrong annotation is not excused by an entry made under a right one.
    for wrong in ({"file_frames": 600, "fps": 31.9}, {"width": 90}, {"fps": 10.0}):
        with pytest.raises(VideoError):
            clips(cache=str(folder)).frames(replace(sample, **wrong))


def test_paths_are_the_same_from_anywhere(clips, films, tmp_path, monkeypatch):
    sample = make_sample(films[0])
    monkeypatch.chdir(Path(films[0]).parent)
    assert clips()._key(sample) == clips()._key(replace(sample, video="0.mp4"))


def damages(good):
    """Contents of an entry that are not what was written."""
    yield from (b"", good[:5], good[:60], good[:-1], good[: len(good) // 2], bytes(len(good)))
    yield b"PK\x03\x04" + good  # numpy takes it for a zip file
    generator = np.random.default_rng(0)
    yield generator.bytes(len(good))
    for _ in range(300):  # changes in the header
        content = bytearray(good)
        for _ in range(generator.integers(1, 4)):
            content[generator.integers(0, 128)] = generator.integers(0, 256)
        yield bytes(content)


def test_a_damaged_entry_is_no_entry(tmp_path):
    cache = Cache(str(tmp_path), 1.0)
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    cache.save("a", frames)
    path = tmp_path / "a.npy"
    good = path.read_bytes()
    assert (cache.load("a", (3, 4, 6)) == frames).all() and cache.load("b", (3, 4, 6)) is None
    assert (cache.load("a", (4, 4, 6)) == frames).all()  # of a file that lacks its end
    assert cache.load("a", (2, 4, 6)) is None and cache.load("a", (3, 6, 4)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in damages(good):
            path.write_bytes(content)
            found = cache.load("a", (3, 4, 6))
            assert found is None or (found.dtype, found.shape[1:]) == (np.uint8, (4, 6, 3))
    np.save(path, frames.astype(np.int16))
    assert cache.load("a", (3, 4, 6)) is None


def test_a_damaged_entry_is_replaced(clips, films, tmp_path, capsys):
    sample = make_sample(films[0])
    first = clips(cache=str(tmp_path)).frames(sample)
    (entry,) = tmp_path.iterdir()
    good = entry.read_bytes()
    entry.write_bytes(good[:1000])
    full = {"cache": str(tmp_path), "cache_gb": len(good) / 1e9}  # no room for two
    assert torch.equal(clips(**full).frames(sample), first)
    assert entry.read_bytes() == good and list(tmp_path.iterdir()) == [entry]
    assert capsys.readouterr().err == ""


def test_the_cache_is_bounded(clips, films, tmp_path, capsys):
    """Room for two of three clips: the first two stay, whatever is read, and one line says so."""
    size = 4 * 56 * 112 * 3
    some = clips(cache=str(tmp_path), cache_gb=2.5 * size / 1e9)
    for _ in range(2):
        for path in films:
            some.frames(make_sample(path))
    assert len(list(tmp_path.iterdir())) == 2
    assert sum(entry.stat().st_size for entry in tmp_path.iterdir()) <= 2.5 * size
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"{tmp_path}: the cache of frames is full at ")
    assert "raise frame_cache_gb" in said
    # What other processes wrote counts.
    capsys.readouterr()
    clips(cache=str(tmp_path), cache_gb=2.5 * size / 1e9).frames(make_sample(films[2]))
    assert len(list(tmp_path.iterdir())) == 2 and "full" in capsys.readouterr().err


def test_no_eviction_is_right():
    """The numbers in the docstring of Cache: hits of a cache that keeps and of one that drops the least
    recently used, for half the clips, in epochs of random order."""
    generator, clips_in_all = np.random.default_rng(0), 400
    recent, hits = {}, 0
    for epoch in range(11):
        for clip in generator.permutation(clips_in_all).tolist():
            if clip in recent:
                hits += epoch > 0
                del recent[clip]
            recent[clip] = True
            if len(recent) > clips_in_all // 2:
                del recent[next(iter(recent))]
    assert hits / (10 * clips_in_all) == pytest.approx(0.15, abs=0.02)


def test_a_full_disk(clips, films, tmp_path, capsys, full_disk):
    some = clips(cache=str(tmp_path))
    with full_disk():
        frames = [some.frames(make_sample(path)) for path in films]
    assert all(numbers(one) == [0, 15, 30, 45] for one in frames) and list(tmp_path.iterdir()) == []
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(
        f"{tmp_path}: the cache of frames cannot be written (File too large)"
    )


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
def test_a_folder_that_cannot_be_written(clips, films, tmp_path, capsys, kind):
    folders = {"a file": tmp_path / "a", "below a file": tmp_path / "a/b", "read-only": Path("/proc/self")}
    folder = folders[kind]
    (tmp_path / "a").write_bytes(b"")
    some = clips(cache=str(folder))
    for path in films[:2]:
        assert numbers(some.frames(make_sample(path))) == [0, 15, 30, 45]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"{folder}: the cache of frames ")


WRITER = """
import sys, numpy as np
sys.path.insert(0, {root!r})
from clips import Cache
cache = Cache({folder!r}, 1.0)
frames = np.full((40, 56, 112, 3), 7, dtype=np.uint8)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(60):
    cache.save("a", frames)
    found = cache.load("a", (40, 56, 112))
    assert found is not None and (found == 7).all()
"""


def test_two_processes_write_the_same_entry(tmp_path):
    """Whoever reads finds a whole entry, at any moment."""
    command = [sys.executable, "-c", WRITER.format(root=str(ROOT), folder=str(tmp_path / "cache"))]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for one in both:
        assert one.stdout.readline() == "ready\n"
    for one in both:
        one.stdin.write("\n")
        one.stdin.flush()
    for one in both:
        one.communicate(timeout=60)
        assert one.returncode == 0
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a.npy"]


def test_old_remains_are_removed(tmp_path):
    """A writer that was killed leaves its temporary file, which would count against the bound for ever."""
    for name, age in (("old.1.tmp", 90_000), ("new.2.tmp", 60), ("old.npy", 90_000)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    Cache(str(tmp_path), 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.2.tmp", "old.npy"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(temporary, path):
        assert Path(temporary).stat().st_size == 128 + 48
        raise KeyboardInterrupt

    monkeypatch.setattr("video.loader.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Cache(str(tmp_path), 1.0).save("a", np.zeros((1, 4, 4, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []
