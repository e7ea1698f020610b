"""video/loader.py: what worker processes and the cache do when all is well, and when it is not."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from films import cut, numbers, write_film

import train
from config import Config
from lab.check_data import check_videos
from samples import Sample
from video.frames import VideoError, clip_frames, probe
from video.loader import FrameLoader, Workers


def make_sample(path, num_frames=60, begin_frame=0):
    """fps is 30; at 2 frames a second frames 0, 15, 30, 45 of a clip are shown."""
    clip = {"num_frames": num_frames, "begin_frame": begin_frame, "first_frame": 0, "stop_frame": 1}
    return Sample("a", str(path), "it moves", 160, 90, fps=30.0, file_frames=60, **clip, boxes={0: None})


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Three films of 2 s, to be read only."""
    folder = tmp_path_factory.mktemp("films")
    return [write_film(folder / f"{n}.mp4", 60) for n in range(3)]


@pytest.fixture(scope="module")
def workers():
    """One process, started again where a test ends it; each start takes seconds."""
    workers = Workers(1, timeout=30)
    yield workers
    workers.close()


def make_loader(workers=None, **settings):
    loader = FrameLoader(Config(fps=2.0, max_side=112, video_workers=0, **settings), 28)
    loader.workers = workers
    return loader


def test_a_job_is_done_elsewhere(workers, capfd):
    process = workers.submit("a", os.getpid).result()
    assert process != os.getpid() and workers.submit("a", torch.get_num_threads).result() == 1
    with pytest.raises(ZeroDivisionError):
        workers.submit("a", divmod, 1, 0).result()
    assert workers.submit("a", os.getpid).result() == process  # errors end no process
    # What decoders say is not shown; what they say of damage is kept.
    workers.submit("b.mp4", os.write, 2, b"[h264] mmco: unref short failure\n").result()
    workers.submit("c.mp4", os.write, 2, b"noise\n[h264 @ 0x12] error while decoding MB 0 19\n").result()
    assert workers.guessed == {"c.mp4": "[h264] error while decoding MB 0 19"}
    assert capfd.readouterr().err == ""


def test_a_process_that_is_lost_costs_its_job_only(workers):
    crash, after = workers.submit("a.mp4", os.abort), workers.submit("b", divmod, 17, 5)
    with pytest.raises(VideoError, match=r"a\.mp4: the decoder crashed \(SIGABRT\); re-encode"):
        crash.result(60)
    assert after.result(60) == (3, 2)
    os.kill(workers.submit("a", os.getpid).result(), signal.SIGKILL)  # between two jobs
    with pytest.raises(VideoError, match=r"c\.mp4: the decoder crashed \(SIGKILL\).*video_workers"):
        workers.submit("c.mp4", divmod, 17, 5).result(60)
    with pytest.raises(VideoError, match=r"d\.mp4: the process that decodes it ended with code 3"):
        workers.submit("d.mp4", os._exit, 3).result(60)


def test_a_decoder_that_never_returns(workers, tmp_path, monkeypatch):
    """decord's seeking on a film with hidden frames spins and holds Python's lock: no thread of that process
    runs, so only the alarm can end it."""
    film = write_film(tmp_path / "a.mp4", 220, bf=0, x264_params="scenecut=0:keyint=infinite")
    path = cut(film, tmp_path / "cut.mp4", 4.37)
    monkeypatch.setattr(workers, "timeout", 1.5)
    code = f"import decord; r = decord.VideoReader({path!r}, num_threads=1); r.get_batch([len(r) - 1])"
    hangs = workers.submit(path, exec, code)
    with pytest.raises(VideoError, match=r"cut\.mp4: not decoded within 1\.5 s; raise video_timeout"):
        hangs.result(60)
    monkeypatch.undo()
    assert workers.submit(path, probe, path).result(60) == probe(path)


def test_closing_ends_what_runs_and_what_waits():
    workers = Workers(1, timeout=600)
    process = workers.submit("a", os.getpid).result()
    running, waiting = workers.submit("a", time.sleep, 600), workers.submit("b", time.sleep, 600)
    workers.close()
    assert waiting.cancelled() and running.done() and not os.path.exists(f"/proc/{process}")


