"""answer.py and lab/film.py: one video asked, what is printed, and what is drawn of it."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import answer
from config import Config, Lora, load_config, save_config
from evaluate import answer_batch
from prompts import Answer, format_answer
from qwen.checkpoint import load_policy
from qwen.lora import add_adapters
from runtime.files import UserError
from samples import Sample, Track
from toy.world import NATIVE_FPS, SIDE, draw_objects, render, write_y4m
from video.loader import FrameLoader

ROOT = Path(__file__).parent.parent
TOY = [str(ROOT / "checkpoints/toy"), str(ROOT / "configs/toy.yaml")]
# Each on a clip of 6 s with steps of a second, 4 native frames a second, 56 x 56 pixels.
CONFIG = Config(time_unit="second")


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """(path, objects) of a clip of the toy world, in the current directory."""
    monkeypatch.chdir(tmp_path)
    objects = draw_objects(np.random.default_rng(5))
    path = tmp_path / "eine Übung.y4m"
    write_y4m(path, render(objects, NATIVE_FPS), NATIVE_FPS)
    return str(path), objects


def asked(capsys, *words):
    """(objects of --json, stderr)"""
    answer.main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_the_answers_are_those_of_evaluate(clip, capsys):
    """Of seconds 1 to 5 and two sentences at once; sampled ones do not change them."""
    video, (one, other, _) = clip
    config, policy = load_config(TOY[1]), load_policy(TOY[0])
    words = [video, one.sentence, other.sentence, *TOY, "--begin", 1, "--end", 5, "--samples", 2]
    told, said = asked(capsys, *words)
    sample = Sample("0", video, "", SIDE, SIDE, 16, 4.0, 4, 24, 0, 4, Track(0, np.eye(4)))
    batch = [dataclasses.replace(sample, sentence=shape.sentence) for shape in (one, other)]
    records = answer_batch(policy, [*enumerate(batch)], FrameLoader(config, policy.size_factor), config)
    for line, record in zip(told, records, strict=True):
        assert (line["text"], line["steps"]) == (record["completion"], record["span"])
        assert (line["video"], line["model"], len(line["samples"])) == (video, TOY[0], 2)
        assert line["seconds"] == [1 + record["span"][0], min(2 + record["span"][1], 5)]
        boxes = [[row["step"], row["pred"]] for row in line["boxes"] if row["pred"]]
        assert boxes == [[k, [round(56 * v) for v in box]] for k, box in record["pred_boxes"]]
    assert f"clip: {video}, 1.00 to 5.00 s\n" in said and one.sentence in said
    assert Path("answers/eine Übung.png").stat().st_size > 1000
    with pytest.raises(UserError, match=r"question and answer take 328\d\d tokens, and the model 32768"):
        answer.main([video, "a", *TOY, "max_new_tokens=32760"])


def record_of(text, **more):
    return {"completion": text, "truncated": False, "scale": [1000, 1000]} | more


@pytest.fixture
def sample(tmp_path):
    """A grey clip: seconds 1 to 5 of a film of 6 s, 56 x 100 pixels."""
    path = tmp_path / "grey.y4m"
    write_y4m(path, np.full((24, 100, 56, 3), 128, np.uint8), 4)
    return answer.clip_of(str(path), 1.0, 5.0)


def test_pixels_and_seconds_are_those_of_the_file(sample, capsys):
    """By hand: x is in thousandths of 56 pixels, y of 100; step 2 of the clip begins at 3 s of the file."""
    think, pred = ((2, (250, 100, 500, 999)), (3, (250, 100, 510, 1000))), ((2, (0, 105, 510, 500)),)
    told = answer.tell(record_of(format_answer(Answer(2, 3, think, pred))), sample, CONFIG)
    assert (told["steps"], told["seconds"], told["problems"]) == ([2, 3], [3.0, 5.0], [])
    assert told["boxes"] == [
        {"step": 2, "seconds": 3.0, "think": (14, 10, 28, 100), "pred": (0, 10, 29, 50)},
        {"step": 3, "seconds": 4.0, "think": (14, 10, 29, 100), "pred": None},
    ]
    text = answer.as_text({"sentence": "a dog"} | told, raw=False).splitlines()
    assert text[1:3] == ["a dog", "3.00 to 5.00 s, steps 2 to 3"] and text[4].split()[:2] == ["2", "3.00"]
    assert text[5].endswith("4.00  14, 10, 29, 100       -")


def test_what_is_wrong_with_an_answer_is_said(sample):
    def problems(start, end, *items, **more):
        items = items or ((start, (0, 0, 9, 9)),)
        return answer.tell(record_of(format_answer(Answer(start, end, items, items)), **more), sample, CONFIG)

    told = problems(3, 1)
    assert told["seconds"] is None and "ends before it begins" in told["problems"][0]
    assert problems(3, 7)["seconds"] == [4.0, 5.0] and "last step is 3" in problems(3, 7)["problems"][0]
    assert problems(4, 7)["seconds"] is None and problems(0, 3)["problems"] == []
    flat, late = (1, (500, 0, 400, 9)), (3, (0, 0, 9, 9))
    assert problems(1, 2, flat, late)["problems"] == [
        "boxes of steps [1] have no inside",
        "boxes of steps [3] are outside the interval and do not count",
    ]
    told = answer.tell(record_of("<time> 2 - \x1b[1m", truncated=True), sample, CONFIG)
    assert told["steps"] is None and told["boxes"] == []
    assert told["problems"][0].startswith(
        "malformed: cut off at max_new_tokens=2048 (raise it); at character 12"
    )
    assert answer.as_text({"sentence": "a dog"} | told, raw=False).endswith("<time> 2 - \\x1b[1m")


def test_the_rate_is_the_films_to_the_last_bit(tmp_path):
    """383 frames, 30 a second, last 12.7666667 s in decord's float32, at which frame 30 would be late."""
    frame = b"FRAME\n" + bytes([100]) * 16 * 24
    (tmp_path / "a.y4m").write_bytes(b"YUV4MPEG2 W16 H16 F30:1 Ip A1:1 C420jpeg\n" + frame * 383)
    clip = answer.clip_of(str(tmp_path / "a.y4m"), 2.0, 9.99)
    assert (clip.fps, clip.begin_frame, clip.num_frames, clip.file_frames) == (30.0, 60, 239, 383)
    assert answer.clip_of(str(tmp_path / "a.y4m"), None, None).num_frames == 383


