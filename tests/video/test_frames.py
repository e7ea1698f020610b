"""video/frames.py: which frames are read, and what becomes of them, against hand-made files, PyAV and HF."""

import contextlib
from dataclasses import replace
from itertools import product
from pathlib import Path

import av
import decord
import numpy as np
import pytest
import torch
from films import cut, cut_off, decode, empty_packet, end_early, numbers, write_film, write_sound
from hypothesis import given, settings
from hypothesis import strategies as st

from samples import Sample, TimeGrid
from video.frames import (
    DamagedError,
    Header,
    VideoError,
    check_header,
    clip_frames,
    clip_times,
    frame_size,
    native_frames,
    patchify,
    probe,
    read_clip,
    read_frames,
    resize,
)

GOLDEN = Path(__file__).parent.parent / "golden"


def write_y4m(path, count, fps="20:1", step=5, size=(32, 16)):
    """Uniform grey frames; frame i has luma 16 + step * i, as far as luma goes (235)."""
    width, height = size
    chroma = bytes([128]) * (width * height // 2)
    frames = [b"FRAME\n" + bytes([16 + step * i]) * (width * height) + chroma for i in range(count)]
    path.write_bytes(f"YUV4MPEG2 W{width} H{height} F{fps} Ip A1:1 C420jpeg\n".encode() + b"".join(frames))
    return str(path)


def y4m_indices(frames, step=5):
    """Which frames of write_y4m these are: video luma 16..235 is RGB 0..255."""
    assert frames.dtype == np.uint8 and (frames == frames[:, :1, :1, :1]).all()
    return np.rint(frames[:, 0, 0, 0] * (219 / 255) / step).astype(int).tolist()


def test_frames_at_certain_times(tmp_path):
    path = write_y4m(tmp_path / "a.y4m", count=40)  # 2 s at 20 fps
    assert probe(path) == Header(40, 2.0, 32, 16)
    frames = read_frames(path, [0.0, 0.5, 1.0, 1.5])
    assert frames.shape == (4, 16, 32, 3) and y4m_indices(frames) == [0, 10, 20, 30]
    assert y4m_indices(read_frames(path, [0.0, 0.01, 0.31, 0.31, 1.0])) == [0, 0, 6, 6, 20]
    assert y4m_indices(read_frames(path, [0.0, 0.5, 1.0], begin=0.35)) == [7, 17, 27]


@pytest.mark.parametrize(("frames", "seconds"), [(25, 1), (24000, 1001), (30, 1), (10, 1)])
def test_the_frame_read_is_the_frame_that_the_time_grid_counts(tmp_path, frames, seconds):
    """The box of a step belongs to TimeGrid.sampled_frame(step): the model must be shown that very frame."""
    path = write_y4m(tmp_path / "a.y4m", 70, f"{frames}:{seconds}", step=3)
    grid = TimeGrid(num_frames=70, fps=frames / seconds, step_seconds=0.5)
    shown = read_frames(path, [i * 0.5 for i in range(grid.num_steps)])
    assert y4m_indices(shown, step=3) == [grid.sampled_frame(i) for i in range(grid.num_steps)]


def test_last_frame_is_held_for_half_a_second(tmp_path):
    path = write_y4m(tmp_path / "a.y4m", count=40)  # ends at 2.0 s
    assert y4m_indices(read_frames(path, [1.95, 2.0, 2.5])) == [39, 39, 39]
    assert y4m_indices(read_frames(path, [1.0, 1.95, 2.0, 2.5, 2.6, 7.0])) == [20, 39, 39, 39]
    assert y4m_indices(read_frames(path, [0.0, 0.6], begin=2.0)) == [39]
    with pytest.raises(VideoError, match=r"a\.y4m: ends at 2\.00 s, but the frame at 2\.60 s is needed"):
        read_frames(path, [0.0, 0.6], begin=2.6)


def test_unusable_files_are_named(tmp_path):
    for content in (b"", b"no video", b"YUV4MPEG2 W32 H16 F20:1 Ip C420jpeg\n"):
        (tmp_path / "bad.y4m").write_bytes(content)
        with pytest.raises(VideoError, match=rf"bad\.y4m: {len(content)} bytes that cannot be opened"):
            read_frames(str(tmp_path / "bad.y4m"), [0.0])
    for path in (tmp_path / "missing.mp4", tmp_path):
        with pytest.raises(VideoError, match=f"{path.name}: no such video file"):
            probe(str(path))


HEVC = "keyint=50:open-gop=1:scenecut=0:bframes=4:log-level=none"
GAPS = [0, 40, 80, 400, 410, 420, 900, 1500, 1533, 1566, 1600, 2000, 2001, 2002, 2500]  # ms
FILMS = {
    "3fps.mp4": {"count": 40, "fps": 3},
    "15fps.mkv": {"count": 60, "fps": 15},
    "film.mp4": {"count": 100, "fps": "24000/1001"},
    "ntsc.mp4": {"count": 100, "fps": "30000/1001"},
    "ntsc.mkv": {"count": 100, "fps": "30000/1001", "bf": 2},  # its times are whole milliseconds
    "variable.mp4": {"count": len(GAPS), "milliseconds": GAPS, "bf": 0},
    "variable.mkv": {"count": len(GAPS), "milliseconds": GAPS, "bf": 2},
    "late.mp4": {"count": 4, "milliseconds": [300, 350, 400, 450], "bf": 0},
    "portrait.mp4": {"count": 40, "size": (90, 160)},
    "odd.mp4": {"count": 40, "size": (427, 241)},
    "one.mp4": {"count": 1},
    "long.mp4": {"count": 300, "bf": 3, "g": 250, "x264_params": "scenecut=0"},
    "open.mp4": {"count": 200, "bf": 4, "x264_params": "scenecut=0:keyint=30:open-gop=1"},
    "hevc.mp4": {"count": 160, "codec": "libx265", "x265_params": HEVC},
    "mpeg4.mp4": {"count": 120, "codec": "mpeg4", "g": 50, "bf": 2},
    "only.mp4": {"count": 220, "bf": 0, "x264_params": "scenecut=0:keyint=infinite"},
}
# These films, cut at these seconds as "ffmpeg -ss X -c copy" does.
CUTS = [("long.mp4", 5.5), ("long.mp4", 9.0), ("only.mp4", 4.37), ("only.mp4", 0.01)]
CUTS += [("open.mp4", 3.5), ("mpeg4.mp4", 2.5), ("hevc.mp4", 2.0)]


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    """film(name) -> the path of one of FILMS, made when it is first wanted; film(name, seconds) -> cut."""
    folder, made = tmp_path_factory.mktemp("films"), {}

    def get(name, seconds=None):
        path = folder / f"{seconds}_{name}"
        if path not in made:
            made[path] = cut(get(name), path, seconds) if seconds else write_film(path, **FILMS[name])
        return made[path]

    return get


@pytest.mark.parametrize(("name", "seconds"), [(name, None) for name in FILMS] + CUTS)
def test_the_right_frames(film, name, seconds):
    """At any times those that are on screen by PyAV's time stamps."""
    path = film(name, seconds)
    header = probe(path)
    begins, shown = decode(path)
    for step in (0.5, 0.0777):
        times = np.arange(0, header.seconds, step).tolist()
        frames = read_frames(path, times)
        last = [max(i for i, begin in enumerate(begins) if begin <= time + 1e-4) for time in times]
        assert numbers(frames) == [shown[i] for i in last]
        assert frames.shape[1:3] == (header.height, header.width) == FILMS[name].get("size", (160, 90))[::-1]
    assert header.frames == len(shown)
    if name == "variable.mp4":
        assert begins == pytest.approx([gap / 1000 for gap in GAPS], abs=1e-3)
    if seconds is None:
        assert shown == list(range(FILMS[name]["count"]))


def test_times_by_hand(film):
    """Of a variable frame rate (GAPS); from the first frame, which is late; from the middle; of a cut film,
    whose first shown frame is number 165."""
    assert numbers(read_frames(film("variable.mp4"), [0.0, 0.039, 0.04, 0.399, 0.9])) == [0, 0, 1, 2, 6]
    assert numbers(read_frames(film("late.mp4"), [0.0, 0.05, 0.1, 0.149, 0.15])) == [0, 1, 2, 2, 3]
    assert numbers(read_frames(film("open.mp4"), [0.0, 0.5, 1.0], begin=3.1)) == [93, 108, 123]
    assert numbers(read_frames(film("long.mp4", 5.5), [0.0, 0.1], begin=1.0)) == [195, 198]


def test_a_film_that_stands_upright(tmp_path):
    """Stored on its side, with a note to turn it: PyAV does not turn it, decord does."""
    path = write_film(tmp_path / "turned.mp4", 20, rotation=90)
    frames = read_frames(path, [0.0, 0.1, 0.5])
    assert frames.shape == (3, 160, 90, 3) and probe(path).width == 90
    assert [0, 3, 15] in [numbers(np.rot90(frames, quarter, axes=(1, 2))) for quarter in (1, 3)]


def test_frames_are_resized_one_by_one_as_together(film):
    path, times = film("film.mp4"), [0.0, 0.5, 1.0, 1.5]
    together = resize(read_frames(path, times), (112, 56)).numpy()
    assert (read_frames(path, times, size=(112, 56)) == together).all() and together.shape == (4, 56, 112, 3)


def damage(path, new, begin, stop, change=lambda content: b"\xa5" * len(content)):
    """Bytes of a file changed, from one part of its length to another."""
    content = bytearray(Path(path).read_bytes())
    begin, stop = int(begin * len(content)), int(stop * len(content))
    content[begin:stop] = change(content[begin:stop])
    new.write_bytes(content)
    return str(new)


def test_films_that_cannot_be_read(film, tmp_path):
    whole = write_film(tmp_path / "fast.mp4", 300, movflags="faststart")
    closed, inside = "cannot be opened as a video", "a frame cannot be decoded"
    short = "holds fewer frames than its index lists"
    unindexed = r"is not mp4, mov, .* ffmpeg -i OLD -c copy NEW\.mkv"
    m4 = write_film(tmp_path / "whole.avi", 60, fps=25, codec="mpeg4", g=25)
    stream = {"fps": 25, "g": 12, "bf": 2, "preset": "veryfast", "x264_params": "scenecut=0"}
    bad = {
        damage(whole, tmp_path / "half.mp4", 0.5, 1, lambda _: b""): closed,
        damage(film("long.mp4"), tmp_path / "no_moov.mp4", 0.5, 1, lambda _: b""): closed,
        damage(film("ntsc.mp4"), tmp_path / "middle.mp4", 0.2, 0.6): inside,
        write_sound(tmp_path / "sound.m4a"): closed,
        # What is not decodable, but listed: every number after it would be that of an earlier frame.
        cut(film("long.mp4"), tmp_path / "late.mp4", packets=20): "does not begin with a key frame",
        cut(film("15fps.mkv"), tmp_path / "late.mkv", packets=20): "does not begin with a key frame",
        # The first of the shown frames need others that were cut off.
        cut(film("hevc.mp4"), tmp_path / "lead.mp4", 1.6): short,
        write_film(tmp_path / "turned.mkv", 20, rotation=180): "is to be shown turned",
        # A frame that was dropped: every number after it would be that of a later frame.
        **{empty_packet(m4, tmp_path / f"empty.{suffix}", 20): short for suffix in ("avi", "mkv", "mp4")},
        # decord's index begins at the first frame, its reading at a later one.
        write_film(tmp_path / "x264.ts", 60, **stream): unindexed,
        write_film(tmp_path / "mpeg4.m2ts", 60, codec="mpeg4", g=12, bf=2): unindexed,
        write_film(tmp_path / "x264.wmv", 60, **stream): unindexed,  # all at time 0
        write_film(tmp_path / "no_times.avi", 40, codec="mpeg4", bf=2): "no usable timestamps",
    }
    for path, said in bad.items():
        # probe decodes no more than the first frame
        late = said in (inside, short)
        for read in (lambda path: read_frames(path, [0.0, 1.0, 1.5]), *([] if late else [probe])):
            with pytest.raises(VideoError, match=said) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_film_that_ends_early(tmp_path, film):
    """A Matroska file cut off in the middle: what is there is read, but it is not the annotated film."""
    path = damage(film("15fps.mkv"), tmp_path / "half.mkv", 0.5, 1, lambda _: b"")
    header = probe(path)
    assert 10 < header.frames < 50 and header.seconds == pytest.approx(header.frames / 15, abs=0.01)
    times = [step / 5 for step in range(20)]
    frames = read_frames(path, times)
    assert len(frames) == sum(time <= header.seconds + 0.5 for time in times) < 20
    assert numbers(frames)[:-4] == [3 * step for step in range(len(frames) - 4)]  # the last may be damaged
    with pytest.raises(VideoError, match=r"half\.mkv: lasts .* its annotation says 4\.00 s"):
        check_header(make_sample(path, 60, 15.0, 160, 90), header, [0.0])
    sample = make_sample(path, round(header.frames / 0.8), 15.0, 160, 90)  # less is missing
    times = clip_times(sample, 2.0)
    assert check_header(sample, header, times) == sum(time <= header.seconds + 0.5 for time in times)
    assert len(clip_frames(sample, 5.0, 160, 28)) >= header.frames // 3


def make_sample(path, num_frames, fps, width=32, height=16, begin_frame=0, file_frames=None):
    clip = {"num_frames": num_frames, "fps": fps, "begin_frame": begin_frame}
    clip |= {"file_frames": file_frames or num_frames, "first_frame": 0, "stop_frame": 1}
    return Sample("a", path, "it moves", width, height, **clip, boxes={0: (0.0, 0.0, 1.0, 1.0)})


def test_a_clip_is_read_from_its_beginning(tmp_path):
    path = write_y4m(tmp_path / "a.y4m", count=40)  # 2 s at 20 fps, 32 x 16
    frames = read_clip(make_sample(path, 40, 20.0), [0.0, 0.5])
    assert frames.shape == (2, 16, 32, 3) and y4m_indices(frames) == [0, 10]
    part = make_sample(path, 10, 20.0, begin_frame=7, file_frames=40)
    assert y4m_indices(read_clip(part, [0.0, 0.25])) == [7, 12]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_frames_of_an_event_are_those_that_its_annotation_counts(tmp_path, suffix):
    """Of a film of 30, then 15 frames a second: boxes are numbered, so frame n belongs to n / mean fps."""
    times = [*(n * 1000 // 30 for n in range(300)), *(10000 + n * 1000 // 15 for n in range(150))]
    path = write_film(tmp_path / f"a.{suffix}", 450, size=(32, 24), milliseconds=times, bf=2)
    sample = make_sample(path, 450, 450 / 20, 32, 24)
    sample = replace(
        sample, first_frame=300, stop_frame=450, boxes=dict.fromkeys(range(300, 450), (0, 0, 1, 1))
    )
    shown, (first, last) = numbers(clip_frames(sample, 2.0, 112, 28)), sample.truth(0.5).span
    assert shown == [sample.grid(0.5).sampled_frame(step) for step in range(40)]
    assert [step for step, number in enumerate(shown) if number >= 300] == list(range(first, last + 1))
    part = replace(sample, begin_frame=290, num_frames=160)
    assert numbers(clip_frames(part, 2.0, 112, 28)) == [290 + int(22.5 * step / 2) for step in range(15)]
    # A copy with fewer frames has nothing but its own clock.
    other = replace(sample, num_frames=600, file_frames=600, fps=30.0)
    assert numbers(clip_frames(other, 1.0, 112, 28))[9:12] == [270, 300, 315]


@pytest.mark.parametrize(
    ("name", "seconds"),
    [(name, None) for name in ("film.mp4", "ntsc.mp4", "ntsc.mkv", "open.mp4")] + CUTS[-2:],
)
def test_at_a_constant_rate_numbers_and_times_choose_the_same(film, name, seconds):
    path = film(name, seconds)
    header = probe(path)
    sample = make_sample(path, header.frames, header.frames / header.seconds, 160, 90)
    for fps in (2.0, 7.0):
        times = clip_times(sample, fps)
        assert (read_clip(sample, times) == read_frames(path, times)).all()


@pytest.mark.parametrize("kept", [59, 50])  # decord lists all 60
def test_an_edit_list_that_ends_early(film, tmp_path, kept):
    whole = write_film(tmp_path / "whole.mp4", 60, bf=2, g=100, x264_params="scenecut=0")
    path = end_early(whole, tmp_path / "a.mp4", kept / 30)
    assert probe(path).frames == kept == len(decode(path)[1]) and probe(whole).frames == 60
    held = [kept - 1] * (60 - kept)
    assert numbers(clip_frames(make_sample(path, 60, 30.0, 160, 90), 30.0, 112, 28)) == [*range(kept), *held]
    assert numbers(read_frames(path, [0.0, 1.0, 10.0]))[:2] == [0, 30]


def test_damage_after_the_clip_is_left(tmp_path):
    path = cut_off(write_film(tmp_path / "whole.flv", 90, g=90, bf=0), tmp_path / "a.flv", 0.9)
    assert numbers(read_frames(path, [0.0, 0.5])) == [0, 15]
    with pytest.raises(VideoError, match="a frame cannot be decoded"):
        read_frames(path, [0.0, probe(path).seconds])


@pytest.mark.parametrize(("failures", "good"), [(1, True), (3, True), (4, False)])
def test_a_reader_that_stumbles_is_replaced(film, monkeypatch, failures, good):
    """decord's thread, when it is ahead, reports damage before the good frames in front of it are read."""
    read, reads = decord.VideoReader.next, []

    def stumble(reader):
        reads.append(reader)
        if len(reads) in (1, 12, 25, 40)[:failures]:
            raise decord.DECORDError("a damaged packet, further on")
        return read(reader)

    monkeypatch.setattr(decord.VideoReader, "next", stumble)
    with contextlib.nullcontext() if good else pytest.raises(DamagedError):
        assert numbers(list(native_frames(film("film.mp4", None), 3, 50))) == list(range(3, 50))
    assert len(set(reads)) == min(failures + 1, 4)


@pytest.mark.parametrize("size", [(2, 2), (8, 6), (16, 12), (24, 37), (48, 36), (72, 54), (1, 3)])
def test_narrow_films(tmp_path, size):
    """decord gives 4 to 96 colours where libav pads the rows."""
    path = write_film(tmp_path / "a.mkv", 20, size=size)
    with av.open(path) as file:
        wanted = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    shown = read_clip(make_sample(path, 20, 30.0, *size), [n / 30 for n in range(20)])
    assert shown.shape == wanted.shape and np.abs(shown.astype(int) - wanted).max() <= 8


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_pixels_that_are_not_square(tmp_path, suffix):
    """A record may count stored or displayed pixels: boxes in [0, 1] are the same. mkv is not read so far."""
    path = write_film(tmp_path / f"a.{suffix}", 30, size=(80, 90), aspect="2:1")
    assert numbers(read_clip(make_sample(path, 30, 30.0, 80, 90), [0.0, 0.5])) == [0, 15]
    with pytest.raises(VideoError, match="not square") if suffix == "mkv" else contextlib.nullcontext():
        assert numbers(clip_frames(make_sample(path, 30, 30.0, 160, 90), 2.0, 112, 28)) == [0, 15]
    with pytest.raises(VideoError, match="80 x 90, but its annotation says 40 x 90; correct the size"):
        read_clip(make_sample(path, 30, 30.0, 40, 90), [0.0])


@pytest.mark.parametrize(("width", "height"), [(3200, 16), (32, 15), (16, 32)])
def test_a_file_of_another_size_is_refused(tmp_path, width, height):
    path = write_y4m(tmp_path / "a.y4m", count=4)
    with pytest.raises(VideoError, match=rf"a\.y4m: .* 32 x 16, but .* {width} x {height}; correct the size"):
        read_clip(make_sample(path, 4, 20.0, width, height), [0.0])


@pytest.mark.parametrize(
    ("frames", "file_frames", "fps", "good"),
    [
        (24, 24, 4.0, True),
        (24, 24, 20.0, False),  # 1.2 s of 6 s would be shown
        (24, 24, 1.2, False),  # HC-STVG's 20 s of a clip that lasts 6 s
        (24, 28, 4.0, True),  # 1 s more
        (24, 29, 4.0, True),  # shorter, at the annotated rate: its end is missing
        (24, 32, 4.0, True),  # three quarters of it are there
        (24, 33, 4.0, False),
        (24, 31, 4.25, False),  # 4 instead of 4.25 frames a second is another rate
        (24, 35, 5.0, True),  # 7 s: another rate, but the duration agrees
        (24, 20, 4.0, True),  # 1 s less
        (24, 19, 4.0, False),  # longer than annotated: another file
        (160, 168, 4.0, True),  # 40 s: 5 % are 2 s
        (160, 150, 4.0, False),
    ],
)
@pytest.mark.parametrize("begin", [0, 4])
def test_a_file_of_another_duration_is_refused(frames, file_frames, fps, good, begin):
    """The duration is that of the file, wherever the clip begins."""
    header = Header(frames, frames / 4, 32, 16)
    sample = make_sample("a.y4m", file_frames - 2 * begin, fps, begin_frame=begin, file_frames=file_frames)
    if good:
        end = frames / 4 + 0.5 - begin / fps  # the last frame is held
        shown = check_header(sample, header, [0.0, end - 0.01, end + 0.01])
        assert shown == (3 if frames == file_frames else 2)  # by number, or by time
        return
    said = rf"lasts {frames / 4:.2f} s \({frames} frames, 4 a second\), .* {file_frames / fps:.2f} s; correct"
    with pytest.raises(VideoError, match=said):
        check_header(sample, header, [0.0])


def test_a_clip_of_a_file_that_lacks_its_end(tmp_path):
    path = write_y4m(tmp_path / "a.y4m", 24, "4:1")  # 6 s of 7.5
    sample = make_sample(path, 30, 4.0)
    times = [step / 2 for step in range(15)]
    assert y4m_indices(read_clip(sample, times)) == [*range(0, 24, 2), 23, 23]
    # How many of them clips have that begin elsewhere, the held frame included.
    for begin, count in ((0, 14), (4, 12), (26, 1)):
        part = replace(sample, begin_frame=begin, num_frames=30 - begin)
        assert check_header(part, probe(path), times) == len(read_clip(part, times)) == count
    beyond = replace(sample, begin_frame=27, num_frames=10)
    for check in (lambda: check_header(beyond, probe(path), [0.0]), lambda: read_clip(beyond, [0.0])):
        with pytest.raises(VideoError, match=r"a\.y4m: ends at 6\.00 s, but the frame at 6\.75 s is needed"):
            check()


@pytest.mark.parametrize("fps", [1.0, 2.0, 8.0])
def test_frames_of_a_clip_as_the_model_sees_them(tmp_path, fps):
    """2 s at 30 fps; at 8 fps step k shows the frame on screen at k / 8 s, floor(30 k / 8)."""
    path = write_film(tmp_path / "a.mp4", 60)
    frames = clip_frames(make_sample(path, 60, 30.0, 160, 90), fps, 112, 28)
    assert frames.dtype == np.uint8 and frames.shape[1:] == (56, 112, 3)  # 90 * 112 / 160 = 63 -> 2 * 28
    assert numbers(frames) == [int(30 * step / fps) for step in range(int(2 * fps))]


@pytest.mark.parametrize(
    ("width", "height", "max_side", "factor", "expected"),
    [
        (640, 480, 336, 28, (336, 252)),  # the paper's 336 x 252
        (640, 360, 336, 28, (336, 196)),  # 336 x 189; 189 / 28 = 6.75 -> 7
        (640, 360, 336, 32, (320, 192)),  # 336 / 32 = 10.5 -> 10 (half to even); 189 / 32 = 5.9 -> 6
        (160, 90, 336, 28, (168, 84)),  # not enlarged to 336: 160 / 28 = 5.7 -> 6, 90 / 28 = 3.2 -> 3
        (98, 126, 336, 28, (112, 112)),  # 3.5 -> 4, 4.5 -> 4: halves to even
        (300, 300, 300, 28, (280, 280)),  # 10.7 -> 11 would be 308 > 300
        (2000, 10, 336, 28, (336, 28)),  # 1.68 pixels high, but at least one factor
        (640, 480, 55, 28, (28, 28)),
    ],
)
def test_frame_size_by_hand(width, height, max_side, factor, expected):
    assert frame_size(width, height, max_side, factor) == expected


@settings(max_examples=50)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(32, 2000), st.sampled_from([28, 32]))
def test_frame_size_properties(width, height, max_side, factor):
    shown = frame_size(width, height, max_side, factor)
    assert shown == frame_size(height, width, max_side, factor)[::-1]
    for side, original in zip(shown, (width, height), strict=True):
        assert side % factor == 0 and factor <= side <= max_side
        exact = original * min(1, max_side / max(width, height))
        assert abs(side - exact) <= factor / 2 + 1e-6 or side in (factor, max_side // factor * factor)


def test_a_max_side_below_one_token_is_refused():
    with pytest.raises(VideoError, match=r"max_side: 31 is less than .* write 32 or more"):
        frame_size(640, 480, 31, 32)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_preprocessing_is_bit_identical_to_hf(family):
    """What HF's video processors (transformers 5.23, torchvision 0.29) made of the first two frames of a
    160 x 90 video. Temporal patches do not mix, so these are also the first rows for the whole video."""
    golden = np.load(GOLDEN / f"{family}.npz")
    frames, patch_size = golden["frames"], int(golden["patch_size"])
    constants = (patch_size, 2, 2, golden["mean"].tolist(), golden["std"].tolist())
    size = frame_size(160, 90, 336, 2 * patch_size)
    pixel_values, grid = patchify(resize(frames, size), *constants)
    assert grid.tolist() == golden["video_grid_thw"].tolist() and grid.dtype == torch.long
    expected = torch.from_numpy(golden["pixel_values_videos"])
    assert pixel_values.dtype == torch.float32 and pixel_values.shape == expected.shape
    assert (pixel_values - expected).abs().max() == 0


def test_patches_against_a_loop():
    """Order: for each token its 2 x 2 patches; inside a patch colour, then time, then rows, then columns."""
    p, m, t, mean, std = 2, 2, 2, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8))
    padded = [frames[0], frames[1], frames[2], frames[2]]  # 3 frames: the last one twice
    corners = [(0, 0), (0, p), (p, 0), (p, p)]
    rows = [
        [
            (int(frame[y + dy + i, x + dx + j, colour]) / 255 - mean[colour]) / std[colour]
            for colour, frame in product(range(3), padded[g * t : g * t + t])
            for i, j in product(range(p), range(p))
        ]
        for g, y, x, (dy, dx) in product(range(2), range(0, 8, m * p), range(0, 12, m * p), corners)
    ]
    pixel_values, grid = patchify(frames, p, m, t, mean, std)
    assert grid.tolist() == [2, 4, 6]
    torch.testing.assert_close(pixel_values, torch.tensor(rows), atol=1e-5, rtol=0)


def test_resize_keeps_what_it_can():
    frames = np.random.default_rng(0).integers(0, 256, (2, 28, 56, 3), dtype=np.uint8)
    same = resize(frames, (56, 28))
    assert same.dtype == torch.uint8 and (same.numpy() == frames).all()
    grey = resize(np.full((1, 90, 160, 3), 77, dtype=np.uint8), (84, 56))
    assert grey.shape == (1, 56, 84, 3) and (grey == 77).all()