def test_processes_end_with_a_killed_script(tmp_path):
    """run() returns when no process holds the output. The folder's modules with our names are not taken."""
    (tmp_path / "samples.py").write_text("raise RuntimeError")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    script = "import os; from video.loader import Workers; workers = Workers(1, timeout=60);"
    script += "print(workers.submit('a', divmod, 17, 5).result(), flush=True); os.kill(os.getpid(), 9)"
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "timeout": 120}
    done = subprocess.run([sys.executable, "-P", "-c", script], **options)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"(3, 2)\n")


@pytest.mark.parametrize("processes", [False, True])
def test_with_and_without_processes(processes, workers, films, tmp_path):
    """One bad file among them: the others are there, and asking again gives the error again."""
    loader, missing = make_loader(workers if processes else None), make_sample(tmp_path / "no.mp4")
    loader.prefetch([make_sample(films[0]), missing, make_sample(films[1])])
    for _ in range(2):
        with pytest.raises(VideoError, match=r"no\.mp4: no such video file"):
            loader.frames(missing)
    frames = loader.frames(make_sample(films[1]))
    assert frames.dtype == torch.uint8 and numbers(frames) == [0, 15, 30, 45]
    assert (frames.numpy() == clip_frames(make_sample(films[1]), 2.0, 112, 28)).all()


def test_pictures_that_the_decoder_guessed_are_reported(workers, tmp_path, capsys):
    """A few bytes of a film are zero. Depending on which, libav gives up, or guesses and only says so."""
    content, loader = Path(write_film(tmp_path / "whole.mp4", 60)).read_bytes(), make_loader(workers)
    for k in range(20, 90, 5):
        path, at = tmp_path / f"{k}.mp4", len(content) * k // 100
        path.write_bytes(content[:at] + bytes(12) + content[at + 12 :])
        with contextlib.suppress(VideoError):
            loader.frames(make_sample(path))
        if workers.guessed.get(str(path)):
            break
    loader.frames(make_sample(path))
    said = capsys.readouterr().err  # once
    assert said.count("\n") == 1 and said.startswith(
        f"{path}: damaged, some pictures are the decoder's guess"
    )


@pytest.fixture
def decoded(monkeypatch):
    """The samples whose clips are decoded."""
    asked = []

    def count(sample, *more):
        asked.append(sample)
        return clip_frames(sample, *more)

    monkeypatch.setattr("video.loader.clip_frames", count)
    return asked


def test_a_clip_is_decoded_once(decoded, films, tmp_path, capsys):
    """Sentences share its frames. A bad one is not tried again: it may take video_timeout seconds."""
    loader, first = make_loader(), make_sample(films[0])
    second, part = replace(first, sentence="it stands", id="b"), make_sample(films[0], 30, begin_frame=15)
    loader.prefetch([first, second])
    assert torch.equal(loader.frames(first), loader.frames(second)) and len(decoded) == 1
    assert numbers(loader.frames(part)) == numbers(loader.frames(part)) == [15, 30] and len(decoded) == 3
    for window, count in (([second], 3), ([], 4)):  # what is prefetched stays
        loader.prefetch(window)
        assert numbers(loader.frames(first)) == [0, 15, 30, 45] and len(decoded) == count
    assert not any(sample.boxes for sample in decoded)  # never sent along
    loader, bad = make_loader(on_bad_video="skip"), make_sample(tmp_path / "bad.mp4")
    assert loader.frames(bad) is loader.frames(bad) is None and len(decoded) == 5
    assert capsys.readouterr().err.count("skipped: ") == 1


def test_prefetch_decodes_ahead_and_forgets(workers, films, monkeypatch):
    loader, samples = make_loader(workers), [make_sample(path) for path in films]
    gate, reached = threading.Event(), threading.Event()
    workers.threads.submit(gate.wait)  # until then nothing begins
    for window in (samples[:2], samples[1:2]):
        loader.prefetch(window)
    gate.set()
    workers.threads.submit(reached.set)  # after all that was begun
    assert reached.wait(60)
    monkeypatch.setattr(workers, "run", None)  # from here on nothing can be decoded
    assert numbers(loader.frames(samples[1])) == [0, 15, 30, 45]
    with pytest.raises(TypeError):
        loader.frames(samples[0])


