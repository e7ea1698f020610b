"""Strangers' folders: no code of theirs is run, and a script ends in a result or in one line."""

import json
import pickle
import shutil

import pytest
import yaml
from tiny_runs import read_lines

import evaluate
from lab import bench, compare, controls, pictures
from qwen.checkpoint import load_policy
from runtime.files import UserError
from runtime.plugins import FUNCTIONS, load_file, read_source
from runtime.predictions import saved_answers

PAYLOAD = "__import__('pathlib').Path({!r}).touch()"
SCRIPT = "<script>alert(1)</script>"


class Pickled:
    """Unpickling it runs the payload."""

    def __init__(self, payload):
        self.payload = payload

    def __reduce__(self):
        return eval, (self.payload,)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The file that a stranger's code would make; the current directory is its folder."""
    monkeypatch.chdir(tmp_path)
    read_source.cache_clear()
    load_file.cache_clear()
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


@pytest.fixture
def run(finished, tmp_path, ran):
    """A finished run whose config.yaml names a reward, in the run itself, and whose texts hold HTML."""
    folder = shutil.copytree(finished, tmp_path / "stranger")
    (folder / "evil.py").write_text(f"{PAYLOAD.format(str(ran))}\ndef f(answer, truth): return 1\n")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["rewards"]["stranger/evil.py:f"] = 0.5
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    for path in folder.glob("*.jsonl"):
        records = [r | ({"completion": SCRIPT} if "completion" in r else {}) for r in read_lines(path)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_run_folder_runs_nothing(run, capsys):
    """Its reward is named, and left out; its row, its page and its bench are made all the same."""
    for main, *arguments in (
        (evaluate.main, "eval_limit=1"),
        (controls.main, "blank", "eval_limit=1"),
        (bench.main,),
    ):
        main([str(run), *arguments])
        out, err = capsys.readouterr()
        assert "note: not computed, as only" in err and "stranger/evil.py:f; to run this code" in err
        assert "m_vIoU" in out or "total" in out
    compare.main([str(run)])
    assert "| m_vIoU " in capsys.readouterr().out
    pictures.main([str(run)])
    page = (run / "pictures/run.html").read_text()
    assert SCRIPT not in page and SCRIPT.replace("<", "&lt;").replace(">", "&gt;") in page
    assert not FUNCTIONS.keys() & {"stranger/evil.py:f"}


def test_what_the_user_names_is_run(run, ran):
    """The same file, in a setting of the user's."""
    evaluate.main([str(run), "eval_limit=1", "rewards.stranger/evil.py:f=0.5"])
    ran.unlink()
    del FUNCTIONS["stranger/evil.py:f"]


CONFIGS = {
    "python": "!!python/object/apply:eval [{payload}]",
    "new": "fps: !!python/object/new:os.system ['touch {ran}']",
    "name": "rewards: {{!!python/name:os.system : 1}}",
    "deep": "[" * 1000,
    "date": "fps: 2001-99-99",
    "laughs": "\n".join(["a0: &a0 [1]", *(f"a{k}: &a{k} [{9 * f'*a{k - 1}, '}]" for k in range(1, 12))]),
    "laughing list": "\n".join(["- &a0 [1]", *(f"- &a{k} [{9 * f'*a{k - 1}, '}]" for k in range(1, 12))]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_is_data(run, ran, kind):
    text = CONFIGS[kind].format(payload=json.dumps(PAYLOAD.format(str(ran))), ran=ran)
    (run / "config.yaml").write_text(text)
    for main in (evaluate.main, compare.main, pictures.main, bench.main, controls.main):
        with pytest.raises(UserError) as caught:
            main([str(run)])
        assert "\n" not in str(caught.value)


def custom_code(folder, payload):
    """Code beside the weights, for a type that transformers does not know."""
    (folder / "evil.py").write_text(payload)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "evil"}
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))


def custom_tokenizer(folder, payload):
    (folder / "evil.py").write_text(payload)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Evil"}
    settings["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def pickled(folder, payload):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled(payload)))


def endless(folder, payload):
    loops = "{% for _ in r %}" * 3 + "{% endfor %}" * 3
    (folder / "chat_template.jinja").write_text("{% set r = range(99999) %}" + loops)


def adapters(folder, payload):
    """Pickled, on a base that is a path, here to pickled weights."""
    base = shutil.copytree(folder, folder / "base")
    pickled(base, payload)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Pickled(payload)))
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def pickled_adapters(folder, payload):
    adapters(folder, payload)
    (folder / "base/pytorch_model.bin").unlink()
    for path in folder.glob("model*.safetensors"):
        path.rename(folder / "base" / path.name)


def circle(folder, payload):
    """Adapters on themselves."""
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "spoil", [custom_code, custom_tokenizer, pickled, endless, adapters, pickled_adapters, circle]
)
def test_a_checkpoint_runs_nothing(taught, tmp_path, ran, monkeypatch, write_config, spoil):
    """Nor does it ask whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    folder = shutil.copytree(
        taught / "checkpoint", tmp_path / "model", ignore=shutil.ignore_patterns("state")
    )
    config = write_config(tmp_path, think=False, max_new_tokens=8)
    spoil(folder, PAYLOAD.format(str(ran)))
    try:
        load_policy(str(folder))
        assert spoil is custom_tokenizer  # transformers has a class of its own for this type
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        if spoil is endless:  # 5 s are enough
            return
        with pytest.raises(UserError):
            evaluate.main([str(folder), config, "eval_limit=1"])


def test_a_fresh_answer_beats_an_unreadable_one_in_any_order(tmp_path):
    old, new = {"unreadable": True, "completion": ""}, {"completion": "read"}
    files = ("answers.jsonl", "answers.rank0.jsonl", "answers.rank1.jsonl")
    for place in range(3):
        for name in files:
            record = {"id": "a", "fingerprint": "f"} | (new if name == files[place] else old)
            (tmp_path / name).write_text(json.dumps(record) + "\n")
        assert saved_answers(tmp_path / files[0], "f")["a"]["completion"] == "read"
        assert saved_answers(tmp_path / files[0], "g") == {}
