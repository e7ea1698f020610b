"""From a video file to the patches that Qwen-VL reads: choose the frames, resize them, cut them up.

The steps are those of HF's Qwen2VLVideoProcessor and Qwen3VLVideoProcessor, which need torchvision; this
file does not, and its numbers are the same to the last bit (tests/golden). A video is uint8 (T, H, W, 3)
until the last step.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import decord
import numpy as np
import torch
import torch.nn.functional as F

from runtime.files import UserError
from samples import Sample
from video import mp4

TIMESTAMP_ERROR = 1e-4  # s; decord's timestamps are float32, so off by up to 1e-5 s in a three-minute video
SHORTEST = 0.75  # of its annotated duration: a file that holds less is broken, not a little short
HELD_SECONDS = 0.5  # how long the last frame is held where a file ends before its annotation says
NO_SUBSTITUTES = 1e-6  # decord's fault_tol: the share of frames that may be copies of others; 0 means any
# What decord raises.
FAILURES = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError, StopIteration)
Size = tuple[int, int]  # (width, height) in pixels
REENCODE = "re-encode it: ffmpeg -i OLD -c:v libx264 -crf 18 NEW"
# How a file begins that says where its frames lie: mp4 and mov, mkv and webm, avi, flv, y4m.
INDEXED = re.compile(rb".{4}(ftyp|moov|mdat|wide|free|skip)|\x1aE\xdf\xa3|RIFF|FLV|YUV4MPEG2", re.DOTALL)
TURNED = re.compile(rb"\x76\x75[\x84\x88](?!\0{4})")  # in the head of an mkv or webm: ProjectionPoseRoll


class VideoError(UserError):
    """A video that cannot be read as asked."""


class DamagedError(VideoError):
    """A frame of it cannot be decoded."""


@dataclass(frozen=True)
class Header:
    """What a video file says about itself."""

    frames: int  # that are shown
    seconds: float  # from the beginning of the first of them to the end of the last
    width: int  # as shown, in pixels: a portrait film stored on its side stands upright
    height: int
    pixel_aspect: float = 1.0  # width of a pixel by its height, when shown; known of mp4 and mov only

    @property
    def fps(self) -> float:
        """Frames a second; 1 for a lone frame without a duration. decord's seconds are float32, with which 30
        a second becomes 29.999998, and the frame at second 2 the one before it: take the next fraction."""
        rate = self.frames / self.seconds if self.seconds > 0 else 1.0
        return float(Fraction(rate).limit_denominator(1001))


def probe(path: str) -> Header:
    """Read a file's index, and its first frame for the size. Raises VideoError."""
    reader, spans, _ = _open(path)
    height, width = next(_decode(path, reader, [0])).shape[:2]
    return Header(len(spans), float(spans[-1, 1]), width, height, mp4.end_and_aspect(path)[1])


def clip_times(sample: Sample, fps: float) -> list[float]:
    """When the frames of a sample's clip are shown, fps of them a second: seconds from its beginning."""
    return [step / fps for step in range(sample.grid(1 / fps).num_steps)]


def check_header(sample: Sample, header: Header, times: list[float]) -> int:
    """Compare a file with its annotation; returns at how many of these times of the clip, which ascend from
    0, it has a frame to show.

    Raises VideoError for another shape (by more than 2 %: boxes would be scaled by a wrong size; a smaller
    copy of the video is fine, and so is a size in displayed pixels where they are not square), and for
    another duration (by more than 1 s and 5 %: steps would be counted at a wrong rate). A file of the right
    frame rate with at least three quarters of the duration has lost its end: what exists is used, and it is
    an error only where the clip begins after that.
    """
    shape = header.width * sample.height / (header.height * sample.width)
    if min(abs(shape - 1), abs(shape * header.pixel_aspect - 1)) > 0.02:
        raise VideoError(
            f"{sample.video}: its frames are {header.width} x {header.height}, but its annotation says"
            f" {sample.width} x {sample.height}; correct the size in the record (if the film's pixels are"
            " not square, give size and boxes in stored pixels), or fetch the right file"
        )
    annotated = sample.file_frames / sample.fps  # seconds
    rate = header.frames / max(header.seconds, TIMESTAMP_ERROR)  # a lone frame may have no duration
    cut_off = SHORTEST <= header.seconds / annotated < 1 and abs(rate / sample.fps - 1) <= 0.05
    if abs(header.seconds - annotated) > max(1.0, 0.05 * annotated) and not cut_off:
        raise VideoError(
            f"{sample.video}: lasts {header.seconds:.2f} s ({header.frames} frames, {rate:.4g} a second), but"
            f" its annotation says {annotated:.2f} s; correct img_num (VidSTG: frame_count) and fps in the"
            " record (HC-STVG without fps: 20 s), or fetch the right file"
        )
    if header.frames == sample.file_frames:
        return len(times)
    begin = sample.begin_frame / sample.fps
    if begin > header.seconds + HELD_SECONDS:
        raise VideoError(_too_short(sample.video, header.seconds, begin))
    return sum(begin + time <= header.seconds + HELD_SECONDS for time in times)