def test_a_cached_clip_is_not_decoded_again(films, tmp_path, decoded, monkeypatch):
    """Unless something that its frames depend on has changed."""
    path, folder = tmp_path / "film.mp4", tmp_path / "new" / "cache"
    path.write_bytes(Path(films[0]).read_bytes())
    sample = make_sample(path)

    def decodes(sample):
        before = len(decoded)
        frames = make_loader(frame_cache=str(folder)).frames(sample)
        assert torch.equal(frames, torch.from_numpy(clip_frames(sample, 2.0, 112, 28)))
        return len(decoded) - before

    assert decodes(sample) == 1 and decodes(replace(sample, sentence="another", id="b")) == 0
    (entry,) = folder.iterdir()
    good = entry.read_bytes()
    for damaged in (b"", good[:60], good[:-1], bytes(len(good))):
        entry.write_bytes(damaged)
        assert decodes(sample) == 1 and entry.read_bytes() == good
    monkeypatch.chdir(tmp_path)
    assert decodes(replace(sample, video="film.mp4")) == 0  # the same from anywhere
    assert decodes(replace(sample, begin_frame=10, num_frames=50)) == 1 == decodes(make_sample(path, 50))
    assert decodes(replace(sample, video=films[0])) == 1
    for more in (b"", bytes(8)):  # another time, another size
        path.write_bytes(path.read_bytes() + more)
        os.utime(path, ns=(0, 12345))
        assert decodes(sample) == 1
    with pytest.raises(VideoError):  # a wrong size is not excused by the right one's entry
        decodes(replace(sample, width=90))


def test_the_cache_is_bounded(films, tmp_path, capsys):
    """Room for two of three clips: the first two stay, whatever is read, and one line says so."""
    loader = make_loader(frame_cache=str(tmp_path), frame_cache_gb=2.5 * 4 * 56 * 112 * 3 / 1e9)
    for path in films * 2:
        loader.frames(make_sample(path))
    said = capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2 and said.count("\n") == 1 and "raise frame_cache_gb" in said


def test_a_cache_that_cannot_be_written(films, tmp_path, capsys, full_disk):
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", Path("/proc/self"), tmp_path / "full"):
        loader = make_loader(frame_cache=str(folder))
        with full_disk() if folder.name == "full" else contextlib.nullcontext():
            for path in films[:2]:
                assert numbers(loader.frames(make_sample(path))) == [0, 15, 30, 45]
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith(f"{folder}: the cache of frames cannot be written")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("time_unit", "fps"), [("frame", 10.0), ("second", 2.0)])
def test_check_data_refuses_what_training_would(tmp_path, monkeypatch, capsys, time_unit, fps):
    """Events everywhere in clips of a film of 6 s of which 4.5 s are there."""
    path = write_film(tmp_path / "a.mp4", 45, fps=10)
    monkeypatch.setattr(train, "make_prompt", lambda *_: None)
    config = Config(max_side=112, time_unit=time_unit, fps=fps, video_workers=0, frame_cache=str(tmp_path))
    loader, samples = FrameLoader(config, 28), []
    for begin, first in [(k, first) for k in (0, 7, 48) for first in range(0, 60 - k)]:
        sample = replace(make_sample(path, 60 - begin, begin), fps=10.0, id=f"{begin}, {first}")
        boxes = {sample.num_frames - 1: (0.0, 0.0, 1.0, 1.0)}  # at its end only
        samples.append(replace(sample, first_frame=first, stop_frame=sample.num_frames, boxes=boxes))
    shown = []
    for sample in samples:
        with contextlib.suppress(VideoError):
            shown += train.make_prompts(None, [(0, sample)], loader, config)[0]
    bad = check_videos(config, samples, 28, decode=False)
    assert 20 < len(shown) == len(samples) - bad.total() < len(samples)
    assert "1 videos have another number of frames" in capsys.readouterr().err
