"""From a video file to the patches that Qwen-VL reads: choose the frames, resize them, cut them up.

The steps are those of HF's Qwen2VLVideoProcessor and Qwen3VLVideoProcessor, which need torchvision; this
file does not, and its numbers are the same to the last bit (tests/golden). A video is uint8 (T, H, W, 3)
until the last step.
"""

import os

import decord
import numpy as np
import torch
import torch.nn.functional as F

from data import Sample

TIMESTAMP_ERROR = 1e-4  # s; decord's timestamps are float32, so off by up to 1e-5 s in a three-minute video
HELD_SECONDS = 0.5  # how long the last frame stands in where a file ends before its annotation says


class VideoError(ValueError):
    """A video that cannot be shown as asked; the message says which or how, what is wrong, and what to do."""


# ----------------------------------------------------------------------------------------------------------
# Frames out of a file


def read_clip(sample: Sample, times: list[float]) -> np.ndarray:
    """The frames of a sample's clip at certain times, from a file that must be what the annotation says.

    times: seconds from the beginning of the clip. Returns uint8 (T, H, W, 3). Raises
    VideoError as read_frames does, and for a file of another shape or duration than annotated: boxes would
    be scaled by a wrong size, steps counted at a wrong rate. (A smaller copy of the video is fine.) The
    duration is known where the clip begins with the file, and is that of the file.
    """
    begin, seconds = sample.begin_frame / sample.fps, sample.num_frames / sample.fps
    frames = read_frames(sample.video, times, begin, duration=None if begin else seconds)
    height, width = frames.shape[1:3]
    if abs(width * sample.height / (height * sample.width) - 1) > 0.02:
        raise VideoError(
            f"{sample.video}: its frames are {width} x {height}, but its annotation says {sample.width} x"
            f" {sample.height}; correct width and height (or img_size) in the record, or fetch the right file"
        )
    return frames