def _too_short(path: str, end: float, needed: float) -> str:
    return (
        f"{path}: ends at {end:.2f} s, but the frame at {needed:.2f} s is needed; fetch the whole video, or"
        " correct or remove its annotation"
    )


def clip_frames(sample: Sample, fps: float, max_side: int, factor: int) -> np.ndarray:
    """The frames of a sample's clip as the model sees them: fps a second, resized to frame_size.

    Returns uint8 (T, h, w, 3); T is below the number of steps of 1 / fps seconds where the file lacks the end
    of the clip. Raises VideoError.
    """
    size = frame_size(sample.width, sample.height, max_side, factor)
    return read_clip(sample, clip_times(sample, fps), size)


def read_clip(sample: Sample, times: list[float], size: Size | None = None) -> np.ndarray:
    """Check the file of a sample's clip and read the frames at certain times of it, as read_frames does.

    Time is the annotation's: frame n is at n / fps, whatever the file's timestamps say, since boxes are
    numbered and scored so. Only in a file with another number of frames does its own clock choose.
    """
    header = probe(sample.video)
    times = times[: check_header(sample, header, times)]
    if header.frames != sample.file_frames:
        return read_frames(sample.video, times, sample.begin_frame / sample.fps, size)
    clip = sample.grid(1.0)  # its steps are seconds
    chosen = [sample.begin_frame + clip.sampled_frame(time) for time in times]
    return _read(sample.video, _open(sample.video), chosen, size)


def read_frames(path: str, times: list[float], begin: float = 0.0, size: Size | None = None) -> np.ndarray:
    """The frames on screen at certain times of a clip.

    times: seconds from the beginning of the clip, ascending, none below 0. begin: where the clip begins, in
    seconds from the first frame of the file. size: (w, h) to which each frame is resized, one at a time, so
    that a long clip never lies in memory at the file's size; None: the file's size. A frame is on screen from
    its own timestamp to that of the next: videos of variable frame rate are read right.

    Returns uint8 (T', H, W, 3), RGB, of the first T' <= len(times) times: a time at most half a second after
    the file's end gets the last frame, later ones are left out. Raises VideoError for a file that is missing
    or unreadable or ends before the first of the times.
    """
    wanted = begin + np.asarray(times, dtype=np.float64)  # (T,) seconds from the file's first frame
    opened = _open(path)
    spans = opened[1]  # (frames, 2) seconds
    end = float(spans[-1, 1])
    if wanted[0] > end + HELD_SECONDS:
        raise VideoError(_too_short(path, end, wanted[0]))
    wanted = wanted[wanted <= end + HELD_SECONDS]  # (T',)
    # Timestamps ascend, so the frame on screen is the last one that has begun.
    chosen = np.searchsorted(spans[:, 0], wanted + TIMESTAMP_ERROR, side="right") - 1
    return _read(path, opened, chosen.tolist(), size)


def native_frames(path: str, first: int, stop: int) -> Iterator[np.ndarray]:
    """Yield the frames first to stop - 1 that a file shows, uint8 (H, W, 3) each. Raises VideoError."""
    reader, _, _ = _open(path)
    return itertools.islice(_decode(path, reader, range(stop)), first, None)


