"""Replaced frames: the same questions, other pixels, the same on any rank."""

import contextlib
import dataclasses
import json
import shutil

import pytest
import torch

import evaluate
from config import load_config
from data import load_samples
from lab import controls
from runtime.files import DataError
from video.loader import FrameLoader


@pytest.fixture
def samples(world):
    return load_samples("hcstvg", str(world / "all.json"), str(world))[0]


def test_frames_of_another_clip_are_fitted():
    """In time and in size; of the same shape nothing is done to them."""
    frames = torch.randint(0, 256, (7, 28, 28, 3), dtype=torch.uint8)
    for count, kept in ((7, range(7)), (4, [0, 2, 4, 6]), (1, [0])):
        fitted = controls.fit_frames(frames, torch.Size((count, 28, 28, 3)))
        assert torch.equal(fitted, frames[list(kept)])
    plain = torch.arange(7, dtype=torch.uint8)[:, None, None, None]
    fitted = controls.fit_frames(plain.expand(7, 28, 28, 3), torch.Size((13, 56, 14, 3)))
    assert torch.equal(fitted[::2], plain.expand(7, 56, 14, 3))


def test_another_video_is_another(samples):
    """The next one, round and round: also where several sentences are about one."""
    assert controls.other_sample(samples, 5).id == "0.y4m"
    videos = [0, 0, 1, 1, 1, 0]
    shared = [dataclasses.replace(s, video=f"{v}.mp4") for s, v in zip(samples, videos, strict=True)]
    others = [controls.other_sample(shared, n).id for n in range(6)]
    assert others == [f"{n}.y4m" for n in (2, 2, 5, 5, 5, 2)]
    with pytest.raises(DataError, match=r"no other video than 0\.mp4"):
        controls.other_sample(shared[:2], 0)


@pytest.mark.parametrize("control", controls.CONTROLS)
def test_frames_depend_on_the_sample_alone(write_config, tmp_path, samples, control):
    """Whichever samples are asked for, in whatever order, as on another rank. Number and size stay."""
    config = load_config(write_config(tmp_path))
    with contextlib.closing(FrameLoader(config, 28)) as loader:
        real = [loader.frames(sample).clone() for sample in samples]
        whole, part = (controls.ControlledLoader(loader, control, samples, seed=5) for _ in range(2))
        whole.prefetch(samples)
        shown = [whole.frames(sample) for sample in samples]
        part.prefetch(samples[5:2:-2])
        assert all(torch.equal(part.frames(samples[n]), shown[n]) for n in (5, 3))
        assert all(torch.equal(loader.frames(s), own) for s, own in zip(samples, real, strict=True))
    for n, (frames, own) in enumerate(zip(shown, real, strict=True)):
        assert frames.shape == own.shape and frames.dtype == torch.uint8
        assert not torch.equal(frames, own)
        if control == "shuffled":
            assert sorted(frames.flatten(1).tolist()) == sorted(own.flatten(1).tolist())
        else:
            assert torch.equal(frames, torch.full_like(own, 128) if control == "blank" else real[(n + 1) % 6])


def test_controls_of_a_run(taught, tmp_path, world, capsys):
    """`other` says what evaluate.py says of files that were swapped. Each answer has its file; question and
    truth are the same; the second start decodes nothing; the table has the real video first."""
    run, swapped = tmp_path / "run", tmp_path / "swapped"
    shutil.copytree(taught, run)
    shutil.copytree(world, swapped)
    for n in range(6):
        shutil.copy(world / f"{(n + 1) % 6}.y4m", swapped / f"{n}.y4m")
    controls.main([str(run), "eval_limit=1", "other"])
    _, real, other = capsys.readouterr().out.splitlines()
    assert real.startswith("the video") and other.startswith(controls.CONTROLS["other"])
    controls.main([str(run)])
    table = capsys.readouterr().out
    controls.main([str(run), *controls.CONTROLS])
    assert capsys.readouterr().out == table and len(table.splitlines()) == 5
    evaluate.main([str(run), f"videos={swapped}", "--output", str(run / "swapped.jsonl")])
    names = ["predictions", "swapped", *(f"predictions_{control}" for control in controls.CONTROLS)]
    answers = {n: [json.loads(line) for line in (run / f"{n}.jsonl").open()] for n in names}
    texts = {name: [record["completion"] for record in records] for name, records in answers.items()}
    assert texts["predictions_other"] == texts.pop("swapped")
    assert len(set(map(tuple, texts.values()))) == 4
    for records in answers.values():
        for key in ("id", "sentence", "truth", "scale"):
            assert [r[key] for r in records] == [r[key] for r in answers["predictions"]]
