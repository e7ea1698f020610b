# ruff: noqa: E402 (the project is no package: its folder must be on the path first)
"""What it costs to decode a clip and prepare it for the model, and whether training waits for it.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/decode.py [--video FILE] [--rounds N]

transformers' figures need torchvision, which the project does not: `pip install torchvision==0.28.0`, in an
environment of its own, since beside a torch for the CPU PyPI's torchvision makes transformers unusable
everywhere but here (complete_torchvision). Without it only ours are printed.

1. From a file to pixel values: 20 s of 640 x 360, 2 frames a second, longer side 336. One JSON line for each
   way, in CPU seconds of this process (`wall`: on the clock), of the round with the smallest total. The ways
   take turns, all on one core. The last line has the ratios of the totals, ours / theirs.
   "ours": clip_frames, which checks the file, decodes and resizes (all of it is `decode`); patchify.
   "transformers, X": what Qwen2VLVideoProcessor does with a path: transformers' load_video at the file's
   size, by decoder X, with the frames that its sample_frames names; then the processor on these frames, made
   to resize to the same size. For a path it takes torchcodec, or fails where there is none (older torchvision
   did without); every decoder of load_video that is installed is measured, decord first, which is ours, too.
   `difference`: the largest between its pixel values and ours, null where it took other frames.
2. Training: `train.py` with the checkpoint of the toy on copies of the clip's file, 2 new ones a step, 8
   answers each, no cache, on all cores. One JSON line for each number of video_workers: the seconds (on the
   clock) of every step but the first, in which the worker starts, and how many of them it waited for frames.
   Without a worker frames are decoded when they are asked for: that line shows what a worker hides.

A file is read in order from its start, never by seeking (docs/data.md). So a clip far into a long file
costs the decoding of what lies before it, which a reader that seeks is spared: the clip "last".

The film is made by PyAV: a texture that moves, with noise, as H.264. All takes 80 s, and 70 MB of disk
meanwhile.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import av
import numpy as np
import torch


def complete_torchvision() -> str:
    """Why torchvision cannot be used; empty if it can. To be called before transformers is imported.

    PyPI's wheels for Linux are built for CUDA. Beside a torch for the CPU their compiled operators cannot be
    loaded, and `import torchvision`, which describes two of them, fails. None is used here: it is enough to
    declare these two.
    """
    if importlib.util.find_spec("torchvision") is None:
        return "no torchvision: only our figures (pip install torchvision==0.28.0 for those of transformers)"
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)  # its operators vanish with it
        import torchvision  # noqa: F401
    return ""


_kept: list[torch.library.Library] = []
MISSING = complete_torchvision()

import transformers
from transformers.image_utils import SizeDict
from transformers.utils import is_av_available, is_cv2_available, is_decord_available
from transformers.utils.import_utils import is_torchcodec_usable
from transformers.video_utils import VideoMetadata, load_video

import train
from qwen.checkpoint import FAMILIES
from runtime.files import read_jsonl
from samples import Sample
from video.frames import clip_frames, frame_size, patchify, probe

SECONDS, FPS, MAX_SIDE = 20, 2.0, 336  # of a clip; of the frames shown, frames a second and pixels
WIDTH, HEIGHT, RATE = 640, 360, 25  # of the film: pixels, frames a second
PATCH, MERGE, TEMPORAL = 14, 2, 2  # of Qwen2.5-VL
FAMILY = FAMILIES["qwen2_5_vl"]
# A way from a file to pixel values: () -> frames; frames -> (pixel values (N, D), grid (3,)).
Way = tuple[Callable[[], np.ndarray], Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]]


# ----------------------------------------------------------------------------------------------------------
# Films


def write_film(path: Path, seconds: float = SECONDS, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    """A texture that moves by 2 and 1 pixels a frame, its colours apart, with fresh noise in every frame."""
    width, height = size
    count = round(seconds * RATE)
    rng = np.random.default_rng(0)
    coarse = rng.random(((height + count) // 8 + 1, (width + 2 * count) // 8 + 1))
    field = torch.nn.functional.interpolate(
        torch.from_numpy(coarse)[None, None], scale_factor=8, mode="bilinear"
    )[0, 0].numpy()  # (at least height + count, width + 2 * count), in [0, 1]
    options = {"preset": "veryfast", "crf": "23"}
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(RATE), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for n in range(count):
            grey = field[n : n + height, 2 * n : 2 * n + width]
            colours = np.stack([grey, np.roll(grey, n, axis=1), 1 - grey], axis=-1) * 200
            pixels = (colours + rng.integers(0, 20, (height, width, 1))).astype(np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return path


def repeat(film: Path, path: Path, times: int) -> Path:
    """The film so many times in one file, its packets as they are."""
    with av.open(str(path), "w") as new:
        copy = None
        for n in range(times):
            with av.open(str(film)) as old:
                stream = old.streams.video[0]
                copy = copy or new.add_stream_from_template(stream)
                for packet in [packet for packet in old.demux(stream) if packet.dts is not None]:
                    packet.pts, packet.dts = (t + n * stream.duration for t in (packet.pts, packet.dts))
                    packet.stream = copy
                    new.mux(packet)
    return path


def clips_of(first: Path, last: Path, seconds: float = SECONDS) -> dict[str, Sample]:
    """The clips that are measured, by name: "first", where the one file begins, and "last", where the other
    one ends, if that is longer than a clip."""
    clips = {}
    for name, path in (("first", first), ("last", last)):
        header = probe(str(path))
        rate = header.frames / header.seconds
        count = min(header.frames, round(seconds * rate))
        begin = header.frames - count if name == "last" else 0
        if name == "last" and begin == 0:
            continue
        size = (header.width, header.height)
        clips[name] = Sample(
            name,
            str(path),
            "",
            *size,
            count,
            rate,
            begin,
            header.frames,
            first_frame=0,
            stop_frame=1,
            boxes={},
        )
    return clips


# ----------------------------------------------------------------------------------------------------------
# From a file to pixel values


def decoders() -> list[str]:
    """The decoders of load_video that can be used."""
    usable = {
        "decord": is_decord_available(),
        "pyav": is_av_available(),
        "torchcodec": is_torchcodec_usable(decode="video"),
        "opencv": is_cv2_available(),
    }
    return [name for name, there in usable.items() if there]


def our_way(sample: Sample) -> Way:
    """As video/loader.py and qwen/checkpoint.py do it."""

    def preprocess(frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return patchify(frames, PATCH, MERGE, TEMPORAL, FAMILY.image_mean, FAMILY.image_std)

    return functools.partial(clip_frames, sample, FPS, MAX_SIDE, PATCH * MERGE), preprocess


def their_way(sample: Sample, decoder: str) -> tuple[Way, list[int]]:
    """As Qwen2VLVideoProcessor does it, and the frames of the file that it takes. Needs torchvision."""
    from transformers import Qwen2VLVideoProcessor
    from transformers.video_processing_utils import BaseVideoProcessor

    processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)
    width, height = frame_size(sample.width, sample.height, MAX_SIDE, PATCH * MERGE)
    # Its own resize chooses the size by a number of pixels, and calls this one.
    processor.resize = lambda videos, resample, **_: BaseVideoProcessor.resize(
        processor, image=videos, size=SizeDict(height=height, width=width), resample=resample
    )
    metadata = VideoMetadata(total_num_frames=sample.num_frames, fps=sample.fps)
    indices = processor.sample_frames(metadata, fps=FPS) + sample.begin_frame

    def decode() -> np.ndarray:
        return load_video(sample.video, backend=decoder, sample_indices_fn=lambda **_: indices)[0]

    def preprocess(frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        features = processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
        return features["pixel_values_videos"], features["video_grid_thw"][0]

    return (decode, preprocess), indices.tolist()


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this thread, and those that it starts, on one core (Linux only): load_video lets a decoder start
    as many threads as there are cores, which costs CPU seconds."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(ways: dict[str, Way], rounds: int) -> dict[str, tuple[dict, torch.Tensor]]:
    """Each way's CPU seconds in its best round, and its pixel values. The ways take turns, every second round
    in reverse."""
    best: dict[str, dict] = {}
    pixels = {}
    for n in range(rounds):
        for name in list(ways)[:: -1 if n % 2 else 1]:
            decode, preprocess = ways[name]
            wall, begin = time.perf_counter(), time.process_time()
            frames = decode()
            between = time.process_time()
            pixels[name], grid = preprocess(frames)
            end = time.process_time()
            figures = {"decode": between - begin, "preprocess": end - between, "total": end - begin}
            figures = {key: round(value, 4) for key, value in figures.items()}
            figures |= {"wall": round(time.perf_counter() - wall, 4), "frames": len(frames)}
            figures |= {"grid": grid.tolist(), "pixel_values": list(pixels[name].shape)}
            if name not in best or figures["total"] < best[name]["total"]:
                best[name] = figures
    return {name: (best[name], pixels[name]) for name in ways}


def compare(sample: Sample, rounds: int, backends: list[str]) -> list[dict]:
    """The lines of a clip: ours first, then those of transformers with each decoder. Raises ValueError where
    pixel values of another shape than ours come out."""
    theirs = {f"transformers, {decoder}": their_way(sample, decoder) for decoder in backends}
    ways = {"ours": our_way(sample), **{name: way for name, (way, _) in theirs.items()}}
    with one_core():
        measured = measure(ways, rounds)
    # In a film of constant rate; 1e-6 for times at which a frame begins.
    steps = range(sample.grid(1 / FPS).num_steps)
    ours = [sample.begin_frame + math.floor(step / FPS * sample.fps + 1e-6) for step in steps]
    lines = []
    for name, (figures, pixels) in measured.items():
        line = {"clip": sample.id, "way": name, **figures}
        if name in theirs:
            same = theirs[name][1] == ours
            reference = measured["ours"][1]
            if same and pixels.shape != reference.shape:
                raise ValueError(f"{name}: {tuple(pixels.shape)}, ours: {tuple(reference.shape)}")
            line["difference"] = float((pixels - reference).abs().max()) if same else None
        lines.append(line)
    return lines


def ratios(lines: list[dict]) -> dict[str, float]:
    """Our total CPU seconds / those of each other way, by "clip: way"."""
    ours = {line["clip"]: line["total"] for line in lines if line["way"] == "ours"}
    others = [line for line in lines if line["way"] != "ours"]
    return {f"{x['clip']}: {x['way']}": round(ours[x["clip"]] / x["total"], 3) for x in others}


# ----------------------------------------------------------------------------------------------------------
# In training


def write_split(folder: Path, sample: Sample, copies: int) -> Path:
    """An annotation file in HC-STVG's v1 dialect of so many copies of a sample's file beside it: a box that
    moves to the right, from a quarter of the film to three quarters. Returns its path."""
    first, count = sample.file_frames // 4, sample.file_frames // 2
    width, height = sample.width / 4, sample.height / 2
    record = {
        "bbox": [
            [round(k / count * (sample.width - width), 2), height / 2, width, height] for k in range(count)
        ],
        "st_frame": first + 1,  # from 1
        "img_num": sample.file_frames,
        "fps": sample.fps,
        "caption": "the red circle moves right",
        "width": sample.width,
        "height": sample.height,
    }
    names = [f"{k}{Path(sample.video).suffix}" for k in range(copies)]
    for name in names:
        shutil.copyfile(sample.video, folder / name)
    path = folder / "train.json"
    path.write_text(json.dumps(dict.fromkeys(names, record)), encoding="utf-8")
    return path


def waited(annotations: Path, workers: int, steps: int, *settings: str) -> dict:
    """Train on a split and return its line: the seconds of each step after the first. settings: more of them,
    key=value. What train.py prints goes to stderr."""
    run = annotations.parent / f"run_{workers}"
    arguments = [
        str(ROOT / "configs/toy.yaml"),
        f"model={ROOT / 'checkpoints/toy'}",
        "toy=false",
        f"train_annotations={annotations}",
        f"eval_annotations={annotations}",
        "eval_limit=1",
        f"videos={annotations.parent}",
        f"output_dir={run}",
        f"max_side={MAX_SIDE}",
        f"fps={FPS}",
        f"steps={steps}",
        "batch_size=2",  # in main() no clip comes twice
        "rollout_batch=1",
        "num_generations=8",
        "max_new_tokens=128",
        f"video_workers={workers}",
        "frame_cache=",
        "threads=1",
        *settings,
    ]
    with contextlib.redirect_stdout(sys.stderr):
        train.main(arguments)
    seconds = [m["seconds"] for m in read_jsonl(run / "metrics.jsonl") if m["phase"] == "grpo"][1:]
    line = {"video_workers": workers}
    line |= {key: [round(part[key], 4) for part in seconds] for key in ("decode", "step")}
    line["decode / step"] = round(sum(line["decode"]) / sum(line["step"]), 4)
    return line


# ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--video", type=Path, help="a video file in place of the film that is made here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of training; 0: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        film = options.video or write_film(folder / "film.mp4")
        clips = clips_of(film, options.video or repeat(film, folder / "long.mp4", 3))
        print(MISSING or f"for a path transformers takes torchcodec; here there are: {', '.join(decoders())}")
        lines = []
        for sample in clips.values():
            for line in compare(sample, options.rounds, [] if MISSING else decoders()):
                print(json.dumps(line), flush=True)
                lines.append(line)
        if options.steps:
            split = write_split(folder, clips["first"], copies=2 * (options.steps + 1))
            for workers in (1, 0):
                print(json.dumps(waited(split, workers, options.steps)), flush=True)
        print(json.dumps({"ours / theirs": ratios(lines)}))


if __name__ == "__main__":
    main()
