"""The frames of samples: decoded ahead of the model in worker processes, and cached on disk.

    loader = FrameLoader(config, policy.size_factor)
    loader.prefetch(samples_of_the_next_steps)  # returns at once
    frames = loader.frames(sample)  # waits until they are there
    loader.close()

Why processes: on some damaged files the native decoder crashes or never returns, and while it spins it holds
Python's lock, so that no thread and no signal handler in Python can end it. In a process of its own it costs
one clip and not the run. (torch's DataLoader ends the run when a worker crashes, and does not name the file.)
frames.py says what is decoded and how; this file only where and when.
"""

import contextlib
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import Config
from runtime.files import disk_remedy, write_whole
from samples import Sample
from video.frames import REENCODE, Header, VideoError, clip_frames, frame_size, probe

# libav repairs damaged pictures by guessing, and only says so on stderr. (Missing references are no sign of
# damage: films that begin with an open group of pictures lack them.)
GUESSED = re.compile(r"error while decoding|concealing|damaged|error at MB|corrupt|invalid NAL", re.I)
ROOT = Path(__file__).resolve().parent.parent
CACHE_VERSION = 2  # raise it when clip_frames computes other numbers: old entries are not used then


class Workers:
    """Worker processes; one that hangs or crashes costs its job, not the run.

    Each is a fresh interpreter that imports this file, not the script that runs (as multiprocessing would).
    It is started with its first job, and again after it was lost. One thread waits for each process.
    """

    def __init__(self, count: int, timeout: float):
        """count: processes. timeout: seconds for one job, without the start of its process."""
        self.timeout = timeout
        self.guessed: dict[str, str] = {}  # file -> what its decoder said about pictures that it had to guess
        self.threads = ThreadPoolExecutor(count, thread_name_prefix="video")
        self._own = threading.local()  # .process and .pipe of this thread
        self._processes: list[subprocess.Popen] = []
        self._lock = threading.Lock()  # between a thread that starts a process and close()
        self._closed = False

    def submit(self, path: str, function: Callable, *arguments) -> Future:
        """Run function(*arguments) in a process. path: the file that it reads, named in errors.

        function: one that the process can import. The Future raises what the function raises, and VideoError
        when the process was lost.
        """
        return self.threads.submit(self.run, path, function, *arguments)

    def run(self, path: str, function: Callable, *arguments):
        """The same for a thread of `threads`, which waits for the result."""
        if getattr(self._own, "pipe", None) is None:
            self._start()
        try:
            self._own.pipe.send((function, arguments, self.timeout))
            done, result, guessed = self._own.pipe.recv()
        except (EOFError, OSError):  # OSError: lost before it took the job, or in half its answer
            raise self._loss(path) from None
        if guessed:
            self.guessed[path] = guessed
        if not done:
            raise result
        return result

    def close(self) -> None:
        """End the processes, whatever they do. Jobs that wait are cancelled."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()  # it holds nothing worth keeping
        self.threads.shutdown()
        for process in self._processes:
            process.wait()

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the workers are closed")
            ours, theirs = Pipe()
            path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            # -P: without the current directory, which is the user's, on the path.
            # A session of its own: Ctrl-C in the terminal does not reach it. It ends when the pipe does.
            self._own.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "video.loader", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            )
            theirs.close()
            self._own.pipe = ours
            self._processes.append(self._own.process)

    def _loss(self, path: str) -> VideoError:
        """The error of a job whose process was lost; the next job starts another one."""
        process, self._own.pipe = self._own.process, None
        process.kill()  # where it closed the pipe without ending
        code = process.wait()
        if code == -signal.SIGALRM:
            what = f"not decoded within {self.timeout:g} s; raise video_timeout on a slow machine,"
        elif code < 0:
            memory = "; is memory short? lower video_workers" if code == -signal.SIGKILL else ""
            what = f"the decoder crashed ({signal.Signals(-code).name}){memory};"
        else:
            what = f"the process that decodes it ended with code {code};"
        return VideoError(f"{path}: {what} {REENCODE}, or remove its annotation")


def serve(pipe: Connection) -> None:
    """The worker process: run what comes, until the other end is closed. What decoders write to stderr is
    searched for GUESSED and not shown."""
    torch.set_num_threads(1)
    with tempfile.TemporaryFile() as messages:
        os.dup2(messages.fileno(), sys.stderr.fileno())
        while True:
            try:
                function, arguments, timeout = pipe.recv()
                messages.seek(0)
                messages.truncate()
                signal.setitimer(signal.ITIMER_REAL, timeout)  # SIGALRM ends the process
                try:
                    answer = True, function(*arguments)
                except Exception as error:  # raised again in the process that asked
                    answer = False, error
                signal.setitimer(signal.ITIMER_REAL, 0)
                messages.seek(0)
                said = messages.read().decode(errors="replace")
                said = re.sub(r"\[(\w+) @ 0x\w+\]", r"[\1]", said).splitlines()  # without addresses
                pipe.send((*answer, next((line.strip() for line in said if GUESSED.search(line)), None)))
            except (EOFError, ConnectionError):
                return


def read_headers(paths: Iterable[str]) -> dict[str, Header]:
    """path -> header, read in two worker processes. Raises VideoError for the first file that cannot be
    read, or not within a minute."""
    with contextlib.closing(Workers(2, 60.0)) as workers:
        futures = {path: workers.submit(path, probe, path) for path in dict.fromkeys(paths)}
        bar = tqdm(futures.items(), desc="video headers", delay=2, leave=False, disable=None)
        return {path: future.result() for path, future in bar}


class FrameLoader:
    """The frames of samples as the model sees them, decoded ahead and cached. For one thread to use.

    prefetch() says which samples are read next: train.py names this batch and the next one, evaluate.py its
    next few batches. That window, and no more, is in memory.

    The cache is a folder with one .npy file for each clip; several processes may share it. When it is full
    nothing more is written, and no entry makes room for another, on purpose: an epoch reads every clip once
    in random order. A cache that keeps what it has hits as often as it is large (half the clips: 50 %); one
    that drops the least recently used has mostly dropped a clip by the time it comes again (15 %).
    """

    def __init__(self, config: Config, size_factor: int, say: Callable[[str], None] | None = None):
        """size_factor: of the policy, in pixels. say: takes the messages; by default tqdm.write to stderr."""
        self.config, self.size_factor = config, size_factor
        self.say = say or partial(tqdm.write, file=sys.stderr)
        self.workers = Workers(config.video_workers, config.video_timeout) if config.video_workers else None
        self.cache = Path(config.frame_cache) if config.frame_cache else None
        self._cache_grows = True
        self._said: set[str] = set()
        self._bad: dict[str, str] = {}  # key -> why; not tried a second time
        self._window: dict[str, Future | None] = {}  # key -> frames; None: wanted, not begun

    def prefetch(self, samples: Iterable[Sample]) -> None:
        """Begin to decode these, in this order. They stay in memory until the next call; what is not among
        them is forgotten, and not begun if it still waits."""
        wanted = {self._key(sample): sample for sample in samples}
        for key in self._window.keys() - wanted:
            if self._window[key]:
                self._window[key].cancel()
        self._window = {key: self._window.get(key) for key in wanted}
        if self.workers:
            for key, sample in wanted.items():
                self._window[key] = self._window[key] or self._begin(key, sample)

    def frames(self, sample: Sample) -> torch.Tensor | None:
        """uint8 (T, h, w, 3) as clip_frames; to be read only, since samples of one clip share it. Waits for
        it. Raises VideoError for a video that cannot be read; with on_bad_video: skip returns None."""
        key = self._key(sample)
        if key in self._bad:
            return self.reject(self._bad[key])
        future = self._window.get(key) or self._begin(key, sample)
        if key in self._window:
            self._window[key] = future
        try:
            frames = torch.from_numpy(future.result())
        except VideoError as error:
            self._bad[key] = str(error)
            return self.reject(self._bad[key])
        if self.workers and sample.video in self.workers.guessed:
            message = self.workers.guessed[sample.video]
            self.say_once(f"{sample.video}: damaged, some pictures are the decoder's guess ({message})")
        return frames

    def reject(self, why: str) -> None:
        """Raise VideoError for a video that is of no use; with on_bad_video: skip say it once instead."""
        if self.config.on_bad_video == "error":
            raise VideoError(why)
        self.say_once(f"skipped: {why}")

    def say_once(self, text: str) -> None:
        """Say it unless it was said before: a clip comes again every epoch."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def close(self) -> None:
        self.prefetch([])
        if self.workers:
            self.workers.close()

    def _begin(self, key: str, sample: Sample) -> Future:
        if self.workers:
            return self.workers.threads.submit(self._get, key, sample)
        future: Future = Future()
        try:
            future.set_result(self._get(key, sample))
        except VideoError as error:
            future.set_exception(error)
        return future

    def _get(self, key: str, sample: Sample) -> np.ndarray:
        if self.cache:
            with contextlib.suppress(OSError, ValueError, EOFError):  # there is none, or it is damaged
                return np.load(self.cache / f"{key}.npy")
        decode = partial(self.workers.run, sample.video, clip_frames) if self.workers else clip_frames
        bare = replace(sample, boxes={})  # boxes can be many, and no frame depends on them
        frames = decode(bare, self.config.fps, self.config.max_side, self.size_factor)
        if self.cache and self._cache_grows:
            self._save(key, frames)
        return frames

    def _save(self, key: str, frames: np.ndarray) -> None:
        """Add to the cache. Failing costs the cache and not the run: it is said once."""
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            # Other processes add to it, too, so it is measured each time.
            sizes = [entry.stat().st_size for entry in os.scandir(self.cache) if entry.name.endswith(".npy")]
            if sum(sizes) + frames.nbytes > self.config.frame_cache_gb * 1e9:
                why = f"is full at {self.config.frame_cache_gb:g} GB; raise frame_cache_gb or delete entries"
            else:
                content = io.BytesIO()
                np.save(content, frames)
                write_whole(self.cache / f"{key}.npy", content.getvalue())
                return
        except OSError as error:
            why = f"cannot be written ({error.strerror}); {disk_remedy(error)}, or set another folder"
        self._cache_grows = False
        self.say_once(f"{self.cache}: the cache of frames {why}. Nothing is added to it any more")

    def _key(self, sample: Sample) -> str:
        """All that the frames depend on: the file as it is now, what its annotation says of the clip, and the
        size and rate shown. Sentences about the same clip have the same key."""
        try:
            file = os.stat(sample.video)
            state = file.st_size, file.st_mtime_ns
        except OSError:  # reading it will say what is wrong
            state = None
        size = frame_size(sample.width, sample.height, self.config.max_side, self.size_factor)
        clip = (sample.begin_frame, sample.num_frames, sample.file_frames, sample.fps)
        clip += (sample.width, sample.height)
        what = (CACHE_VERSION, os.path.abspath(sample.video), state, clip, self.config.fps, size)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:40]


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
