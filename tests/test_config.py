"""config.py: the paper's defaults, YAML with overrides, and errors that say what to write instead."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from config import Config, ConfigError, Sft, load_config, save_config
from prompts import TextFormat
from rewards import WEIGHTS

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture
def path(tmp_path):
    """An (empty) YAML file: all defaults."""
    (tmp_path / "a.yaml").write_text("")
    return tmp_path / "a.yaml"


def test_defaults_are_the_papers(path):
    """STVG-o1, section 4; the weights of Eq. 10; SFT and toy world only where asked for."""
    config = load_config(path)
    assert config == Config()
    assert (config.model, config.fps, config.max_side) == ("Qwen/Qwen2.5-VL-7B-Instruct", 2.0, 336)
    assert (config.learning_rate, config.weight_decay) == (1e-6, 1e-2)
    assert (config.batch_size, config.num_generations) == (128, 8)
    assert config.rewards == {
        **dict.fromkeys(("format", "consistency", "temporal", "spatial", "giou", "l1"), 1.0),
        "think": 0.5,
        **dict.fromkeys(("empty_overlap", "missed_step"), 0.0),
    }
    assert config.think and config.scale_rewards and not config.toy and config.sft.steps == 0
    assert config.text_format == TextFormat("norm1000", "frame", True, 2.0)


def test_defaults_where_the_paper_is_silent_are_verls(path):
    config = load_config(path)
    assert (config.kl_beta, config.clip_eps, config.updates_per_batch) == (0.01, 0.2, 1)
    assert (config.temperature, config.loss_aggregation, config.max_grad_norm) == (1.0, "token-mean", 1.0)


def test_file_then_command_line(path):
    path.write_text("steps: 7\nlearning_rate: 1e-5\nrewards: {think: 0, l1: 2}\nsft: {steps: 3}\nvidor:\n")
    config = load_config(
        path,
        [
            "steps=9",
            "learning_rate=1e-6",  # text for YAML, which wants a point
            "rewards.think=1.0",
            "sft.learning_rate=2",
            "think=false",
            "output_dir=runs/a=b",
            "videos=",
            "fps=4",
        ],
    )
    assert config.steps == 9 and config.learning_rate == 1e-6
    assert config.rewards == WEIGHTS | {"think": 1.0, "l1": 2.0}
    assert config.sft == Sft(steps=3, learning_rate=2.0)
    assert config.think is False and config.text_format.think is False
    assert (config.output_dir, config.videos, config.vidor) == ("runs/a=b", "", "")
    assert config.fps == 4.0 and type(config.fps) is float and config.text_format.step_seconds == 0.25
    assert load_config(path, ["rewards={spatial: 0}"]).rewards == WEIGHTS | {
        "think": 0,
        "l1": 2,
        "spatial": 0,
    }


def test_files_over_files(path, tmp_path):
    """A later one lies over the earlier, nested keys one by one, and adds its name to an output_dir that it
    does not set; the command line lies over all. A file is to blame whatever lies over it."""
    path.write_text("steps: 7\nrewards: {think: 0, l1: 2}\noutput_dir: runs/a\n")
    part, other = tmp_path / "giou_0.5.yaml", tmp_path / "other.yaml"
    part.write_text("rewards: {giou: 0.5, l1: 3}\n")
    other.write_text("steps: 9\noutput_dir: runs/b\n")
    config = load_config([path, part])
    assert config.rewards == WEIGHTS | {"think": 0, "l1": 3, "giou": 0.5}
    assert (config.steps, config.output_dir) == (7, "runs/a_giou_0.5")
    assert load_config([path, part, other]).output_dir == "runs/b"
    config = load_config([path, other, part], ["steps=8"])
    assert (config.steps, config.output_dir, config.rewards["l1"]) == (8, "runs/b_giou_0.5", 3)
    assert load_config([path, part], ["output_dir=runs/c"]).output_dir == "runs/c"
    other.write_text("steps: -1\n")
    with pytest.raises(ConfigError, match=rf"^{other}: steps"):
        load_config([path, other, part], ["steps=8"])


def test_defaults_are_not_shared(path):
    load_config(path, ["rewards.think=9", "sft.steps=9"]).rewards["l1"] = 5
    assert load_config(path).rewards == WEIGHTS and load_config(path).sft == Sft()


BAD = {
    "learning_rat=1": "unknown key learning_rat; did you mean learning_rate?",
    "zzz=1": "unknown key zzz; the keys are model, dataset,",
    "sft.step=5": "unknown key sft.step; did you mean sft.steps?",
    "rewards.thinking=1": "line: rewards: there is no weight 'thinking'; write numbers .* format, con",
    "rewards.think=much": "the weight think is 'much'; write numbers",
    "rewards.think=.nan": "the weight think is nan; write numbers",
    "rewards=5": "rewards: 5 must be key: value lines",
    "sft=5": "sft: 5 has parts; write sft.steps=..., for example",
    "steps=many": "steps: 'many' must be a whole number",
    "steps=1.5": "steps: 1.5 must be a whole number",
    "steps=true": "steps: True must be a whole number",
    "steps=": "steps: None must be a whole number",
    "sft.steps=x": "sft.steps: 'x' must be a whole number",
    "learning_rate=fast": "learning_rate: 'fast' must be a number",
    "learning_rate=true": "learning_rate: True must be a number",
    "think=1": "think: 1 must be true or false",
    "model=5": "model: 5 must be text",
    "steps": "'steps': settings on the command line are written key=value",
    "dataset=kitti": "dataset: 'kitti' is not one of hcstvg, vidstg",
    "loss_aggregation=mean": "loss_aggregation: 'mean' is not one of token-mean, sequence-mean, constant",
    "coordinates=pixels": "coordinates: 'pixels' is not one of norm1000, resized, original",
    "time_unit=minute": "time_unit: 'minute' is not one of frame, second",
    "fps=0": "fps: 0.0 must be above 0",
    "fps=.nan": "fps: nan must be a finite number",
    "num_generations=1": "num_generations: 1 must be at least 2",
    "batch_size=0": "batch_size: 0 must be at least 1",
    "max_new_tokens=0": "max_new_tokens: 0 must be at least 1",
    "updates_per_batch=0": "updates_per_batch: 0 must be at least 1",
    "steps=-1": "steps: -1 must be at least 0",
    "seed=-1": "seed: -1 must be at least 0",
    "kl_beta=-0.1": "kl_beta: -0.1 must be at least 0",
    "learning_rate=nan": "learning_rate: nan must be a finite number",
    "temperature=0": "temperature: 0.0 must be above 0",
    "max_grad_norm=0": "max_grad_norm: 0.0 must be above 0",
    "sft.batch_size=0": "sft: .* needs steps >= 0, batch_size >= 1",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_settings(path, override):
    with pytest.raises(ConfigError, match=BAD[override]) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert "\n" not in message and str(path) not in message  # the file is not to blame
    assert message.startswith(f"{override!r}: " if "=" not in override else "command line: ")


def test_a_bad_file_is_to_blame_whatever_the_command_line_says(path):
    path.write_text("max_side: 0\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: max_side: 0 must be at least 1"):
        load_config(path, ["steps=3"])


def test_the_toy_world_is_never_made_among_other_files(path):
    path.write_text("toy: true\nvideos: w\ntrain_annotations: w/train.json\neval_annotations: w/test.json\n")
    assert load_config(path).toy
    with pytest.raises(ConfigError, match=r"command line: toy: true makes videos, .* write toy: false"):
        load_config(path, ["videos=mine"])


def test_text_that_is_no_yaml_is_text(path):
    assert load_config(path, ["videos=[a"]).videos == "[a"


@pytest.mark.parametrize("fps", ["0.5", "2.5"])
def test_second_steps_need_whole_frames(path, fps):
    with pytest.raises(ConfigError, match=rf"fps: {fps} with time_unit: second must be a whole number"):
        load_config(path, [f"fps={fps}", "time_unit=second"])


def test_bad_files(tmp_path):
    cases = {
        "steps: [1\n": "is not valid YAML",
        "- steps\n": "must hold `key: value` lines, not list",
        "step: 1\n": r"unknown key step; did you mean steps\?",
        "1: 1\n": "unknown key 1; the keys are",
        "sft: {rate: 1}\n": "unknown key sft.rate; ",
        "rewards: {speed: 1}\n": r"bad\.yaml: rewards: there is no weight 'speed'",
        "steps: 5\nseed: 1\nsteps: 7\n": "the key steps stands there twice; keep one",
        "sft: {steps: 5, steps: 7}\n": "the key steps stands there twice; keep one",
    }
    for text, message in cases.items():
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bad\.yaml: is not valid YAML"):
        load_config(path)
    said = r"cannot be read .*; name a YAML file such as configs/toy.yaml"
    for missing in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=said):
            load_config(missing)


def test_save_and_load(path, tmp_path):
    config = load_config(path, ["rewards.l1=0.25", "sft.steps=5", "learning_rate=1e-6", "seed=3", "videos=é"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    written = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert list(written) == [field.name for field in dataclasses.fields(Config)]  # all of them


def test_a_saved_configuration_is_whole(tmp_path, full_disk):
    with full_disk(), pytest.raises(OSError) as caught:
        save_config(Config(), tmp_path / "saved.yaml")
    assert caught.value.filename == str(tmp_path / "saved.yaml") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_configurations_of_the_project(file):
    config = load_config(file)
    assert config.model and config.eval_annotations and config.videos
    assert bool(config.vidor) == (config.dataset == "vidstg")
    only_to_evaluate = file.stem in ("closed_model", "hcstvg_v1_from_vidstg")
    assert bool(config.train_annotations) != only_to_evaluate


def test_the_papers_recipe():
    """Section 4: what the configurations of the three data sets share with it."""
    stated = {"learning_rate": 1e-6, "weight_decay": 1e-2, "num_generations": 8, "batch_size": 128, "fps": 2}
    stated |= {"max_side": 336, "model": "Qwen/Qwen2.5-VL-7B-Instruct", "think": True}
    names = {file.stem: file for file in CONFIGS}
    for name in ("hcstvg_v1", "hcstvg_v2", "vidstg"):
        config = load_config(names[name])
        assert {key: getattr(config, key) for key in stated} == stated
        assert config.rewards == WEIGHTS and config.sft.steps == 0
    assert {"toy", "qwen3_vl", "closed_model", "hcstvg_v1_from_vidstg"} <= names.keys()
