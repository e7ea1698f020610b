"""video.py: which frames are read, and what becomes of them, against hand-made files and HF's own output."""

from pathlib import Path
from struct import pack

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import Sample
from prompts import TimeGrid
from video import VideoError, frame_size, patchify, read_clip, read_frames, resize

GOLDEN = Path(__file__).parent / "golden"


# ----------------------------------------------------------------------------------------------------------
# Files whose frames say which they are


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


def atom(kind, *parts):
    body = b"".join(parts)
    return pack(">I4s", len(body) + 8, kind) + body


def write_mov(path, levels, milliseconds, hidden=0, late=0, size=(32, 16)):
    """Uncompressed RGB in QuickTime: grey frames, each with its own duration; the edit list begins the film
    after `hidden` milliseconds, inside the only group of pictures, as "ffmpeg -ss X -c copy" does,
    or shows nothing for the first `late` milliseconds."""
    (width, height), n, total = size, len(levels), sum(milliseconds)
    matrix = pack(">9I", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    raw = pack(">6xH16x2H2I I H32xHh", 1, width, height, 72 << 16, 72 << 16, 0, 1, 24, -1)
    table = atom(
        b"stbl",
        atom(b"stsd", pack(">2I", 0, 1), atom(b"raw ", raw)),
        atom(b"stts", pack(">2I", 0, n), *[pack(">2I", 1, duration) for duration in milliseconds]),
        atom(b"stss", pack(">3I", 0, 1, 1)),  # only the first frame is a key frame
        atom(b"stsc", pack(">5I", 0, 1, 1, n, 1)),
        atom(b"stsz", pack(">3I", 0, width * height * 3, n)),
        atom(b"stco", pack(">3I", 0, 1, 8)),
    )
    source = atom(b"dinf", atom(b"dref", pack(">2I", 0, 1), atom(b"url ", pack(">I", 1))))
    media = atom(
        b"mdia",
        atom(b"mdhd", pack(">5I2H", 0, 0, 0, 1000, total, 0, 0)),
        atom(b"hdlr", pack(">2I4s13x", 0, 0, b"vide")),
        atom(b"minf", atom(b"vmhd", bytes(12)), source, table),
    )
    header = atom(
        b"tkhd", pack(">6I16x", 3, 0, 0, 1, 0, total), matrix, pack(">2I", width << 16, height << 16)
    )
    edits = [pack(">IiI", late, -1, 65536)] * bool(late) + [pack(">3I", total - hidden, hidden, 65536)]
    edit = atom(b"edts", atom(b"elst", pack(">2I", 0, len(edits)), *edits))
    film = atom(b"mvhd", pack(">5IIH10x", 0, 0, 0, 1000, total, 65536, 256), matrix, bytes(24), pack(">I", 2))
    data = atom(b"mdat", *[bytes([level]) * (width * height * 3) for level in levels])
    path.write_bytes(data + atom(b"moov", film, atom(b"trak", header, edit, media)))
    return str(path)


# ----------------------------------------------------------------------------------------------------------
# Choosing frames


def test_frames_at_two_per_second(tmp_path):
    path = write_y4m(tmp_path / "a.y4m", count=40)  # 2 s at 20 fps
    frames = read_frames(path, [0.0, 0.5, 1.0, 1.5])
    assert frames.shape == (4, 16, 32, 3)
    assert y4m_indices(frames) == [0, 10, 20, 30]


def test_any_order_repeats_and_begin(tmp_path):
    path = write_y4m(tmp_path / "a.y4m", count=40)
    assert y4m_indices(read_frames(path, [1.0, 0.0, 0.0, 0.31])) == [20, 0, 0, 6]
    assert y4m_indices(read_frames(path, [0.0, 0.5, 1.0], begin=0.35)) == [7, 17, 27]


@pytest.mark.parametrize(
    ("fps", "rate"), [("25:1", 25), ("24000:1001", 24000 / 1001), ("30:1", 30), ("10:1", 10)]
)
def test_the_frame_read_is_the_frame_that_the_time_grid_counts(tmp_path, fps, rate):
    """The box of a step belongs to TimeGrid.sampled_frame(step): the model must be shown that very frame."""
    count = 70
    path = write_y4m(tmp_path / "a.y4m", count, fps, step=3)
    grid = TimeGrid(num_frames=count, fps=rate, step_seconds=0.5)
    times = [i * 0.5 for i in range(grid.num_steps)]
    expected = [grid.sampled_frame(i) for i in range(grid.num_steps)]
    assert y4m_indices(read_frames(path, times), step=3) == expected


def test_variable_frame_rate(tmp_path):
    """Frames begin at 0, 50, 100, 150, 400, 450, 900 ms: frame 4 appears at 0.4 s, frame 6 at 0.9 s."""
    path = write_mov(tmp_path / "a.mov", [10, 30, 50, 70, 90, 110, 130], [50, 50, 50, 250, 50, 450, 50])
    times = [0.0, 0.049, 0.05, 0.2, 0.399, 0.4, 0.5, 0.899, 0.9]
    assert read_frames(path, times)[:, 0, 0, 0].tolist() == [10, 10, 30, 70, 70, 90, 110, 110, 130]


def test_time_is_counted_from_the_first_frame(tmp_path):
    """Nothing is on screen for the first 0.3 s of the file; annotations count frames and do not say so."""
    path = write_mov(tmp_path / "a.mov", [10, 30, 50, 70], [50, 50, 50, 50], late=300)
    assert read_frames(path, [0.0, 0.05, 0.1, 0.2])[:, 0, 0, 0].tolist() == [10, 30, 50, 70]


def test_last_frame_is_held_for_half_a_second(tmp_path):
    path = write_y4m(tmp_path / "a.y4m", count=40)  # ends at 2.0 s
    assert y4m_indices(read_frames(path, [1.95, 2.0, 2.5])) == [39, 39, 39]
    with pytest.raises(VideoError, match=r"a\.y4m: ends at 2\.00 s, but the frame at 2\.60 s"):
        read_frames(path, [0.0, 2.6])
    with pytest.raises(VideoError, match=r"a\.y4m: ends at 2\.00 s, but the frame at 2\.60 s"):
        read_frames(path, [0.0, 0.6], begin=2.0)


@pytest.mark.parametrize("times", [[], [-0.5, 0.0]])
def test_times_that_make_no_sense(tmp_path, times):
    with pytest.raises(ValueError, match="at least one"):
        read_frames(write_y4m(tmp_path / "a.y4m", count=3), times)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.mp4", b"", "0 bytes that cannot be opened"),
        ("garbage.mkv", b"hello, I am no video", "20 bytes that cannot be opened"),
        ("header.y4m", b"YUV4MPEG2 W32 H16 F20:1 Ip A1:1 C420jpeg\n", "cannot be opened"),
        ("missing.mp4", None, "no such video file"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoError, match=said) as caught:
        read_frames(str(path), [0.0])
    assert str(caught.value).startswith(f"{path}: ")


def test_folder_is_no_video(tmp_path):
    with pytest.raises(VideoError, match="no such video file"):
        read_frames(str(tmp_path), [0.0])


def test_damaged_inside(tmp_path):
    """The file opens, but its frames are cut down to 7 bytes each (box stsz, entry sample_size)."""
    path = Path(write_mov(tmp_path / "a.mov", [10, 30, 50], [50, 50, 50]))
    content = path.read_bytes()
    sizes = content.index(b"stsz") + 8
    path.write_bytes(content[:sizes] + pack(">I", 7) + content[sizes + 4 :])
    with pytest.raises(VideoError, match=r"a\.mov: a frame cannot be decoded"):
        read_frames(str(path), [0.0, 0.1])


def test_hidden_frames_are_refused(tmp_path):
    """3 of 7 frames (0, 50, 100 < 120 ms) lie before the edit list's start: decord would read wrong ones."""
    durations = [50, 50, 50, 250, 50, 450, 50]
    path = write_mov(tmp_path / "cut.mov", [10, 30, 50, 70, 90, 110, 130], durations, hidden=120)
    with pytest.raises(VideoError, match=r"cut\.mov: 3 frames are hidden .* re-encode it: ffmpeg"):
        read_frames(path, [0.0])


# ----------------------------------------------------------------------------------------------------------
# The file against its annotation


def make_sample(path, num_frames, fps, width=32, height=16, begin_frame=0):
    return Sample(
        id="a",
        video=path,
        sentence="it moves",
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        begin_frame=begin_frame,
        first_frame=0,
        stop_frame=1,
        boxes={0: (0.0, 0.0, 1.0, 1.0)},
    )


def test_a_clip_is_read_from_its_beginning(tmp_path):
    path = write_y4m(tmp_path / "a.y4m", count=40)  # 2 s at 20 fps, 32 x 16
    frames = read_clip(make_sample(path, 40, 20.0), [0.0, 0.5])
    assert frames.shape == (2, 16, 32, 3) and y4m_indices(frames) == [0, 10]
    part = make_sample(path, 10, 20.0, begin_frame=7)  # of a longer file: nothing is said about that one
    assert y4m_indices(read_clip(part, [0.0, 0.25])) == [7, 12]


@pytest.mark.parametrize(("width", "height"), [(3200, 16), (32, 15), (16, 32)])
def test_a_file_of_another_size_is_refused(tmp_path, width, height):
    path = write_y4m(tmp_path / "a.y4m", count=4)
    with pytest.raises(VideoError) as caught:
        read_clip(make_sample(path, 4, 20.0, width, height), [0.0])
    said = f"{path}: its frames are 32 x 16, but its annotation says {width} x {height}; correct width and"
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("count", "num_frames", "fps", "good"),
    [
        (24, 24, 4.0, True),
        (24, 24, 20.0, False),  # 1.2 s of 6 s would be shown
        (24, 24, 1.2, False),  # HC-STVG's 20 s of a clip that lasts 6 s
        (24, 28, 4.0, True),  # 1 s more
        (24, 29, 4.0, False),
        (24, 20, 4.0, True),  # 1 s less
        (24, 19, 4.0, False),
        (160, 168, 4.0, True),  # 40 s: 5 % are 2 s
        (160, 170, 4.0, False),
        (160, 153, 4.0, True),
        (160, 150, 4.0, False),
    ],
)
def test_a_file_of_another_duration_is_refused(tmp_path, count, num_frames, fps, good):
    path = write_y4m(tmp_path / "a.y4m", count, "4:1", step=1)
    sample = make_sample(path, num_frames, fps)
    if good:
        assert read_clip(sample, [0.0, 2.5]).shape == (2, 16, 32, 3)
        return
    with pytest.raises(VideoError) as caught:
        read_clip(sample, [0.0])
    said = (
        f"{path}: lasts {count / 4:.2f} s, but its annotation says {num_frames / fps:.2f} s (img_num / fps);"
    )
    assert str(caught.value).startswith(f"{said} correct img_num and fps in the record")