def _read(
    path: str, opened: tuple[decord.VideoReader, np.ndarray, int], chosen: list[int], size: Size | None
) -> np.ndarray:
    """The shown frames with these indices, which ascend, of a file that _open has opened; as read_frames.

    The file is read to its end: only when it holds as many frames as its index lists are they the ones that
    the index means. (A packet need not hold a frame.) What is damaged after the last of the indices is left.
    """
    reader, spans, hidden = opened
    needed = range(len(spans)) if hidden else np.unique([*chosen, len(spans) - 1]).tolist()
    shown, kept = None, 0
    try:
        for index, frame in zip(needed, _decode(path, reader, needed), strict=True):
            while kept < len(chosen) and chosen[kept] == index:
                pixels = frame if size is None else resize(frame[None], size)[0].numpy()
                if shown is None:
                    shown = np.empty((len(chosen), *pixels.shape), dtype=np.uint8)
                shown[kept] = pixels
                kept += 1
    except DamagedError:
        if hidden or kept < len(chosen):
            raise
        return shown
    with contextlib.suppress(*FAILURES):  # the rule: there is no next frame
        reader.next()
        raise VideoError(f"{path}: holds more frames than its index lists; {REENCODE}")
    return shown


def _open(path: str) -> tuple[decord.VideoReader, np.ndarray, int]:
    """A reader; (frames, 2), the seconds when each shown frame begins and ends, counted from the first one;
    and the number of frames hidden before it. Raises VideoError.

    Hidden frames come from "ffmpeg -ss X -c copy": such a file is stored from the key frame before X on, and
    says that the frames before X are not to be shown. decord lists them with times below zero.
    """
    if not os.path.isfile(path):
        raise VideoError(f"{path}: no such video file; check the folder given as `videos`")
    try:
        reader = _reader(path)
        spans = reader.get_frame_timestamp(range(len(reader))).astype(np.float64)  # (stored frames, 2)
        keys, (end, _) = reader.get_key_indices(), mp4.end_and_aspect(path)
    except FAILURES as error:
        raise VideoError(  # without decord's message, which can quote the file
            f"{path}: {os.path.getsize(path)} bytes that cannot be opened as a video (incomplete, or of an"
            " unknown codec); fetch or re-encode the file, or leave it out"
        ) from error
    with open(path, "rb") as file:
        head = file.read(1 << 16).partition(b"\x1f\x43\xb6\x75")[0]  # of an mkv, up to its first frames
    if not INDEXED.match(head):
        # libav searches them for the time of the first frame, and decord may read on from a later one.
        raise VideoError(
            f"{path}: is not mp4, mov, mkv, webm, avi, flv or y4m, and decord finds the beginning of no other"
            " safely; pack it without loss: ffmpeg -i OLD -c copy NEW.mkv"
        )
    if head.startswith(b"\x1aE\xdf\xa3") and TURNED.search(head):
        raise VideoError(f"{path}: is to be shown turned, and decord turns only mp4 and mov; {REENCODE}")
    if not keys or keys[0] > 0:  # decord would take every later frame for one that is keys[0] frames earlier
        raise VideoError(f"{path}: does not begin with a key frame; fetch the whole file, or {REENCODE}")
    hidden, stop = int((spans[:, 0] < -1e-3).sum()), int((spans[:, 0] < end - TIMESTAMP_ERROR).sum())
    if hidden >= stop or np.abs(spans).max() > 1e9:  # decord's number for "no timestamp" is 9e15
        raise VideoError(f"{path}: its frames have no usable timestamps; {REENCODE}")
    return reader, spans[hidden:stop] - spans[hidden, 0], hidden


def _reader(path: str) -> decord.VideoReader:
    """At a file's first frame. More threads do not help: the frames are small. Without fault_tol decord
    silently replaces a frame that it cannot decode by a copy of another one."""
    return decord.VideoReader(str(path), num_threads=1, fault_tol=NO_SUBSTITUTES)


