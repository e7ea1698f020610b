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

TIMESTAMP_ERROR = 1e-4  # s; decord's timestamps are float32, so off by up to 1e-5 s in a three-minute video
HELD_SECONDS = 0.5  # how long the last frame stands in where a file ends before its annotation says


class VideoError(ValueError):
    """A video file that cannot be used; the message names the file, what is wrong with it and what to do."""


# ----------------------------------------------------------------------------------------------------------
# Frames out of a file


def read_frames(path: str, times: list[float], begin: float = 0.0) -> np.ndarray:
    """The frames on screen at certain times of a clip.

    path: the file. times: seconds from the beginning of the clip, in any order. begin: where the clip
    begins, in seconds from the first frame of the file. A frame is on screen from its own timestamp to that
    of the next, so videos of variable frame rate are read right; a time at most half a second after the
    file's end gets the last frame.

    Returns uint8 (T, H, W, 3), RGB, in the order of times. Raises VideoError for a missing, unreadable or
    too short file, and for one whose first frames are hidden; ValueError for no times at all or one before
    the file's first frame.
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
    halves to even), but to at least one factor, and to no more than max_side unless that is below one
    factor.
    """
    longest = max(width, height, max_side)  # not below max_side: never enlarged
    most = max(1, max_side // factor)
    columns, rows = (min(max(1, round(side * max_side / longest / factor)), most) for side in (width, height))
    return columns * factor, rows * factor


def resize(frames: np.ndarray | torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> uint8 (T, h, w, 3) with size = (w, h), by the bicubic antialiased kernel that
    HF calls.

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
