"""config.py: the paper's defaults, YAML with overrides, and errors that say what to write instead."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

import rewards
from config import AT_LEAST, POSITIVE, Config, ConfigError, Sft, load_config, save_config
from prompts import TextFormat
from rewards import WEIGHTS

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))}


@pytest.fixture
def path(tmp_path):
    """An (empty) YAML file: all defaults."""
    (tmp_path / "a.yaml").write_text("")
    return tmp_path / "a.yaml"


def test_defaults(path):
    """The paper's, section 4 and Eq. 10; where it is silent, verl's; SFT and toy world only if asked for."""
    config = load_config(path)
    assert config == Config()
    assert (config.model, config.fps, config.max_side) == ("Qwen/Qwen2.5-VL-7B-Instruct", 2.0, 336)
    assert (config.learning_rate, config.weight_decay) == (1e-6, 1e-2)
    assert (config.batch_size, config.num_generations) == (128, 8)
    ones = dict.fromkeys(("format", "consistency", "temporal", "spatial", "giou", "l1"), 1.0)
    assert config.rewards == {**ones, "think": 0.5}
    assert config.scale_rewards and not config.toy and config.sft.steps == 0
    assert config.text_format == TextFormat("norm1000", "frame", True, 2.0)
    assert (config.kl_beta, config.clip_eps, config.updates_per_batch) == (0.01, 0.2, 1)
    assert (config.temperature, config.loss_aggregation, config.max_grad_norm) == (1.0, "token-mean", 1.0)


def test_file_then_command_line(path):
    path.write_text("steps: 7\nlearning_rate: 1e-5\nrewards: {think: 0, l1: 2}\nsft: {steps: 3}\nvidor:\n")
    overrides = ["steps=9", "learning_rate=1e-6", "rewards.think=1.0", "sft.learning_rate=2", "think=false"]
    overrides += ["output_dir=runs/a=b", "videos=", "fps=4", "eval_annotations=[a", "lora.targets=q_proj"]
    config = load_config(path, overrides)
    assert (config.steps, config.rewards) == (9, WEIGHTS | {"think": 1.0, "l1": 2.0})
    assert config.learning_rate == 1e-6  # text for YAML, which wants a point
    assert config.sft == Sft(steps=3, learning_rate=2.0) and config.lora.targets == ["q_proj"]
    assert config.text_format.think is False
    assert (config.output_dir, config.videos, config.vidor) == ("runs/a=b", "", "")
    assert config.eval_annotations == "[a"  # what is no YAML is text
    assert config.fps == 4.0 and type(config.fps) is float and config.text_format.step_seconds == 0.25
    spatial = load_config(path, ["rewards={spatial: 0}"]).rewards
    assert spatial == WEIGHTS | {"think": 0, "l1": 2, "spatial": 0}
    assert load_config(path, ["rewards./a/my.py:f=2"]).rewards["/a/my.py:f"] == 2.0  # not loaded here
    config.rewards["l1"] = 5
    assert Config().rewards == WEIGHTS and Config().sft == Sft()  # defaults are not shared


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
    config = load_config([path, other, part], ["steps=8"])
    assert (config.steps, config.output_dir, config.rewards["l1"]) == (8, "runs/b_giou_0.5", 3)
    other.write_text("steps: -1\n")
    with pytest.raises(ConfigError, match=rf"^{other}: steps"):
        load_config([path, other, part], ["steps=8"])


BAD = {
    "learning_rat=1": r"unknown key learning_rat; did you mean learning_rate\?",
    "sft.step=5": r"unknown key sft\.step; did you mean sft\.steps\?",
    "rewards.thinking=1": "there is no weight 'thinking'",
    "rewards.think=.nan": "the weight of think is .*; write a number",
    "sft=5": "sft: 5 must be",
    **dict.fromkeys(
        ("rewards=", "rewards=0", "rewards=[]", "rewards=''"), "rewards: .* must be `key: value`"
    ),
    **dict.fromkeys(("steps=many", "steps=1.5", "steps=true", "steps="), "steps: .* must be a whole number"),
    **dict.fromkeys(("fps=1e-300", "fps=0", "fps=1e9"), "fps: .* must be from 0.01 to 60"),
    **dict.fromkeys(("fps=fast", "fps=true", "fps=nan", "fps={a: 1}"), "fps: .* must be a finite number"),
    "think=1": "think: 1 must be true or false",
    "steps": "'steps': settings on the command line are written key=value",
    "log_to=[mlflow]": "must be some of tensorboard, wandb",
    "lora.targets=[]": r"lora\.targets: \[\] must be a list of names",
    "coordinates=pixels": "coordinates: 'pixels' .* norm1000, resized, original",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_settings(path, override):
    with pytest.raises(ConfigError, match=BAD[override]) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert "\n" not in message and str(path) not in message  # the file is not to blame
    assert message.startswith(f"{override!r}: " if "=" not in override else "command line: ")


LIMITS = {key: (least, least - 1) for least, keys in AT_LEAST.items() for key in keys.split()}
LIMITS |= dict.fromkeys(POSITIVE, (1, 0)) | {"fps": (60, 61)}


def test_limits(path):
    """Every number has one, beyond which it means nothing."""
    numbers = {f.name for f in dataclasses.fields(Config) if f.type in (int, float)}
    assert numbers <= LIMITS.keys()
    load_config(path, [f"{key}={good}" for key, (good, _) in LIMITS.items()])
    for key, (_, bad) in LIMITS.items():
        with pytest.raises(
            ConfigError, match=rf"command line: {key}: {bad}(\.0)? must be (at least|above|from)"
        ):
            load_config(path, [f"{key}={bad}"])


def test_bad_files(tmp_path):
    path = tmp_path / "bad.yaml"
    cases = {
        "steps: [1\n": "is not valid YAML",
        "- steps\n": "must hold `key: value` lines",
        "toy: true\nvideos: mine\n": "toy is true, .* in one folder; set it to false",
        "fps: 2.5\ntime_unit: second\n": "fps: 2.5 with time_unit: second must be a whole number",
        "rewards: {speed: 1}\n": "rewards: there is no weight 'speed'",
        "sft: {steps: 5, steps: 7}\n": "is not valid YAML: the key steps stands there twice; keep one",
    }
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: {message}") as caught:
            load_config(path, ["steps=3"])
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read .*; name a YAML file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["[]", "0", "false", '""', "{}", "", "# all defaults\n", "---\n...\n"])
def test_only_an_empty_file_is_an_empty_configuration(path, tmp_path, text, capsys):
    """For `python rewards.py`, too, which reads the weights in it."""
    path.write_text(text)
    answer = {"completion": "no", "truth": {"span": [0, 0], "boxes": {"0": [0, 0, 1, 1]}}}
    (tmp_path / "answers.jsonl").write_text(json.dumps(answer))
    for use in (load_config, lambda path: rewards.main([str(tmp_path / "answers.jsonl"), str(path)])):
        if text in ("[]", "0", "false", '""'):
            with pytest.raises(ConfigError, match=r"a\.yaml: must hold `key: value` lines, not "):
                use(path)
        else:
            use(path)


def test_rewards_py_reads_the_weights_as_training_does(path, tmp_path, capsys):
    """Files over files; what cannot be used is one line."""
    text = "<time> 0 - 0 </time> <pred_bbox> 0. [0, 0, 1000, 1000] </pred_bbox>"
    answer = {"completion": text, "truth": {"span": [0, 0], "boxes": {"0": [0, 0, 1, 1]}}, "think": False}
    (answers := tmp_path / "answers.jsonl").write_text(json.dumps(answer))
    path.write_text("rewards: {temporal: 5, spatial: 2}\n")
    (over := tmp_path / "over.yaml").write_text("rewards: {temporal: 7}\n")
    rewards.main([str(answers), str(path), str(over)])
    assert json.loads(capsys.readouterr().out)["rewards"]["total"] == 1 + 1 + 7 + 2
    for wrong in ("rewards: {speed: 1}", "rewards: 0", "rewards: {l1: many}", "a: 1\na: 2"):
        over.write_text(wrong)
        with pytest.raises(ConfigError, match=f"^{over}: "):
            rewards.main([str(answers), str(over)])


def test_save_and_load(path, tmp_path):
    config = load_config(path, ["rewards.l1=0.25", "sft.steps=5", "learning_rate=1e-6", "seed=3", "videos=é"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    written = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert list(written) == [field.name for field in dataclasses.fields(Config)]  # all of them


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_of_the_project(name):
    """Each is whole; those of the three data sets are the paper's recipe (section 4)."""
    config = load_config(CONFIGS[name])
    assert config.model and config.eval_annotations and config.videos
    assert bool(config.vidor) == (config.dataset == "vidstg")
    only_to_evaluate = name in ("closed_model", "hcstvg_v1_from_vidstg")
    assert bool(config.train_annotations) != only_to_evaluate
    if name in ("hcstvg_v1", "hcstvg_v2", "vidstg"):
        recipe = ("model", "fps", "max_side", "think", "rewards", "sft", "num_generations", "batch_size")
        for key in (*recipe, "learning_rate", "weight_decay"):
            assert getattr(config, key) == getattr(Config(), key), key
