"""What several tests need: tiny Qwen-VLs with random weights, saved as checkpoint folders, and a small world.

Nothing here is a mock. The models are the classes of transformers with everything small, and load_policy
reads them as it reads the real ones; the world is files of the real formats.
"""

import contextlib
import json
import os
import resource

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub is a wrong test

import numpy as np
import pytest
import tiny_runs
import torch
import yaml
from hypothesis import settings
from transformers import AutoConfig, AutoModelForImageTextToText

from qwen.checkpoint import load_policy
from toy.pretrain import tiny_tokenizer
from toy.world import NATIVE_FPS, draw_objects, hcstvg_record, make_world, render, write_y4m

torch.set_num_threads(1)
settings.register_profile("default", max_examples=50, deadline=None)
settings.register_profile("slow", max_examples=1000, deadline=None)  # pytest --hypothesis-profile=slow
settings.load_profile("default")

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]}
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "rope_parameters": ROPE}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1}
TOWER = {"spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "depth": 2}
LATER = {**TOWER, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 48}
# as in the published checkpoints, whose tokens_per_second is not the default of the class
WINDOWS = {"tokens_per_second": 2, "window_size": 56, "fullatt_block_indexes": [1]}
DEEPSTACK = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
INTERLEAVED = {"head_dim": 24, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
FAMILIES = {  # -> (vision tower, decoder)
    "qwen2_vl": ({"patch_size": 14, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2, **TOWER}, TEXT),
    "qwen2_5_vl": ({"patch_size": 14, **LATER, **WINDOWS}, TEXT),
    "qwen3_vl": ({"patch_size": 16, **LATER, **DEEPSTACK}, {**TEXT, **INTERLEAVED}),
}


def save_checkpoint(family, folder):
    """A checkpoint folder of one family: random weights, so large that the logits differ by O(1)."""
    vision, text = FAMILIES[family]
    tokenizer = tiny_tokenizer()
    id_of = tokenizer.convert_tokens_to_ids
    marks = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = {f"{mark.removesuffix('_pad')}_token_id": id_of(f"<|{mark}|>") for mark in marks}
    ends = id_of(["<|im_end|>", "<|endoftext|>"])
    text = {**text, "vocab_size": len(tokenizer), "eos_token_id": ends[0]}
    text |= dict.fromkeys(("bos_token_id", "pad_token_id"), ends[1])
    ids |= {"text_config": text, "vision_config": vision}
    config = AutoConfig.for_model(family, tie_word_embeddings=True, **ids)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel()
                parameter.normal_(0, 0.25 if "embed_tokens" in name else 1.5 / fan_in**0.5)
    # What the published checkpoints say; all of it but the end tokens would make the sampler another policy.
    model.generation_config.update(
        eos_token_id=ends, do_sample=True, repetition_penalty=1.05, top_k=1, top_p=0.001, temperature=0.1
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"patch_size": vision["patch_size"], "merge_size": 2, "temporal_patch_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """family -> checkpoint folder. To be read only."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: save_checkpoint(family, folder / family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def policy(request, checkpoints):
    """A fresh policy of each family in turn."""
    return load_policy(str(checkpoints[request.param]))


@pytest.fixture
def qwen2_5(checkpoints):
    """A fresh policy of the paper's family, for what does not depend on the family."""
    return load_policy(str(checkpoints["qwen2_5_vl"]))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder of six clips with HC-STVG annotations. To be read only."""
    folder = tmp_path_factory.mktemp("world")
    records = {}
    for n in range(6):
        objects = draw_objects(np.random.default_rng((7, n)))
        write_y4m(folder / f"{n}.y4m", render(objects, NATIVE_FPS), NATIVE_FPS)
        records[f"{n}.y4m"] = hcstvg_record(objects[0])
    (folder / "all.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory):
    """The folder of the whole toy world, as train.py makes it. To be read only."""
    folder = tmp_path_factory.mktemp("toy_world")
    make_world(folder)
    return folder


@pytest.fixture(scope="session")
def write_config(world, checkpoints):
    """write_config(folder, key=value, ...) -> folder/config.yaml: a tiny run on that world, in folder/run."""

    def write(folder, **changes):
        settings = {"model": str(checkpoints["qwen2_5_vl"]), "output_dir": str(folder / "run")}
        settings |= dict.fromkeys(("train_annotations", "eval_annotations"), str(world / "all.json"))
        settings |= {"videos": str(world), "max_side": 56, "time_unit": "second", "max_new_tokens": 24}
        settings |= {"num_generations": 4, "batch_size": 2, "steps": 2, "learning_rate": 1e-3}
        settings |= {"rollout_batch": 2, "micro_batch": 2, "eval_batch": 6, "precision": "fp32"}
        settings |= {"threads": 1, "video_workers": 0, **changes}
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def full_disk():
    """with full_disk(): files of more than a few bytes cannot be written (EFBIG, where a full disk says
    ENOSPC); as there, the error that the system gives names no file."""

    @contextlib.contextmanager
    def limit():
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    return limit


@pytest.fixture(scope="session")
def taught(tmp_path_factory, write_config):
    """The folder of a supervised run: its checkpoint answers about that world, mostly in the right form."""
    import train

    folder = tmp_path_factory.mktemp("taught")
    sft = {"steps": 36, "learning_rate": 7e-3, "batch_size": 6}
    changes = {"steps": 0, "rollout_batch": 6, "micro_batch": 6, "gradient_checkpointing": False}
    with tiny_runs.no_pictures():
        train.main([write_config(folder, **tiny_runs.SHORT, sft=sft, **changes)])
    return folder / "run"


@pytest.fixture(scope="session")
def grpo_config(taught, write_config):
    """write_config for a run of tiny_runs.GRPO that begins with the taught checkpoint."""
    return lambda folder, **changes: write_config(
        folder, **{"model": str(taught / "checkpoint"), **tiny_runs.GRPO, **changes}
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory, grpo_config):
    """The folder of a finished run of tiny_runs.GRPO that nothing has happened to. To be read only."""
    import train

    folder = tmp_path_factory.mktemp("finished")
    with tiny_runs.no_pictures():
        train.main([grpo_config(folder, save_every=2)])
    return folder / "run"


@pytest.fixture(scope="module")
def without_pictures():
    with tiny_runs.no_pictures():
        yield