def _decode(path: str, reader: decord.VideoReader, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """The shown frames of a fresh reader with these indices, which ascend; uint8 (H, W, 3) each.

    Never by decord's seeking (get_batch, seek_accurate, reader[i]): it is wrong by 1 to 4 frames in files
    with open groups of pictures (those of x265 and, with B-frames, of MPEG-4), and on files with hidden
    frames it gives wrong ones or spins for ever (dmlc/decord issues 269, 373, 375). skip_frames decodes too,
    and only leaves out the conversion to RGB. But it seeks if a key frame is among the skipped ones or right
    after them, so the frame before a key frame is never skipped. With hidden frames it miscounts; there
    read_frames asks for all frames.

    A reader decodes ahead in a thread of its own, and one time in a hundred reports a damaged frame before it
    has handed out the good ones in front of it. So a reader that fails is replaced by a fresh one, three
    times at most.
    """
    before_keys = [key - 1 for key in reader.get_key_indices() if 0 < key <= wanted[-1]]
    given = 0  # frames before this one have been yielded
    for readers_left in (3, 2, 1, 0):
        done = 0
        try:
            for index in sorted({*wanted, *before_keys}):
                if index > done:
                    reader.skip_frames(index - done)
                frame, done = reader.next(), index + 1
                if index in wanted and index >= given:
                    given = done
                    yield _pixels(frame)
            return
        except (decord.DECORDLimitReachedError, StopIteration) as error:
            raise VideoError(f"{path}: holds fewer frames than its index lists; {REENCODE}") from error
        except FAILURES as error:
            if not readers_left:
                message = f"{path}: a frame cannot be decoded; fetch or re-encode the file"
                raise DamagedError(message) from error
            reader = _reader(path)


def _pixels(frame: decord.nd.NDArray) -> np.ndarray:
    """uint8 (H, W, 3). decord calls it (H, W, C) with C > 3 where libav has padded the rows of a narrow film,
    such as one of 48 pixels, to C * W numbers."""
    pixels = frame.asnumpy()
    return pixels.reshape(len(pixels), -1, 3)[:, : pixels.shape[1]]


def frame_size(width: int, height: int, max_side: int, factor: int) -> Size:
    """(width, height) of the frames shown to the model, both multiples of `factor` = patch size x merge size.

    The longer side shrinks to max_side, aspect kept (STVG-o1, section 4); smaller frames are not enlarged.
    Then each side goes to the nearest multiple of factor as in HF's smart_resize (Python's round: halves to
    even), but to at least one factor and at most max_side. Raises VideoError for a max_side below a factor.
    """
    if max_side < factor:
        raise VideoError(f"max_side: {max_side} is less than one visual token; write {factor} or more")
    longest = max(width, height, max_side)  # not below max_side: never enlarged
    most = max_side // factor
    columns, rows = (min(max(1, round(side * max_side / longest / factor)), most) for side in (width, height))
    return columns * factor, rows * factor


def resize(frames: np.ndarray | torch.Tensor, size: Size) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> uint8 (T, h, w, 3) with size = (w, h), by HF's kernel: bicubic, antialiased.

    On uint8: the float kernel, rounded, gives another value in 14-18 % of the pixels and takes ten times as
    long.
    """
    width, height = size
    frames = torch.as_tensor(frames).permute(0, 3, 1, 2)  # (T, 3, H, W)
    frames = F.interpolate(frames, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return frames.permute(0, 2, 3, 1).contiguous()  # (T, h, w, 3)


def patchify(
    frames: np.ndarray | torch.Tensor,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: list[float],
    std: list[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 frames (T, h, w, 3) -> what HF calls pixel_values_videos, and its row of video_grid_thw.

    patch_size p: pixels a side. merge_size m: patches a side that the model merges into one token.
    temporal_patch_size t: frames in a patch; where T is no multiple of it the last frame is repeated. mean,
    std: of the 3 colours, in [0, 1].

    Returns float32 (gt * gh * gw, 3 * t * p * p), the patches of one token adjacent, and long (3,) = (gt,
    gh, gw) with gt = ceil(T / t), gh = h / p, gw = w / p.
    """
    frames = torch.as_tensor(frames)
    count, height, width, channels = frames.shape
    p, m, t = patch_size, merge_size, temporal_patch_size
    frames = torch.cat([frames, frames[-1:].expand(-count % t, -1, -1, -1)])  # (gt * t, h, w, 3)
    grid = gt, gh, gw = len(frames) // t, height // p, width // p
    pixels = frames.reshape(gt, t, gh // m, m, p, gw // m, m, p, channels)
    pixels = pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (gt, gh/m, gw/m, m, m, 3, t, p, p)
    pixels = pixels.reshape(gt * gh * gw, channels, t * p * p).float()  # moved as bytes
    # (x / 255 - mean) / std, fused as HF fuses it, in float32.
    mean, std = (torch.tensor(values)[:, None] * 255.0 for values in (mean, std))  # (3, 1)
    return pixels.sub_(mean).div_(std).flatten(1), torch.tensor(grid)
