"""The frames of samples: decoded ahead in worker processes, and kept in a cache on disk.

    clips = FrameLoader(policy.size_factor, fps=2.0, max_side=336, workers=4, cache="cache")
    clips.prefetch(samples_of_the_next_steps)  # returns at once
    frames = clips.frames(sample)  # waits until they are there
    clips.close()

Why processes: on some damaged files the native decoder crashes or never returns, and while it spins it holds
Python's lock, so that no thread and no Python signal handler can end it. In a process of its own it costs one
clip and not the run. (video.py describes what is decoded, and how; this file only where and when.)
"""

import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import io
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import uuid
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
import torch
from tqdm import tqdm

from config import Config
from samples import Sample
from video.frames import REENCODE, VideoError, clip_frames, frame_size

# What numpy raises, besides OSError, for a file that is not what np.save wrote.
DAMAGED = (ValueError, EOFError, MemoryError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile)
# libav repairs damaged pictures by guessing, and only says so. (That references are missing is no sign of
# damage: films that begin with an open group of pictures lack them.)
GUESSED = re.compile(r"error while decoding|concealing|damaged|error at MB|corrupt|invalid NAL", re.I)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE_VERSION = 1  # raise it when clip_frames comes to compute other numbers: old entries are not used then


# ----------------------------------------------------------------------------------------------------------
# Worker processes


@dataclass
class Child:
    """A worker process and our end of the pipe to it."""

    process: subprocess.Popen
    pipe: Connection

    def end(self) -> int:
        """Kill it if it still runs; its exit code. It holds nothing worth keeping."""
        self.process.kill()
        self.pipe.close()
        return self.process.wait()