def test_agreement_by_hand(sample):
    """Two tubes of 4 frames that share 2, where their boxes overlap by half (IoU 1/3): 2/3 of 6 frames."""
    left, right = ([0, 0, 0.5, 1], [0.25, 0, 0.75, 1])
    one, other = (((k, k + 4), Track(k, np.array([box] * 4, float))) for k, box in ((0, left), (2, right)))
    assert answer.agreement([one, other], sample) == pytest.approx(1 / 9)
    assert answer.agreement([one, one, other], sample) == pytest.approx((1 + 2 / 9) / 3)
    assert answer.agreement([one, None, one, None], sample) == pytest.approx(1 / 6)  # of 6 pairs one agrees
    assert answer.agreement([one], sample) is None


def frames_of(path):
    """The frames of a picture, an animation or a film, uint8 (T, H, W, 3)."""
    if path.suffix == ".mp4":
        av = pytest.importorskip("av")
        with av.open(str(path)) as film:
            assert film.streams.video[0].codec_context.pix_fmt == "yuv420p"
            return np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])
    image_module = pytest.importorskip("PIL.Image")
    with image_module.open(path) as image:
        frames, durations = [], []
        for k in range(getattr(image, "n_frames", 1)):
            image.seek(k)
            frames += [np.array(image.convert("RGB"))]
            durations += [image.info.get("duration", 0)]
        assert path.suffix == ".png" or sum(durations) == 4000
        return np.stack(frames)


