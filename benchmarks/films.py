"""Is every film read right, or refused? Numbered films, read by the program and by PyAV, frame by frame.

    python benchmarks/films.py --count 200

Each container holds each kind of film that fits into it (KINDS); more films are of other sizes and lengths.
Each is read by number (annotated with as many frames as it has) and by time (with more), every frame of it:
    equal        each picture is the one that PyAV decodes there, and none is missing;
    refused      VideoError, in one line;
    different    anything else: there must be none.
Then lab.check_data, with and without --decode, and training (train.make_prompts) must say the same of it.
"""

import argparse
import contextlib
import random
import re
import sys
import tempfile
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "video"))
from films import cut, cut_off, empty_packet, end_early, write_film

CONTAINERS = ("ts", "m2ts", "wmv", "mp4", "mkv", "webm", "mov", "avi", "flv")
CODECS = {"avi": "mpeg4", "webm": "libvpx-vp9", "wmv": "wmv2"}  # where a kind names none; elsewhere x264
LENGTH, RATE, SIZE = 90, 25, (64, 48)  # frames, frames a second, pixels
X264 = {"codec": "libx264", "g": 12, "preset": "veryfast", "x264_params": "scenecut=0"}
X265 = {"codec": "libx265", "x265_params": "keyint=20:scenecut=0:bframes=4:open-gop=1:log-level=none"}
OPEN = {**X264, "bf": 3, "x264_params": "scenecut=0:keyint=20:open-gop=1"}
TWO_RATES = [*range(0, 1200, 40), *range(1200, 6000, 80)]  # milliseconds
JUMPY = np.random.default_rng(0).integers(2, 120, LENGTH).cumsum().tolist()
SIZES = [(2, 2), (8, 6), (16, 12), (24, 18), (48, 36), (72, 54), (1, 9), (17, 11), (33, 47), (97, 61)]
KINDS = {
    **{f"x264, {bf} B-frames": {**X264, "bf": bf} for bf in (0, 2)},
    **{f"{codec}, B-frames": {"codec": codec, "bf": 2} for codec in ("mpeg4", "mpeg2video")},
    **{codec: {"codec": codec, "g": 30, "b": "400k"} for codec in ("mpeg4", "libvpx", "libvpx-vp9")},
    "x264, one key frame": {**X264, "bf": 3, "g": 250},
    "x264, open GOP": OPEN,
    "x265, open GOP": X265,
    "24000/1001": {"fps": "24000/1001", "bf": 2},
    "30000/1001": {"fps": "30000/1001", "bf": 0},
    "two rates": {"milliseconds": TWO_RATES, "bf": 2},
    "any gaps": {"milliseconds": JUMPY, "bf": 0},
    "begins late": {"milliseconds": range(5000, 9000, 40), "bf": 2},
    "fragments": {**X264, "bf": 2, "movflags": "frag_keyframe+empty_moov"},
    **{f"of {count}": {"count": count, "bf": 0} for count in (1, 2)},
    **{f"turned by {angle}": {"rotation": angle, "size": (48, 48)} for angle in (90, 180)},
    "pixels 2:1": {"size": (40, 48), "aspect": "2:1"},
    "pixels 16:15": {"size": (96, 60), "aspect": "16:15"},
    **{f"{width} x {height}": {"size": (width, height)} for width, height in SIZES},
    "cut": {**X264, "bf": 3, "g": 40, "change": partial(cut, seconds=2.5)},
    "cut, open GOP": {**OPEN, "change": partial(cut, seconds=2.5)},
    "cut, no key frame": {"g": 30, "bf": 2, "change": partial(cut, packets=7)},
    "ends early": {**X264, "bf": 2, "change": partial(end_early, seconds=(LENGTH - 1) / RATE)},
    "ends earlier": {**X264, "bf": 2, "change": partial(end_early, seconds=(LENGTH - 10) / RATE)},
    "empty packet": {"codec": "mpeg4", "g": 30, "change": partial(empty_packet, number=20)},
    "cut off": {"g": 12, "change": partial(cut_off, share=0.9)},
}


