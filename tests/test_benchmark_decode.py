"""benchmarks/decode.py on a small film, without torchvision: the films, our pixel values, the lines."""

import json

import pytest

from benchmarks.decode import clips_of, compare, measure, our_way, ratios, repeat, write_film, write_split
from data import load_samples
from video.frames import probe


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    film = write_film(folder / "film.mp4", seconds=2, size=(160, 96))
    return film, repeat(film, folder / "long.mp4", 3)


def test_the_films_are_what_the_clips_say(films):
    film, long = films
    for n, header in enumerate(map(probe, map(str, films))):
        assert (header.frames, header.width, header.height) == ((50, 150)[n], 160, 96)
        assert header.seconds == pytest.approx((2, 6)[n])
    clips = clips_of(film, long, seconds=2)
    spans = [(c.begin_frame, c.num_frames, c.file_frames) for c in clips.values()]
    assert spans == [(0, 50, 50), (100, 50, 150)]
    assert list(clips_of(film, film, seconds=2)) == ["first"]


def test_our_pixel_values_are_those_of_the_same_frames_in_both_films(films):
    """The long film repeats the packets of the short one, whose first frame is a key frame: its last third
    shows the same pictures. 160 x 96 goes to the nearest multiples of 28."""
    values = {}
    for name, sample in clips_of(*films, seconds=2).items():
        ((figures, values[name]),) = measure({"ours": our_way(sample)}, rounds=1).values()
        assert figures["frames"] == 4
        t, h, w = figures["grid"]
        assert t == 2 and figures["pixel_values"] == [t * h * w, 3 * 2 * 14 * 14]
        assert (h * 14, w * 14) == (84, 168)
    assert values["first"].equal(values["last"])


def test_a_line_has_its_keys_and_the_ratio_is_that_of_the_totals(films):
    sample = clips_of(*films, seconds=2)["first"]
    (line,) = compare(sample, rounds=1, backends=[])
    line = json.loads(json.dumps(line))
    assert line["clip"] == "first" and line["way"] == "ours"
    assert line["total"] == pytest.approx(line["decode"] + line["preprocess"], abs=2e-4) and line["wall"] > 0
    theirs = {"clip": "first", "way": "transformers, decord", "total": 2 * line["total"]}
    assert ratios([line, theirs]) == {"first: transformers, decord": 0.5}


def test_the_split_is_read_without_a_finding(films, tmp_path):
    sample = clips_of(*films, seconds=2)["first"]
    samples, report = load_samples("hcstvg", str(write_split(tmp_path, sample, 2)), str(tmp_path))
    assert not report and [(s.first_frame, s.stop_frame, s.fps) for s in samples] == [(12, 37, 25)] * 2
    assert [probe(s.video).frames for s in samples] == [50, 50]