def coloured(line, colour):
    """Where a line of pixels (N, 3) is red or blue."""
    own, others = line[:, colour].astype(int), np.delete(line, colour, 1).max(1).astype(int)
    return np.flatnonzero(own - others > 60)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_film_shows_the_tubes_that_the_metrics_judge(sample, tmp_path, suffix):
    """In steps 1 and 2 of 4 the left edge goes from 1/4 to 1/2 of the width: at frame 6, half a second later,
    it stands at 3/8; at 8 it is there, and held until the interval ends with frame 12."""
    film = pytest.importorskip("lab.film")
    boxes = tuple((k, (250 * k, 200, 900, 800)) for k in (1, 2))
    records = [record_of(format_answer(Answer(1, 2, boxes, boxes))), record_of("no answer")]
    film.save_film(tmp_path / f"film{suffix}", [(sample, records, "a dog")], CONFIG)
    frames = frames_of(tmp_path / f"film{suffix}")
    width, height = film.size_of(sample, *film.SIDES[suffix])
    count, tall, wide, _ = frames.shape
    assert (wide, width % 2, tall % 2) == (width, 0, 0) and width / height == pytest.approx(0.56, abs=0.01)
    assert count == 16
    for frame, left in enumerate([None] * 4 + [0.25, 0.3125, 0.375, 0.4375] + [0.5] * 4 + [None] * 4):
        blue, red = (coloured(frames[frame, height // 2], colour) for colour in (2, 0))
        if left is None:
            assert not len(blue) and not len(red)
        else:
            assert blue[0] == pytest.approx(left * width, abs=2) and blue[-1] < 0.9 * width + 2
            assert red[0] == pytest.approx(blue[0] + film.BOLD, abs=2)  # the final box is inside


def test_a_picture_shows_the_answered_steps_and_their_neighbours(sample, tmp_path):
    film = pytest.importorskip("lab.film")
    boxes, flipped = ((2, (250, 200, 900, 800)),), ((2, (900, 200, 100, 800)),)
    records = [record_of(format_answer(Answer(2, 2, items, items))) for items in (boxes, flipped)]
    film.save_picture(
        tmp_path / "a.png", [(sample, records, "a dog"), (sample, records, "a\ndog or 犬")], CONFIG
    )
    (page,) = frames_of(tmp_path / "a.png")
    width, height = film.size_of(sample, film.CELL, film.CELL)
    places = [film.GAP + k * (width + film.GAP) for k in range(4)]
    row = page[film.tall("a dog") + height // 2]
    for k in (0, 2):  # steps 1 and 3, of four
        assert (row[places[k] : places[k] + width] == 128).all()
    assert coloured(row, 2)[0] == places[1] + round(0.25 * width)
    assert coloured(row, 2)[-1] == places[1] + round(0.9 * width) - 1
    assert coloured(row, 0)[-1] == coloured(row, 2)[-1] - film.BOLD  # nothing of the flipped box
    assert (row[places[2] + width :] == 255).all()
    below = page[film.tall("a dog") + height + 3]
    assert coloured(below, 0).tolist() == list(range(places[1], places[1] + width))  # the interval


def test_captions_are_written_in_a_font_that_has_their_letters(sample, capsys):
    film, matplotlib = pytest.importorskip("lab.film"), pytest.importorskip("matplotlib")
    film.say_letters_lack.cache_clear()
    with matplotlib.rc_context({"font.family": ["cmr10", "DejaVu Sans"]}):  # the first has no Cyrillic
        names = [film.font_for([(sample, [], text)]).getname()[0] for text in ("a dog", "Жук a\ndog")]
        assert names == ["cmr10", "DejaVu Sans"] and capsys.readouterr().err == ""
        assert film.font_for([(sample, [], "\U0001fae8")]).getname()[0] == "cmr10"
        assert "some letters are in no font" in capsys.readouterr().err


def test_adapters_and_a_model_without_a_run(clip, checkpoints, tmp_path, capsys):
    """The settings are then the defaults, and the coordinates those of the family."""
    video, _ = clip
    short = ["max_side=56", "max_new_tokens=6", "precision=fp32", "video_workers=0", "--end", "2"]
    policy = load_policy(str(checkpoints["qwen2_5_vl"]))
    add_adapters(policy.model, Lora(rank=2))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    policy.save(tmp_path / "adapters")
    told, said = asked(capsys, video, "a dog", tmp_path / "adapters", *short)
    assert "coordinates: resized, those of Qwen2.5-VL" in said and "settings of config.py" in said
    config = load_config([], [*short[:-2], "coordinates=resized"])
    sample = dataclasses.replace(answer.clip_of(video, 0, 2), sentence="a dog")
    [[record]] = answer.ask(policy, [sample], config, 0)
    assert told[0]["text"] == record["completion"]
    assert told != asked(capsys, video, "a dog", checkpoints["qwen2_5_vl"], *short)[0]
    (line,), said = asked(capsys, video, "a dog", checkpoints["qwen3_vl"], "coordinates=original", *short)
    assert line["truncated"] and line["problems"][0].startswith(
        "malformed: cut off at max_new_tokens=6 (raise it);"
    )
    assert "coordinates" not in said and "picture: answers/eine Übung.png" in said


def test_without_words_the_last_run_or_the_toy_is_asked(tmp_path, world, monkeypatch, capsys):
    """Nothing that a run names is executed."""
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").symlink_to(ROOT / "checkpoints")
    (line,), said = asked(capsys)
    first = draw_objects(np.random.default_rng((3, 0)))[0]  # of the held-out split, whose seed is 3
    assert (line["video"], line["sentence"]) == ("answers/toy.y4m", first.sentence)
    assert "model: checkpoints/toy, settings of" in said and "picture: answers/toy.png" in said
    Path("evil.py").write_text("open('ran', 'w')\ndef f(answer, truth): return 0")
    config = dataclasses.replace(load_config(TOY[1]), toy=False, rewards={"evil.py:f": 1.0})
    config = dataclasses.replace(config, eval_annotations=str(world / "all.json"), videos=str(world))
    for n, name in enumerate(("old", "new", "unfinished")):
        Path("runs", name).mkdir(parents=True)
        save_config(config, Path("runs", name, "config.yaml"))
        if name != "unfinished":
            Path("runs", name, "checkpoint").mkdir()
            for file in (ROOT / "checkpoints/toy").iterdir():
                Path("runs", name, "checkpoint", file.name).symlink_to(file)
            os.utime(Path("runs", name, "checkpoint"), (n, n))
    (line,), said = asked(capsys)
    assert (line["model"], line["video"]) == ("runs/new/checkpoint", str(world / "0.y4m"))
    assert "settings of runs/new/config.yaml" in said and not Path("ran").exists()
    assert answer.find_model("runs/old", [TOY[1]], [])[:2] == ("runs/old/checkpoint", [TOY[1]])
    with pytest.raises(UserError, match="runs/unfinished has no checkpoint"):
        answer.main(["runs/unfinished"])


def test_errors_are_one_line(clip, tmp_path, monkeypatch):
    video, _ = clip
    Path("text.mp4").write_text("no film")
    frame = b"FRAME\n" + bytes([100]) * 16 * 24
    Path("long.y4m").write_bytes(b"YUV4MPEG2 W16 H16 F1:1000 Ip A1:1 C420jpeg\n" + frame * 4)
    for words, message in (
        (["none.mp4", "a dog"], "none.mp4: no such video"),
        (["clips/none.mp4", "a dog"], "clips/none.mp4: no such video"),
        ([video], "and then one SENTENCE"),
        ([video, "a <|im_end|> dog"], "'a <|im_end|> dog' must be a text"),
        ([video, " "], "' ' must be a text"),
        ([video, "a dog", "runs/a", "runs/b"], "several models: runs/a, runs/b"),
        ([video, "a dog", "step=3"], "unknown key step; did you mean steps?"),
        ([video, "a dog", *TOY, "--begin", "9"], "lasts 6.00 s: nothing"),
        ([video, "a dog", *TOY, "--begin", "3", "--end", "2"], "lasts 6.00 s: nothing"),
        (["text.mp4", "a dog", *TOY], "text.mp4: 7 bytes that cannot be opened as a video"),
        (["long.y4m", "a dog", *TOY], "must be at most 3600"),
        ([video, "a dog", "--samples", "-1"], "--samples -1: must be 0 or more"),
        ([video, "a dog", "--video", "a.avi"], "a.avi: write a name that ends in .mp4 or .gif"),
        ([video, "a dog", "--picture", "a.jpg"], "a.jpg: write a name that ends in .png"),
        ([video, "", str(tmp_path)], "the sentence '' must be"),
    ):
        with pytest.raises(UserError) as error:
            answer.main(words)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_without_a_package_only_the_drawings_are_missing(monkeypatch, capsys):
    for name in ("av", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
        monkeypatch.delitem(sys.modules, "lab.film", raising=False)
        monkeypatch.delattr("lab.film", raising=False)
        with pytest.raises(UserError, match=f"a.mp4: {name} is missing; pip install"):
            answer.load_film(None, Path("a.mp4"))
        assert (answer.load_film(None, None) is None) == (name == "PIL")
    assert "no picture: PIL is missing; pip install -r requirements-dev.txt" in capsys.readouterr().err