def make_films(folder: Path, count: int) -> list[tuple[str, float]]:
    """(path, pixel aspect) of so many films; what a container cannot hold is left out."""
    made, rng, again = [], random.Random(0), False
    while len(made) < count:
        for kind, container in [(kind, container) for kind in KINDS for container in CONTAINERS]:
            settings = {"count": LENGTH, "fps": RATE, "size": SIZE}
            settings |= {"codec": CODECS.get(container, "libx264"), **KINDS[kind]}
            if again:
                settings["count"] = max(1, settings["count"] - rng.randrange(30))
                settings["size"] = tuple(side + 2 * rng.randrange(20) for side in settings["size"])
            change = settings.pop("change", None)
            path = folder / f"{len(made)} {kind.replace('/', ' by ')}.{container}"
            with contextlib.suppress(av.FFmpegError, AssertionError, IndexError, TypeError, ValueError):
                whole = write_film(path.with_name(f"whole.{container}") if change else path, **settings)
                if change:
                    change(whole, path)
                wide, high = map(int, settings.get("aspect", "1:1").split(":"))
                if decode(str(path))[0]:
                    made.append((str(path), wide / high))
        again = True
    return [made[k * len(made) // count] for k in range(count)]


def decode(path: str) -> tuple[list[np.ndarray], list[float], float]:
    """What PyAV shows: pictures (H, W, 3), turned as the file says; the seconds from the first one to the
    beginning of each; and to the end of the last."""
    with av.open(path) as file:
        frames = list(file.decode(video=0))
    pictures = [np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in frames]
    times = [float(frame.time) - float(frames[0].time) for frame in frames]
    return pictures, times, times[-1] + (float((frames[-1].duration or 0) * frames[-1].time_base) or 1 / RATE)


def same(shown: np.ndarray, wanted: list[np.ndarray]) -> bool:
    """Whether each picture is as near to the wanted one as to any: decoders differ by a few levels."""
    if len(shown) != len(wanted) or shown[0].shape != wanted[0].shape:
        return False
    every = np.stack(wanted).astype(np.int16)
    distances = [np.abs(every - picture).mean((1, 2, 3)) for picture in shown]  # (T,) each
    return all(distance[k] <= min(distance.min() + 1, 20) for k, distance in enumerate(distances))


def check(films: list[tuple[str, float]]) -> None:
    # Not before the films are made: PyAV's encoders of VP8 and VP9 fail beside decord's library of that name.
    import train
    from config import Config
    from lab.check_data import check_videos
    from samples import Sample
    from video.frames import VideoError, read_clip
    from video.loader import FrameLoader

    train.make_prompt = lambda *_: None  # no model is asked
    config = Config(max_side=112)
    loader, samples, found, said = FrameLoader(config, 28), [], defaultdict(list), {}
    for path, aspect in films:
        wanted, times, seconds = decode(path)
        shape = round(wanted[0].shape[1] * aspect), wanted[0].shape[0]
        verdicts = {"equal"}
        for frames in (len(wanted), len(wanted) + 7):
            sample = Sample(
                *(path, path, "it moves", *shape),
                **{"num_frames": frames, "file_frames": frames, "fps": frames / seconds, "begin_frame": 0},
                **{"first_frame": frames // 2, "stop_frame": frames, "boxes": {frames // 2: (0, 0, 1, 1)}},
            )
            samples.append(sample)
            at = times if len(samples) % 2 == 0 else [n / sample.fps for n in range(frames)]
            try:
                shown = loader.workers.submit(path, read_clip, sample, at).result()
                verdicts |= {"equal" if same(shown, wanted) else "different"}
            except VideoError as error:
                words = re.sub(r"\b[0-9]+\b", "N", str(error).removeprefix(f"{path}: ").partition(";")[0])
                verdicts |= {"different" if "\n" in str(error) else f"refused: {words}"}
            try:
                train.make_prompts(None, [(0, sample)], loader, config)
            except VideoError as error:
                said[str(error)] = sample
        found["different" if "different" in verdicts else max(verdicts)].append(path)
    loader.close()
    for verdict, paths in sorted(found.items(), key=lambda item: -len(item[1])):
        each = Counter(path.rpartition(".")[2] for path in paths).items()
        print(f"{len(paths):>5}  {verdict}\n       {', '.join(f'{n} {name}' for name, n in each)}")
        print("".join(f"         {Path(path).name}\n" for path in paths if verdict == "different"), end="")
    for decoded in (False, True):
        bad = check_videos(config, samples, 28, decoded)
        print(f"check_data{' --decode' * decoded}: {len(bad.keys() & said)} refusals as in training,", end="")
        print(f" {len(bad.keys() - said)} more, {len(said.keys() - bad)} less")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="films to make")
    with tempfile.TemporaryDirectory() as folder:
        check(make_films(Path(folder), parser.parse_args().count))