class Workers:
    """Processes that run functions of video.py; one that hangs or crashes costs its job, not the run.

    The processes are started when they are first needed, and again after they were lost. Each is a fresh
    interpreter that imports this file and video.py, not the script that runs (as multiprocessing would).
    """

    def __init__(self, count: int, timeout: float):
        """count: processes. timeout: seconds for one job, without the start of its process."""
        self.timeout = timeout
        self.damaged: dict[str, str] = {}  # file -> what its decoder said of pictures that it had to guess
        self.threads = ThreadPoolExecutor(count, thread_name_prefix="clips")  # one waits for each process
        self._free: queue.LifoQueue[Child | None] = queue.LifoQueue()  # None: a process not yet started
        for _ in range(count):
            self._free.put(None)
        self._lock = threading.Lock()
        self._children: list[Child] = []
        self._closed = False

    def submit(self, function: Callable, *arguments) -> Future:
        """Run function(*arguments) in a process: a module-level function that the process can import, such as
        those of video.py. The Future raises what the function raises, and VideoError when its process was
        lost; the first argument, or its `video`, is the file named then."""
        return self.threads.submit(self.run, function, *arguments)

    def run(self, function: Callable, *arguments):
        """As submit, but waits here for the result. At most as many threads as processes may be in it."""
        child = self._free.get()
        try:
            child = child or self._start()
            try:
                child.pipe.send((function, arguments, self.timeout))
                done, result, guessed = child.pipe.recv()
            except (EOFError, OSError):  # OSError: it was lost before it took the job, or in half its answer
                lost, child = child, None
                raise self._loss(lost, arguments) from None
        finally:
            self._free.put(child)
        if guessed:
            self.damaged[_file_of(arguments)] = guessed
        if not done:
            raise result
        return result

    def close(self) -> None:
        """End the processes, whatever they do. Jobs that run or wait are cancelled."""
        with self._lock:
            self._closed = True
            for child in self._children:
                child.process.kill()
        self.threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.end()
        self._children.clear()

    def _start(self) -> Child:
        with self._lock:
            if self._closed:
                raise concurrent.futures.CancelledError
            ours, theirs = Pipe()
            # In a session of its own a process gets no Ctrl-C from the terminal; it ends when the pipe does.
            process = subprocess.Popen(
                [sys.executable, "-m", "video.loader", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": ROOT},
            )
            theirs.close()
            child = Child(process, ours)
            self._children.append(child)
            return child

    def _loss(self, child: Child, arguments: tuple) -> Exception:
        """What to raise for a job whose process was lost."""
        code = child.end()
        with self._lock:
            if self._closed:
                return concurrent.futures.CancelledError()
            self._children.remove(child)
        path = _file_of(arguments)
        if code == -signal.SIGALRM:
            return VideoError(
                f"{path}: not decoded within {self.timeout:g} s; {REENCODE}, or remove its annotation (or"
                " allow more time, if the machine is slow)"
            )
        if code < 0:
            return VideoError(
                f"{path}: the decoder crashed (signal {-code}, {signal.Signals(-code).name}); {REENCODE}, or"
                " remove its annotation (signal 9 can mean that memory is short: use fewer workers)"
            )
        return VideoError(f"{path}: the process that decodes it ended with code {code}")


def _file_of(arguments: tuple) -> str:
    """The file that a job is about."""
    return str(getattr(arguments[0], "video", arguments[0])) if arguments else "?"


def serve(pipe: Connection) -> None:
    """The worker process: run what comes, until the other end is closed. What decoders write to stderr is
    read (GUESSED) and not shown."""
    torch.set_num_threads(1)
    # The alarm must be able to end the process by itself: a handler in Python would never run.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with tempfile.TemporaryFile() as messages:
        os.dup2(messages.fileno(), sys.stderr.fileno())
        while True:
            try:
                function, arguments, timeout = pipe.recv()
            except (EOFError, ConnectionError):
                return
            messages.seek(0)
            messages.truncate()
            signal.setitimer(signal.ITIMER_REAL, timeout)
            try:
                answer = True, function(*arguments)
            except Exception as error:  # raised again in the process that asked
                answer = False, error
            signal.setitimer(signal.ITIMER_REAL, 0)
            messages.seek(0)
            said = messages.read().decode(errors="replace")
            said = re.sub(r"\[(\w+) @ 0x\w+\]", r"[\1]", said).splitlines()  # without addresses
            guessed = next((line.strip() for line in said if GUESSED.search(line)), None)
            try:
                pipe.send((*answer, guessed))
            except ConnectionError:  # nobody is left to take it
                return


# ----------------------------------------------------------------------------------------------------------
# The cache


class Cache:
    """Arrays on disk, one .npy file for each key. An aid: what goes wrong with it is said once, no error.

    It is bounded by writing nothing where a file would lead over the bound. No entry is ever removed for
    another, on purpose: an epoch reads every clip once in random order, so a cache that keeps what it has
    hits as often as it is large (half the clips: 50 %), while one that drops the least recently used has
    mostly dropped a clip by the time it comes again (half the clips: 15 %).
    """

    def __init__(self, folder: str, max_gb: float):
        """folder: made where it is missing; may be shared by several processes. max_gb: in 10^9 bytes."""
        self.folder, self.max_bytes = folder, max_gb * 1e9
        self.writing = True
        self._lock = threading.Lock()
        try:
            os.makedirs(folder, exist_ok=True)
            self._clean()
        except OSError as error:
            self._stop(f"cannot be made ({_reason(error)})")

    def _clean(self) -> None:
        """Remove what processes that were killed while they wrote, a day ago or more, have left behind."""
        for path in glob.glob(os.path.join(glob.escape(self.folder), "*.tmp")):
            with contextlib.suppress(FileNotFoundError):  # another process cleans, too
                if os.path.getmtime(path) < time.time() - 86400:
                    os.remove(path)

    def load(self, key: str, like: tuple[int, int, int]) -> np.ndarray | None:
        """The array of a key; None where there is none that can be read. like: (T, h, w) of the frames; there
        may be fewer, of a file that lacks its end."""
        try:
            frames = np.load(self._path(key), allow_pickle=False)
        except (OSError, *DAMAGED):
            return None
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4:
            return None
        whole = 0 < len(frames) <= like[0] and frames.shape[1:] == (*like[1:], 3)
        return frames if whole else None

    def save(self, key: str, frames: np.ndarray) -> None:
        """Keep frames under a key, if there is room. In one piece: nobody ever reads half an entry."""
        if not self.writing:
            return
        temporary = os.path.join(self.folder, f"{key}.{uuid.uuid4().hex}.tmp")  # no other process has it
        try:
            if self._size(without=f"{key}.npy") + frames.nbytes > self.max_bytes:
                limit = f"is full at {self.max_bytes / 1e9:g} GB"
                self._stop(f"{limit}; raise frame_cache_gb, or empty it of other settings' entries")
                return
            try:
                content = io.BytesIO()
                np.save(content, frames)  # straight into a file it would hide the reason of an OSError
                with open(temporary, "xb") as file:
                    file.write(content.getbuffer())
                os.replace(temporary, self._path(key))
            finally:
                with contextlib.suppress(FileNotFoundError):  # the rule: it has its name by now
                    os.remove(temporary)
        except OSError as error:
            self._stop(f"cannot be written ({_reason(error)}); free space, or set another folder")

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, f"{key}.npy")

    def _size(self, without: str) -> int:
        """Bytes in the folder, but for one file. Entries of other processes count, so each time anew."""
        total = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    total += entry.stat().st_size if entry.name != without else 0
                except FileNotFoundError:  # another process has just renamed it
                    continue
        return total

    def _stop(self, why: str) -> None:
        """Write nothing more, and say why, once."""
        with self._lock:
            if self.writing:
                self.writing = False
                print(
                    f"{self.folder}: the cache of frames {why}. Going on without adding to it.",
                    file=sys.stderr,
                )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


# ----------------------------------------------------------------------------------------------------------
# The frames of samples


def open_loader(config: Config, size_factor: int, **more) -> "FrameLoader":
    """As a configuration says; more: arguments of FrameLoader beside."""
    return FrameLoader(
        size_factor,
        fps=config.fps,
        max_side=config.max_side,
        workers=config.video_workers,
        timeout=config.video_timeout,
        cache=config.frame_cache,
        cache_gb=config.frame_cache_gb,
        skip_bad=config.on_bad_video == "skip",
        **more,
    )