# ----------------------------------------------------------------------------------------------------------
# Size


@pytest.mark.parametrize(
    ("width", "height", "max_side", "factor", "expected"),
    [
        (640, 480, 336, 28, (336, 252)),  # the paper's 336 x 252
        (640, 360, 336, 28, (336, 196)),  # 336 x 189; 189 / 28 = 6.75 -> 7
        (640, 360, 336, 32, (320, 192)),  # 336 / 32 = 10.5 -> 10 (half to even); 189 / 32 = 5.9 -> 6
        (360, 640, 336, 28, (196, 336)),
        (160, 90, 336, 28, (168, 84)),  # not enlarged to 336: 160 / 28 = 5.7 -> 6, 90 / 28 = 3.2 -> 3
        (98, 126, 336, 28, (112, 112)),  # 3.5 -> 4, 4.5 -> 4: halves to even
        (300, 300, 300, 28, (280, 280)),  # 10.7 -> 11 would be 308 > 300
        (2000, 10, 336, 28, (336, 28)),  # 1.68 pixels high, but at least one factor
        (640, 480, 28, 28, (28, 28)),
        (640, 480, 55, 28, (28, 28)),
        (336, 336, 336, 28, (336, 336)),
    ],
)
def test_frame_size_by_hand(width, height, max_side, factor, expected):
    assert frame_size(width, height, max_side, factor) == expected


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(32, 2000), st.sampled_from([28, 32]))
def test_frame_size_properties(width, height, max_side, factor):
    shown = frame_size(width, height, max_side, factor)
    assert shown == frame_size(height, width, max_side, factor)[::-1]
    shrink = min(1, max_side / max(width, height))
    for side, original in zip(shown, (width, height), strict=True):
        assert side % factor == 0 and factor <= side <= max_side
        exact = original * shrink
        assert abs(side - exact) <= factor / 2 + 1e-6 or side in (factor, max_side // factor * factor)


@pytest.mark.parametrize(("max_side", "factor"), [(27, 28), (31, 32), (1, 28)])
def test_a_max_side_below_one_token_is_refused(max_side, factor):
    with pytest.raises(
        VideoError, match=f"max_side: {max_side} is less than the {factor} .* write max_side: {factor} or"
    ):
        frame_size(640, 480, max_side, factor)


# ----------------------------------------------------------------------------------------------------------
# Pixels


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
    p, m, t = 2, 2, 2
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    frames = torch.randint(
        0, 256, (3, 8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    padded = [frames[0], frames[1], frames[2], frames[2]]  # 3 frames: the last one twice
    rows = []
    for g in range(2):
        for y in range(0, 8, m * p):
            for x in range(0, 12, m * p):
                for dy, dx in ((0, 0), (0, p), (p, 0), (p, p)):
                    row = []
                    for colour in range(3):
                        for frame in padded[g * t : g * t + t]:
                            for i in range(p):
                                for j in range(p):
                                    value = int(frame[y + dy + i, x + dx + j, colour]) / 255
                                    row.append((value - mean[colour]) / std[colour])
                    rows.append(row)
    pixel_values, grid = patchify(frames, p, m, t, mean, std)
    assert grid.tolist() == [2, 4, 6]
    torch.testing.assert_close(pixel_values, torch.tensor(rows), atol=1e-5, rtol=0)


def test_resize_keeps_what_it_can():
    frames = np.random.default_rng(0).integers(0, 256, (2, 28, 56, 3), dtype=np.uint8)
    same = resize(frames, (56, 28))
    assert same.dtype == torch.uint8 and (same.numpy() == frames).all()
    grey = resize(np.full((1, 90, 160, 3), 77, dtype=np.uint8), (84, 56))
    assert grey.shape == (1, 56, 84, 3) and (grey == 77).all()


@pytest.mark.parametrize("shape", [(0, 28, 28, 3), (2, 28, 27, 3), (2, 14, 28, 3)])
def test_patchify_refuses_what_does_not_divide(shape):
    with pytest.raises(ValueError, match="multiples of 28"):
        patchify(torch.zeros(shape, dtype=torch.uint8), 14, 2, 2, [0.5] * 3, [0.5] * 3)
