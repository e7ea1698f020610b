"""The toy world: clips of 6 s in which coloured shapes appear, move and vanish.

Each sentence singles one of them out. The world is written as HC-STVG annotations and video files (.y4m,
which needs no encoder), and read like any data set.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import trange

from runtime.files import write_whole
from samples import Box

SIDE, SECONDS, NATIVE_FPS = 56, 6, 4  # pixels, length of a clip, frames per second of the files
COLOURS = {"red": (215, 40, 40), "green": (40, 165, 60), "blue": (50, 80, 220), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "triangle")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OBJECTS = 3  # one is asked for, the others distract
SPEED = 0.14  # frame widths per second
SPLITS = {"train": (512, 1), "val": (128, 2), "test": (256, 3)}  # name: (clips, seed); val is for tuning


@dataclass(frozen=True)
class Shape:
    """One object of a clip: visible, and moving, from second `start` to second `stop` (exclusive)."""

    colour: str
    kind: str
    move: str
    size: float  # of the frame
    origin: tuple[float, float]  # centre when it appears, in [0, 1]
    start: int
    stop: int

    @property
    def sentence(self) -> str:
        return f"the {self.colour} {self.kind} moves {self.move}"

    def box(self, seconds: float) -> Box | None:
        """The box in [0, 1] at a time of the clip; None while it is not there."""
        if not self.start <= seconds < self.stop:
            return None
        way = SPEED * (seconds - self.start)
        x, y = (o + d * way for o, d in zip(self.origin, MOVES[self.move], strict=True))
        return x - self.size / 2, y - self.size / 2, x + self.size / 2, y + self.size / 2


def draw_objects(rng: np.random.Generator) -> list[Shape]:
    """The objects of one clip, of different colours; the first is the one that a sentence asks for."""
    objects = []
    for colour in rng.permutation(list(COLOURS))[:OBJECTS]:
        kind, move = rng.choice(SHAPES), rng.choice(list(MOVES))
        size, length = rng.uniform(0.2, 0.36), rng.integers(2, 4)
        start = rng.integers(0, SECONDS - length + 1)
        way = [direction * SPEED * length for direction in MOVES[move]]  # stays inside the frame all the way
        origin = tuple(rng.uniform(size / 2 - min(0, w), 1 - size / 2 - max(0, w)) for w in way)
        names = (str(colour), str(kind), str(move))
        objects.append(Shape(*names, size, origin, int(start), int(start + length)))
    return objects


def render(objects: list[Shape], fps: float) -> np.ndarray:
    """The clip as uint8 frames (T, SIDE, SIDE, 3): flat shapes on plain grey, later objects in front."""
    frames = np.full((int(SECONDS * fps), SIDE, SIDE, 3), 128, np.uint8)
    y, x = (np.mgrid[0:SIDE, 0:SIDE] + 0.5) / SIDE
    for shape in objects:
        for f, frame in enumerate(frames):
            if (box := shape.box(f / fps)) is None:
                continue
            x1, y1, x2, y2 = box
            inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
            if shape.kind == "circle":
                inside &= (x - (x1 + x2) / 2) ** 2 + (y - (y1 + y2) / 2) ** 2 < (shape.size / 2) ** 2
            elif shape.kind == "triangle":
                inside &= np.abs(x - (x1 + x2) / 2) < (y - y1) / 2
            frame[inside] = COLOURS[shape.colour]
    return frames


def make_world(folder: str | Path) -> None:
    """Write the clips and the HC-STVG annotations of all splits. A split that exists is left alone."""
    folder = Path(folder)
    for split, (count, seed) in SPLITS.items():
        annotations = folder / f"{split}.json"
        if annotations.exists():
            continue
        (folder / split).mkdir(parents=True, exist_ok=True)
        records = {}
        for n in trange(count, desc=f"make {annotations}", unit="clip"):
            objects = draw_objects(np.random.default_rng((seed, n)))
            key = f"{split}/{n:04d}.y4m"
            write_y4m(folder / key, render(objects, NATIVE_FPS), NATIVE_FPS)
            records[key] = hcstvg_record(objects[0])
        write_whole(annotations, json.dumps(records).encode())  # last: they vouch for the clips


def hcstvg_record(shape: Shape) -> dict:
    """The annotation of a clip in HC-STVG's v1 dialect, with `fps` since it does not last 20 s."""
    boxes = [shape.box(f / NATIVE_FPS) for f in range(SECONDS * NATIVE_FPS)]
    track = [[v * SIDE for v in (x1, y1, x2 - x1, y2 - y1)] for x1, y1, x2, y2 in filter(None, boxes)]
    return {
        "bbox": [[round(v, 2) for v in box] for box in track],
        "st_frame": shape.start * NATIVE_FPS + 1,
        "st_time": shape.start,
        "ed_time": shape.stop,
        "img_num": SECONDS * NATIVE_FPS,
        "fps": NATIVE_FPS,
        "caption": shape.sentence,
        "width": SIDE,
        "height": SIDE,
    }


def write_y4m(path: Path, frames: np.ndarray, fps: int) -> None:
    """An uncompressed video that needs no encoder: YUV4MPEG2, one full-size plane each for Y, Cb and Cr."""
    _, height, width, _ = frames.shape
    planes = to_ycbcr(frames)
    content = f"YUV4MPEG2 W{width} H{height} F{fps}:1 Ip A1:1 C444\n".encode()
    content += b"".join(b"FRAME\n" + frame.transpose(2, 0, 1).tobytes() for frame in planes)
    write_whole(path, content)


# BT.601, the studio range (16-235, 16-240) that players assume
_WEIGHTS = [[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]


def to_ycbcr(frames: np.ndarray) -> np.ndarray:
    """uint8 RGB (..., 3) -> uint8 Y, Cb, Cr (..., 3)."""
    return (frames @ (np.array(_WEIGHTS) / 255).T + (16, 128, 128)).round().clip(0, 255).astype(np.uint8)