class FrameLoader:
    """The frames of samples as the model sees them, decoded ahead and cached. For one thread to use.

    Whoever reads samples in an order says so with ahead(): train.py names the batch at hand and the next one,
    evaluate.py its next few batches. That window, and no more, is in memory.
    """

    def __init__(
        self,
        size_factor: int,
        *,
        fps: float,
        max_side: int,
        workers: int = 0,
        timeout: float = 60.0,
        cache: str = "",
        cache_gb: float = 50.0,
        skip_bad: bool = False,
        say: Callable[[str], None] | None = None,
    ):
        """size_factor: the model's, pixels. fps, max_side: of the frames shown. workers: processes that
        decode; 0: this process does, when it is asked, and a file that hangs hangs it. timeout: seconds for
        one clip. cache: a folder, "" for none. cache_gb: bound of its size in 10^9 bytes; several processes
        that write at the same moment may pass it by the clips that they have in hand. skip_bad: a video
        that cannot be read is said once, and its frames are None; otherwise it is an error. say: takes what
        is to be said; by default to stderr, above the bars."""
        self.size_factor, self.fps, self.max_side = size_factor, fps, max_side
        self.workers = Workers(workers, timeout) if workers else None
        self.cache = Cache(cache, cache_gb) if cache else None
        self.skip_bad, self.say = skip_bad, say or functools.partial(tqdm.write, file=sys.stderr)
        self._said: set[str] = set()
        self._bad: dict[str, VideoError] = {}  # key -> why; not tried a second time
        self._window: dict[str, Future | None] = {}  # key -> frames; None: wanted, not begun

    def prefetch(self, samples: Iterable[Sample]) -> None:
        """Begin to decode these, in this order. They are held in memory until another window is given;
        what is not in this one is forgotten, and not begun if it waits."""
        wanted = {self._key(sample): sample for sample in samples}
        for key, future in self._window.items():
            if future and key not in wanted:
                future.cancel()
        self._window = {key: self._window.get(key) for key in wanted}
        if self.workers:
            for key, sample in wanted.items():
                self._window[key] = self._window[key] or self._begin(key, sample)

    def frames(self, sample: Sample) -> torch.Tensor | None:
        """uint8 (T, h, w, 3) as clip_frames; to be read only, since samples of one clip share it. Waits for
        it. Raises VideoError; with skip_bad None stands for it."""
        key = self._key(sample)
        future = self._window.get(key) or self._begin(key, sample)
        if key in self._window:
            self._window[key] = future
        try:
            frames = torch.from_numpy(future.result())
        except VideoError as error:
            self._bad[key] = error
            return self.reject(str(error))
        if self.workers and sample.video in self.workers.damaged:
            message = self.workers.damaged[sample.video]
            self.say_once(f"{sample.video}: damaged, some pictures are the decoder's guess ({message})")
        return frames

    def reject(self, why: str) -> None:
        """A video that is of no use: say so once with skip_bad, raise VideoError otherwise."""
        if not self.skip_bad:
            raise VideoError(why)
        self.say_once(f"skipped: {why}")

    def say_once(self, text: str) -> None:
        """Pass a text on, if it was not yet: a clip comes again every epoch."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def close(self) -> None:
        """End the processes. (Python waits for all that was begun where this is not called.)"""
        self.prefetch([])
        if self.workers:
            self.workers.close()

    def _begin(self, key: str, sample: Sample) -> Future:
        if self.workers and key not in self._bad:
            return self.workers.threads.submit(self._get, key, sample)
        future: Future = Future()
        try:
            if key in self._bad:
                raise self._bad[key]
            future.set_result(self._get(key, sample))
        except VideoError as error:
            future.set_exception(error)
        return future

    def _get(self, key: str, sample: Sample) -> np.ndarray:
        """From the cache or from the file."""
        if self.cache:
            width, height = frame_size(sample.width, sample.height, self.max_side, self.size_factor)
            frames = self.cache.load(key, (sample.grid(1 / self.fps).num_steps, height, width))
            if frames is not None:
                return frames
        bare = replace(sample, boxes={})  # boxes can be many, and no frame depends on them
        arguments = (bare, self.fps, self.max_side, self.size_factor)
        frames = self.workers.run(clip_frames, *arguments) if self.workers else clip_frames(*arguments)
        if self.cache:
            self.cache.save(key, frames)
        return frames

    def _key(self, sample: Sample) -> str:
        """All that the frames depend on: the file as it is now, what its annotation says of the clip, and the
        size and rate shown. Sentences about the same clip have the same key."""
        try:
            file = os.stat(sample.video)
            state = file.st_size, file.st_mtime_ns
        except OSError:  # reading it will say what is wrong
            state = None
        size = frame_size(sample.width, sample.height, self.max_side, self.size_factor)
        clip = (
            sample.begin_frame,
            sample.num_frames,
            sample.file_frames,
            sample.fps,
            sample.width,
            sample.height,
        )
        what = (CACHE_VERSION, os.path.abspath(sample.video), state, clip, self.fps, size)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:40]


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