def read_frames(
    path: str, times: list[float], begin: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """The frames on screen at certain times of a clip.

    path: the file. times: seconds from the beginning of the clip, in any order. begin: where the clip
    begins, in seconds from the first frame of the file. duration: of the file in seconds, where it is known;
    another one, by more than 1 s and 5 %, is an error. A frame is on screen from its own timestamp to that
    of the next, so videos of variable frame rate are read right; a time at most half a second after the
    file's end gets the last frame.

    Returns uint8 (T, H, W, 3), RGB, in the order of times. Raises VideoError for a missing, unreadable or
    too short file, for one of another duration, and for one whose first frames are hidden; ValueError for no
    times at all or one before the file's first frame.
    """
    reader = _open(path)
    spans = reader.get_frame_timestamp(range(len(reader))).astype(np.float64)  # (frames, 2): start, end
    hidden = int((spans[:, 0] < -1e-3).sum())
    if hidden:
        # The trace of "ffmpeg -ss X -c copy": decord answers such files with wrong frames, or hangs for ever
        # (dmlc/decord issues 269, 373, 375), so they are refused before the first frame is asked for.
        raise VideoError(
            f"{path}: {hidden} frames are hidden before its beginning (cut without re-encoding?), which makes"
            " decoding unreliable; re-encode it: ffmpeg -i OLD -c:v libx264 -crf 18 NEW"
        )
    spans = spans - spans[0, 0]
    if duration is not None and abs(spans[-1, 1] - duration) > max(1.0, 0.05 * duration):
        raise VideoError(
            f"{path}: lasts {spans[-1, 1]:.2f} s, but its annotation says {duration:.2f} s (img_num / fps);"
            " correct img_num and fps in the record (without fps 20 s are meant), or fetch the whole video"
        )
    wanted = begin + np.asarray(times, dtype=np.float64)  # (T,) seconds from the file's first frame
    if len(wanted) == 0 or wanted.min() < 0:
        raise ValueError(f"times {times!r} from {begin!r} s: at least one, and none before 0, is needed")
    if wanted.max() > spans[-1, 1] + HELD_SECONDS:
        raise VideoError(
            f"{path}: ends at {spans[-1, 1]:.2f} s, but the frame at {wanted.max():.2f} s is needed; fetch"
            " the whole video, or correct or remove its annotation"
        )
    # Timestamps ascend, so the frame on screen is the last one that has begun.
    chosen = np.searchsorted(spans[:, 0], wanted + TIMESTAMP_ERROR, side="right") - 1
    try:
        return reader.get_batch(chosen.tolist()).asnumpy()  # (T, H, W, 3)
    except (RuntimeError, IndexError, decord.DECORDError) as error:
        raise VideoError(f"{path}: a frame cannot be decoded; fetch or re-encode the file") from error


def _open(path: str) -> decord.VideoReader:
    """A reader of a file with at least one frame. decord's messages are not shown: they can quote it."""
    if not os.path.isfile(path):
        raise VideoError(f"{path}: no such video file; check the folder given as `videos`")
    try:
        reader = decord.VideoReader(str(path), num_threads=1)  # more threads do not help sparse reading
    except (RuntimeError, decord.DECORDError) as error:
        raise VideoError(
            f"{path}: {os.path.getsize(path)} bytes that cannot be opened as a video (incomplete, or of an"
            " unknown codec); fetch or re-encode the file, or remove its annotation"
        ) from error
    if len(reader) == 0:
        raise VideoError(f"{path}: holds no frame; fetch the file again, or remove its annotation")
    return reader


# ----------------------------------------------------------------------------------------------------------
# The size that the model sees


def frame_size(width: int, height: int, max_side: int, factor: int) -> tuple[int, int]:
    """(width, height) of the frames shown to the model, both multiples of `factor` = patch size x merge size.

    The longer side is brought down to max_side, aspect kept (STVG-o1, section 4); smaller frames are not
    enlarged. Then each side goes to the nearest multiple of factor as in HF's smart_resize (Python's round:
    halves to even), but to at least one factor, and to no more than max_side. Raises VideoError for a
    max_side below one factor.
    """
    if max_side < factor:
        raise VideoError(
            f"max_side: {max_side} is less than the {factor} pixels of one visual token of this model; write"
            f" max_side: {factor} or more"
        )
    longest = max(width, height, max_side)  # not below max_side: never enlarged
    most = max_side // factor
    columns, rows = (min(max(1, round(side * max_side / longest / factor)), most) for side in (width, height))
    return columns * factor, rows * factor


def resize(frames: np.ndarray | torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> uint8 (T, h, w, 3) with size = (w, h), by HF's kernel: bicubic, antialiased.

    It must run on uint8: the float kernel, rounded, gives another value in 14-18 % of the pixels and takes
    ten times as long.
    """
    width, height = size
    frames = torch.as_tensor(frames).permute(0, 3, 1, 2)  # (T, 3, H, W)
    frames = F.interpolate(frames, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return frames.permute(0, 2, 3, 1).contiguous()  # (T, h, w, 3)


# ----------------------------------------------------------------------------------------------------------
# Patches


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
    gh, gw) with gt = ceil(T / t), gh = h / p, gw = w / p. Raises ValueError if there is no frame or a side
    is no multiple of p * m.
    """
    frames = torch.as_tensor(frames)
    count, height, width, channels = frames.shape
    p, m, t = patch_size, merge_size, temporal_patch_size
    if count == 0 or height % (p * m) or width % (p * m):
        raise ValueError(f"frames {tuple(frames.shape)}: need at least one, sides in multiples of {p * m}")
    frames = torch.cat([frames, frames[-1:].expand(-count % t, -1, -1, -1)])  # (gt * t, h, w, 3)
    # (x / 255 - mean) / std, fused as HF fuses it, in float32.
    pixels = (frames.float() - torch.tensor(mean) * 255.0) / (torch.tensor(std) * 255.0)
    grid = gt, gh, gw = len(frames) // t, height // p, width // p
    pixels = pixels.reshape(gt, t, gh // m, m, p, gw // m, m, p, channels)
    pixels = pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (gt, gh/m, gw/m, m, m, 3, t, p, p)
    return pixels.reshape(gt * gh * gw, channels * t * p * p), torch.tensor(grid)
