"""The toy world is read back by the code that reads real data."""

import numpy as np
import pytest

from data import load_hcstvg
from toy import world
from video.frames import read_frames


def objects_of(*seed):
    return world.draw_objects(np.random.default_rng(seed))


def test_the_world_is_read_back_as_it_was_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "SPLITS", {"train": (1, 1), "test": (6, 3)})
    world.make_world(tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    world.make_world(tmp_path)  # leaves alone what exists
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    samples, report = load_hcstvg(str(tmp_path / "test.json"), str(tmp_path))
    assert not report and len(samples) == 6
    for n, sample in enumerate(samples):
        shape, truth = objects_of(3, n)[0], sample.truth(1.0)
        assert (sample.sentence, truth.span) == (shape.sentence, (shape.start, shape.stop - 1))
        assert all(box == pytest.approx(shape.box(step), abs=2e-4) for step, box in truth.boxes.items())
        frames = read_frames(sample.video, [i / 2 for i in range(12)])
        rendered = world.render(objects_of(3, n), world.NATIVE_FPS)[::2]
        assert np.abs(frames.astype(int) - rendered).max() <= 2  # YCbCr has fewer colours than RGB


def test_a_sentence_singles_out_one_object_that_stays_in_the_frame():
    for n in range(40):
        objects = objects_of(n)
        assert len({shape.colour for shape in objects}) == world.OBJECTS == 3
        for shape in objects:
            boxes = [shape.box(t / 4) for t in range(world.SECONDS * 4)]
            seen = [t for t, box in enumerate(boxes) if box]
            assert seen == list(range(4 * shape.start, 4 * shape.stop))
            assert all(-1e-9 <= v <= 1 + 1e-9 for t in seen for v in boxes[t])


@pytest.mark.parametrize("kind", world.SHAPES)
def test_a_box_is_the_tight_box_of_the_drawn_pixels(kind):
    shape = world.Shape("red", kind, "right", 0.5, (0.4, 0.5), 0, 3)
    for t, frame in enumerate(world.render([shape], 2)[:6]):
        rows, columns = np.nonzero((frame == world.COLOURS["red"]).all(axis=2))
        drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / world.SIDE
        assert drawn == pytest.approx(shape.box(t / 2), abs=1.6 / world.SIDE)
