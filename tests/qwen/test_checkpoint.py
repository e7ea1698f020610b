"""Checkpoint folders as they are on the hub load, and mean what they meant there.

The folders are written here, file by file, in the layout of the published ones: Qwen2-VL-2B (flat config.json
and tied embeddings), Qwen2.5-VL-7B (flat, untied), Qwen3-VL-8B (nested, untied). Only the sizes are tiny.
"""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import on_two_ranks
from test_model import answer_logits, copy_of, edit_json, load_error
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from vocabulary import QWEN2_TEMPLATE, QWEN3_TEMPLATE

from benchmarks.full_size import GIB, PUBLISHED, count, empty_model, groups, published_config, static_bytes
from model import encode_prompt
from prompts import COORDINATES, TextFormat, build_prompt
from qwen.checkpoint import FAMILIES, load_policy, save_policy, speed_up, write_policy
from runtime import distributed
from runtime.files import ModelError
from toy import pretrain
from video.frames import frame_size, resize

GOLDEN = Path(__file__).parent.parent / "golden"
TEMPLATES = {"qwen2_vl": QWEN2_TEMPLATE, "qwen2_5_vl": QWEN2_TEMPLATE, "qwen3_vl": QWEN3_TEMPLATE}
TIED = {"qwen2_vl": True, "qwen2_5_vl": False, "qwen3_vl": False}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PREPROCESSORS = {
    "qwen2_vl": {
        "preprocessor_config.json": {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            **CLIP,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
        }
    },
    "qwen2_5_vl": {
        "preprocessor_config.json": {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            **CLIP,
            "image_processor_type": "Qwen2_5_VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        }
    },
    "qwen3_vl": {
        "preprocessor_config.json": {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            **HALF,
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": {
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            **HALF,
            "processor_class": "Qwen3VLProcessor",
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    },
}
BUDGETS = {"qwen2_vl": (3136, 12845056), "qwen2_5_vl": (3136, 12845056), "qwen3_vl": (4096, 25165824)}


def take(config, *keys):
    return {key: getattr(config, key) for key in keys}


def hub_config(family, config):
    """config.json as published, of a config of transformers 5."""
    text, vision = config.text_config, config.vision_config
    rope = text.rope_parameters
    ids = take(config, "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    words = {
        **take(text, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        **take(text, "num_key_value_heads", "rms_norm_eps", "vocab_size", "bos_token_id", "eos_token_id"),
        **{"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "attention_dropout": 0.0},
        "rope_theta": rope["rope_theta"],
    }
    if family == "qwen3_vl":
        words |= {"head_dim": text.head_dim, "attention_bias": False, "dtype": "bfloat16"}
        words |= {"model_type": "qwen3_vl_text", "max_position_embeddings": 262144}
        sections = {"mrope_interleaved": True, "mrope_section": rope["mrope_section"], "rope_type": "default"}
        keys = ("deepstack_visual_indexes", "depth", "hidden_size", "intermediate_size", "num_heads")
        keys += ("num_position_embeddings", "out_hidden_size", "patch_size", "spatial_merge_size")
        sight = take(vision, *keys, "temporal_patch_size", "in_channels")
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "text_config": {**words, "rope_scaling": sections},
            "vision_config": {**sight, "model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh"},
            **ids,
            "tie_word_embeddings": TIED[family],
            "transformers_version": "4.57.0.dev0",
        }
    keys = ("depth", "hidden_size", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size")
    sight = {**take(vision, *keys), "in_chans": 3, "spatial_patch_size": 14}
    if family == "qwen2_vl":
        sight |= take(vision, "embed_dim", "mlp_ratio")
    else:
        sight |= take(vision, "intermediate_size", "out_hidden_size", "window_size", "fullatt_block_indexes")
        sight |= {"hidden_act": "silu", "tokens_per_second": 2}
    return {
        "architectures": [FAMILIES[family].model_class.__name__],
        "model_type": family,
        **words,
        **ids,
        "vision_token_id": 5,
        "max_position_embeddings": 32768,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": words["num_hidden_layers"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "tie_word_embeddings": TIED[family],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "vision_config": sight,
    }


def hub_names(family, model):
    """The state of a model by the names in the published files, in bfloat16."""
    state = {}
    for name, value in model.state_dict().items():
        if family != "qwen3_vl":
            name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        if not (TIED[family] and name == "lm_head.weight"):
            state[name] = value.bfloat16().contiguous()
    return state


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


@pytest.fixture(scope="session")
def originals(checkpoints, tmp_path_factory):
    """family -> (a policy, and the hub-style folder of the same weights). Both to be read only."""
    made = {}
    for family, source in checkpoints.items():
        policy = load_policy(str(source))
        model, folder = policy.model, tmp_path_factory.mktemp("hub") / family
        if not TIED[family]:
            noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(2))
            model.lm_head.weight = torch.nn.Parameter(0.2 * noise)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())

        tokenizer = pretrain.tiny_tokenizer()
        tokenizer.chat_template = TEMPLATES[family]
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        write_json(folder / "tokenizer_config.json", settings | {"chat_template": TEMPLATES[family]})
        write_json(folder / "config.json", hub_config(family, model.config))
        for name, content in PREPROCESSORS[family].items():
            write_json(folder / name, content)
        pad, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        generation = {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad], "do_sample": True}
        generation |= {"repetition_penalty": 1.05, "temperature": 1e-06, "top_k": 1}
        write_json(folder / "generation_config.json", {**generation, "transformers_version": "4.49.0"})

        state = hub_names(family, model)
        files = [f"model-0000{k + 1}-of-00003.safetensors" for k in range(3)]
        for k, file in enumerate(files):
            shard = {name: value for n, (name, value) in enumerate(state.items()) if n % 3 == k}
            save_file(shard, folder / file, metadata={"format": "pt"})
        size = sum(value.numel() * 2 for value in state.values())
        weight_map = {name: files[n % 3] for n, name in enumerate(state)}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
        made[family] = policy, folder
    return made


@pytest.fixture(params=FAMILIES)
def original(request, originals):
    """(family, policy, folder) for each in turn."""
    return request.param, *originals[request.param]


def some_frames(policy, count=5, rows=2, columns=3):
    size = (count, rows * policy.size_factor, columns * policy.size_factor, 3)
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------------------
# What loads


@torch.no_grad()
def test_a_hub_folder_is_the_original_model(original):
    """No weight is missing or left over; logits are equal to the last bit; the files' settings are read."""
    family, policy, folder = original
    model, found = FAMILIES[family].model_class.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    names = (folder / "model.safetensors.index.json").read_text()
    assert ('"model.visual.' in names) == (family == "qwen3_vl") and ('"lm_head' in names) != TIED[family]

    loaded = load_policy(str(folder))
    prompt, ids = encode_prompt(loaded, some_frames(loaded), "a dog", (1000, 1000), 2.0), [9, 10, 11, 12]
    assert torch.equal(answer_logits(loaded, prompt, ids), answer_logits(policy, prompt, ids))
    assert answer_logits(loaded, prompt, ids)[:, 9].std() > 0.01
    tied = loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    assert tied == TIED[family]
    assert loaded.eos_ids == sorted(loaded.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert loaded.pixel_budget == BUDGETS[family] and loaded.preprocessors == PREPROCESSORS[family]
    assert loaded.size_factor == (32 if family == "qwen3_vl" else 28)
    ropes = [p.model.config.text_config.rope_parameters for p in (loaded, policy)]
    assert all(ropes[0][key] == value for key, value in ropes[1].items())


def test_weights_in_bfloat16_stay_as_they_are(original):
    family, policy, folder = original
    loaded = load_policy(str(folder), dtype=torch.bfloat16)
    weights, expected = hub_names(family, loaded.model), hub_names(family, policy.model)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_a_saved_hub_checkpoint_keeps_its_files(original, tmp_path):
    _, _, folder = original
    policy = load_policy(str(folder))
    save_policy(policy, tmp_path / "out")
    again = load_policy(str(tmp_path / "out"))
    assert again.preprocessors == policy.preprocessors and again.pixel_budget == policy.pixel_budget
    assert again.tokenizer.chat_template == policy.tokenizer.chat_template
    prompts = [encode_prompt(p, some_frames(p), "a dog", (1000, 1000), 2.0) for p in (policy, again)]
    logits = [answer_logits(p, prompts[0], [9, 10]) for p in (policy, again)]
    assert torch.equal(*logits) and torch.equal(prompts[0].ids, prompts[1].ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_bit_identical_to_hf(originals, family):
    """By the files of the folder alone: what HF's video processor made of the same frames (tests/golden)."""
    golden = np.load(GOLDEN / f"{'qwen3_vl' if family == 'qwen3_vl' else 'qwen2_5_vl'}.npz")
    policy = load_policy(str(originals[family][1]))
    frames = resize(golden["frames"], frame_size(160, 90, 336, policy.size_factor))
    values, grid = policy.patches(frames)
    assert grid.tolist() == golden["video_grid_thw"].tolist()
    assert (values - torch.from_numpy(golden["pixel_values_videos"])).abs().max() == 0


def test_the_file_about_videos_wins(originals, tmp_path):
    """As in transformers: first what release 5 saves, then video_preprocessor_config.json, then the old one,
    each as a whole."""
    folder = copy_of(originals["qwen3_vl"][1], tmp_path / "three")
    old, video = folder / "preprocessor_config.json", folder / "video_preprocessor_config.json"
    edit_json(old, image_mean=[0.1, 0.2, 0.3])
    assert load_policy(str(folder)).image_mean == (0.5, 0.5, 0.5)
    edit_json(video, image_mean=[0.4, 0.5, 0.6], size={"shortest_edge": 5, "longest_edge": 7})
    policy = load_policy(str(folder))
    assert policy.image_mean == (0.4, 0.5, 0.6) and policy.pixel_budget == (5, 7)
    write_json(folder / "processor_config.json", {"processor_class": "Qwen3VLProcessor"})
    assert load_policy(str(folder)).image_mean == (0.4, 0.5, 0.6)
    nested = {"image_mean": [0.7, 0.8, 0.9], "size": {"shortest_edge": 1, "longest_edge": 2}}
    write_json(folder / "processor_config.json", {"image_processor": {}, "video_processor": nested})
    policy = load_policy(str(folder))
    assert policy.image_mean == (0.7, 0.8, 0.9) and policy.pixel_budget == (1, 2)
    assert policy.image_std == (0.5, 0.5, 0.5)  # of the family: the other files are not asked
    save_policy(policy, tmp_path / "out")
    assert load_policy(str(tmp_path / "out")).preprocessors == policy.preprocessors
    for file in (video, folder / "processor_config.json"):
        file.unlink()
    assert load_policy(str(folder)).image_mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("content", "budget"),
    [
        ({}, (0, float("inf"))),
        ({"min_pixels": 3136, "max_pixels": 200704}, (3136, 200704)),
        ({"min_pixels": 4, "max_pixels": None, "size": {"shortest_edge": 1, "longest_edge": 9}}, (4, 9)),
        ({"size": {"min_pixels": 3136, "max_pixels": 12845056}}, (3136, 12845056)),  # of early saves
        ({"size": None, "max_pixels": 100}, (0, 100)),
    ],
)
def test_ways_of_saying_a_pixel_budget(originals, tmp_path, content, budget):
    folder = copy_of(originals["qwen2_5_vl"][1], tmp_path / "budget")
    write_json(folder / "preprocessor_config.json", content)
    assert load_policy(str(folder)).pixel_budget == budget


def test_the_family_table():
    """Qwen2.5-VL was taught pixels, the others a grid of 1000 (their reports; research on 2D grounding)."""
    spoken = {family.name: family.coordinates for family in FAMILIES.values()}
    assert spoken == {"Qwen2-VL": "norm1000", "Qwen2.5-VL": "resized", "Qwen3-VL": "norm1000"}
    assert set(spoken.values()) <= set(COORDINATES)


# ----------------------------------------------------------------------------------------------------------
# What is written


def tensors_of(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


WRITTEN = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
WRITTEN += ["tokenizer.json", "tokenizer_config.json"]


def check_stock(folder, family, dtype, policy):
    """Stock transformers reads an export without a word about its dtype, as the same model."""
    assert sorted(path.name for path in folder.iterdir()) == sorted([*WRITTEN, *PREPROCESSORS[family]])
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [FAMILIES[family].model_class.__name__]
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    for loader in (AutoModelForImageTextToText, FAMILIES[family].model_class):
        stock, found = loader.from_pretrained(folder, output_loading_info=True)
        assert type(stock) is FAMILIES[family].model_class
        assert {parameter.dtype for parameter in stock.parameters()} == {dtype}
        assert not found["missing_keys"] and not found["unexpected_keys"]
    assert (stock.lm_head.weight is stock.get_input_embeddings().weight) == TIED[family]
    assert stock.generation_config.to_diff_dict() == policy.model.generation_config.to_diff_dict()
    theirs = replace(policy, model=stock.float())
    speed_up(stock)  # which rounds otherwise
    prompt, ids = encode_prompt(policy, some_frames(policy), "a dog", (1000, 1000), 2.0), [9, 10, 11, 12]
    with torch.no_grad():
        logits = [answer_logits(p, prompt, ids) for p in (theirs, policy)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_a_written_policy_is_what_transformers_saves(original, tmp_path):
    """Byte for byte, in a folder that is made; where it computes in bfloat16, the weights rounded to that."""
    family, _, folder = original
    policy = load_policy(str(folder))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    write_policy(policy, tmp_path / "new" / "ours")
    check_stock(tmp_path / "new" / "ours", family, torch.float32, policy)
    policy.model.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs").iterdir():
        assert path.read_bytes() == (tmp_path / "new" / "ours" / path.name).read_bytes(), path.name

    policy.compute, before = torch.bfloat16, policy.model.config.to_dict()
    write_policy(policy, tmp_path / "half")
    assert policy.model.config.to_dict() == before
    full, half = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "half")
    assert full.keys() == half.keys()
    for name, value in half.items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, full[name].bfloat16())
    assert not torch.equal(full["lm_head.weight" if not TIED[family] else name], half[name].float())
    check_stock(tmp_path / "half", family, torch.bfloat16, load_policy(str(tmp_path / "half")))
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}  # these were not rounded


def test_a_policy_in_the_dtype_of_its_files(original, checkpoints):
    family, _, folder = original
    for checkpoint, dtype in ((folder, torch.bfloat16), (checkpoints[family], torch.float32)):
        policy = load_policy(str(checkpoint), dtype="auto")
        assert {p.dtype for p in policy.model.parameters()} == {policy.compute} == {dtype}


def export_job(rank, folder, originals):
    for family, checkpoint in originals.items():
        for compute in (torch.float32, torch.bfloat16):
            policy = replace(load_policy(checkpoint, dtype="auto"), compute=compute)
            distributed.shard(policy.model, policy.blocks, compute)
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.mul_(2)
            save = write_policy if family == "qwen2_vl" else save_policy
            save(policy, folder / f"{family}_{compute}")
    (folder / "file").write_text("")
    messages = []
    for save in (write_policy, save_policy):
        with pytest.raises(ModelError) as caught:
            save(policy, folder / "file" / "out")
        messages.append(str(caught.value))
    return messages


def test_export_from_two_ranks(originals, tmp_path):
    """Every tensor, by its name on the hub; an error of the one that writes is the error of both."""
    folders = {family: str(folder) for family, (_, folder) in originals.items()}
    first, second = on_two_ranks(export_job, tmp_path, folders)
    assert first == second
    for message in first:
        assert message.startswith(f"{tmp_path}/file/out: cannot be written (") and "Not a dir" in message
    for family, folder in folders.items():
        published = tensors_of(Path(folder))
        for compute in (torch.float32, torch.bfloat16):
            written = tensors_of(tmp_path / f"{family}_{compute}")
            assert written.keys() == published.keys()
            for name, value in written.items():
                assert value.dtype == compute and torch.equal(value, 2 * published[name].to(compute)), name
            policy = load_policy(folder)
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.mul_(2)
            check_stock(tmp_path / f"{family}_{compute}", family, compute, policy)
    assert {path.name for path in tmp_path.iterdir()} >= {"file", "qwen2_vl_torch.float32"}
    assert not list(tmp_path.glob("*.tmp"))


# How vLLM reads a checkpoint: hf_to_vllm_mapper of vllm/model_executor/models/qwen2_vl.py, qwen2_5_vl.py and
# qwen3_vl.py, applied rule after rule (WeightsMapper._map_name in models/utils.py) ...
_BOTH = {
    "model.language_model.": "language_model.model.",  # "saved after transformers v4.52"
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",  # "original checkpoint"
    "model.": "language_model.model.",
}
VLLM_RULES = {
    "qwen2_vl": _BOTH,
    "qwen2_5_vl": _BOTH,
    "qwen3_vl": {key: _BOTH[key] for key in ("model.visual.", "lm_head.", "model.language_model.")},
}
# ... and what its modules are called: qwen2.py, qwen3.py and the vision transformers of those files.
_LINEAR, _W = r"\.(weight|bias)", r"\.weight"
_WORDS = [
    rf"language_model\.lm_head{_W}",
    rf"language_model\.model\.(embed_tokens|norm){_W}",
    rf"language_model\.model\.layers\.\d+\.((input|post_attention)_layernorm|self_attn\.o_proj){_W}",
    rf"language_model\.model\.layers\.\d+\.mlp\.(gate|up|down)_proj{_W}",
]
_QWEN2 = [rf"language_model\.model\.layers\.\d+\.self_attn\.[qkv]_proj{_LINEAR}"]
_QWEN2 += [rf"visual\.patch_embed\.proj{_W}", rf"visual\.merger\.mlp\.[02]{_LINEAR}"]
VLLM_NAMES = {
    "qwen2_vl": [
        *_WORDS,
        *_QWEN2,
        rf"visual\.blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]){_LINEAR}",
        rf"visual\.merger\.ln_q{_LINEAR}",
    ],
    "qwen2_5_vl": [
        *_WORDS,
        *_QWEN2,
        rf"visual\.blocks\.\d+\.norm[12]{_W}",
        rf"visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj){_LINEAR}",
        rf"visual\.merger\.ln_q{_W}",
    ],
    "qwen3_vl": [
        *_WORDS,
        rf"language_model\.model\.layers\.\d+\.self_attn\.([qkv]_proj|[qk]_norm){_W}",
        rf"visual\.patch_embed\.proj{_LINEAR}",
        rf"visual\.pos_embed{_W}",
        rf"visual\.blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.linear_fc[12]){_LINEAR}",
        rf"visual\.(merger|deepstack_merger_list\.\d+)\.(norm|linear_fc[12]){_LINEAR}",
    ],
}


def test_names_and_shapes_are_what_vllm_reads(original, tmp_path):
    family, _, folder = original
    policy = load_policy(str(folder))
    write_policy(policy, tmp_path / "out")
    tensors, mapped, used = tensors_of(tmp_path / "out"), {}, set()
    assert tensors.keys() == tensors_of(folder).keys()  # those of the hub
    for name, value in tensors.items():
        for prefix, new in VLLM_RULES[family].items():
            name = new + name.removeprefix(prefix) if name.startswith(prefix) else name
        mapped[name] = tuple(value.shape)
        (pattern,) = (p for p in VLLM_NAMES[family] if re.fullmatch(p, name))
        used.add(pattern)
    assert len(mapped) == len(tensors)
    unused = set(VLLM_NAMES[family]) - used
    assert unused == ({VLLM_NAMES[family][0]} if TIED[family] else set())  # no lm_head where it is tied

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    words, sight = config["text_config"], config["vision_config"]
    heads, groups, width = words["num_attention_heads"], words["num_key_value_heads"], words["hidden_size"]
    size = words.get("head_dim") or width // heads
    layer = f"language_model.model.layers.{words['num_hidden_layers'] - 1}"
    assert mapped[f"{layer}.self_attn.q_proj.weight"] == (heads * size, width)
    assert mapped[f"{layer}.self_attn.k_proj.weight"] == (groups * size, width)
    assert mapped[f"{layer}.mlp.down_proj.weight"] == (width, words["intermediate_size"])
    assert mapped["language_model.model.embed_tokens.weight"] == (words["vocab_size"], width)
    assert f"language_model.model.layers.{words['num_hidden_layers']}.mlp.down_proj.weight" not in mapped
    inner = sight["embed_dim"] if family == "qwen2_vl" else sight["hidden_size"]
    patch = (3, sight["temporal_patch_size"], sight["patch_size"], sight["patch_size"])
    assert mapped["visual.patch_embed.proj.weight"] == (inner, *patch)
    assert mapped[f"visual.blocks.{sight['depth'] - 1}.attn.qkv.weight"] == (3 * inner, inner)


# ----------------------------------------------------------------------------------------------------------
# What does not


def change(file, *keys, to):
    """A spoiler of a folder: sets one value of a JSON file."""

    def spoil(folder):
        content = inner = json.loads((folder / file).read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        write_json(folder / file, content)

    return spoil


def template(text):
    return change("tokenizer_config.json", "chat_template", to=text)


def rename_token(old, new):
    def spoil(folder):
        for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
            path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))

    return spoil


CONFIG, GENERATION = "config.json", "generation_config.json"
OLD, VIDEO = "preprocessor_config.json", "video_preprocessor_config.json"
BLOCK = "<|vision_start|><|video_pad|><|vision_end|>"
SAY = "{{ messages[0]['content'][1]['text'] }}"
OPEN = "{{ '<|im_start|>assistant\n' }}"
Q2, Q25, Q3 = FAMILIES
SPOILED = [  # family, what is done to its folder, what the message says
    (
        Q25,
        change(OLD, "patch_size", to=16),
        "patch_size is 16 in its preprocessor, but 14 in its config.json",
    ),
    (Q25, change(OLD, "merge_size", to=1), "merge_size is 1 in its preprocessor, but 2 in its config.json"),
    (Q2, change(OLD, "temporal_patch_size", to=1), "temporal_patch_size is 1 in its preprocessor, but 2 in"),
    (Q3, change(VIDEO, "patch_size", to=14), "patch_size is 14 in its preprocessor, but 16 in its config"),
    (Q3, change(VIDEO, "image_std", to="1"), "image_std in its preprocessor is '1', not [red, green, blue]"),
    (
        Q2,
        change(OLD, "min_pixels", to=10**8),
        "says {'min_pixels': 100000000, 'max_pixels': 12845056}, which",
    ),
    (Q2, change(OLD, "max_pixels", to="1"), "'max_pixels': '1'}, which is no range of pixels; fetch"),
    (Q3, change(VIDEO, "size", to=[1, 2]), "its preprocessor says {'size': [1, 2]}, which is no range"),
    (
        Q25,
        change(CONFIG, "video_token_id", to=8),
        "video_token_id in its config.json is 8, but <|video_pad|> is",
    ),
    (
        Q3,
        change(CONFIG, "vision_start_token_id", to=0),
        "vision_start_token_id in its config.json is 0, but <",
    ),
    (
        Q2,
        change(CONFIG, "vision_end_token_id", to=0),
        "is 0, but <|vision_end|> is 4 in its tokenizer; fetch",
    ),
    (
        Q25,
        change(CONFIG, "vision_config", "tokens_per_second", to=0),
        "tokens_per_second in its config.json is 0",
    ),
    (Q25, change(CONFIG, "vision_config", "tokens_per_second", to=-2), "is -2, not above 0; fetch"),
    (Q2, rename_token("<|video_pad|>", "<|film|>"), "the tokenizer lacks the tokens <|video_pad|>; use"),
    (Q3, rename_token("<|im_end|>", "<|stop|>"), "the tokenizer lacks the tokens <|im_end|>; use"),
    (
        Q3,
        change(GENERATION, "eos_token_id", to="2"),
        "eos_token_id in its generation_config.json is '2', not",
    ),
    (
        Q25,
        change(GENERATION, "eos_token_id", to=[2, 9999]),
        "generation_config.json is [2, 9999], not tokens of",
    ),
    (
        Q2,
        change(CONFIG, "vocab_size", to=298),
        "vocab_size in its config.json is 298, but its tokenizer goes up",
    ),
    (Q25, template("{{ messages[0]['content'] + '!' }}"), "cannot render a video (TypeError: "),  # text only
    (Q25, template("{% for m in messages %}"), "cannot render a video (TemplateSyntaxError: "),
    (Q25, template("{{ raise_exception('no') }}"), "cannot render a video (TemplateError: no); use"),
    (
        Q25,
        template(f"{SAY}{OPEN}"),
        "renders 'What happens?<|im_start|>assistant\\n', not one <|vision_start|>",
    ),
    (Q25, template(f"{BLOCK}{BLOCK}{SAY}{OPEN}"), f"renders '{BLOCK}{BLOCK}What happens?"),
    (Q25, template(f"<|video_pad|>{BLOCK}{SAY}{OPEN}"), f"renders '<|video_pad|>{BLOCK}What happens?"),
    (Q25, template(f"{SAY}{BLOCK}{OPEN}"), f"renders 'What happens?{BLOCK}<|im_start|>assistant\\n', not"),
    (Q25, template(f"{BLOCK}{SAY}"), f"renders '{BLOCK}What happens?', not one {BLOCK}, the text, and"),
    (
        Q3,
        template(f"{BLOCK}{SAY}{OPEN}<think>"),
        "assistant\\n<think>', not one",
    ),  # of "Thinking" checkpoints
]


@pytest.mark.parametrize(("family", "spoil", "said"), SPOILED, ids=[said[:40] for *_, said in SPOILED])
def test_folders_that_contradict_themselves_are_refused(originals, tmp_path, family, spoil, said):
    """In one line that names the folder and the value found, before the weights are read."""
    weights = ["model.safetensors.index.json", *(f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3))]
    folder = copy_of(originals[family][1], tmp_path / "spoiled", leave_out=weights)
    assert "does not load" in load_error(folder) and "model.safetensors" in load_error(folder)
    spoil(folder)
    message = load_error(folder)
    assert said in message and message.startswith(f"model: {str(folder)!r}: ")


@pytest.mark.parametrize("name", ["processor_config.json", OLD, VIDEO, GENERATION])
def test_broken_files_are_refused(originals, tmp_path, name):
    """transformers would pass over the last of them in silence, and with it over an end of the answer."""
    folder = copy_of(originals[Q3][1], tmp_path / "broken")
    for content, said in (
        ("{", f"its {name} cannot be read (JSONDecodeError: "),
        ("[]", "is no JSON object"),
    ):
        (folder / name).write_text(content)
        assert said in load_error(folder) and name in load_error(folder)


@pytest.mark.parametrize(
    ("model_type", "hint"),
    [
        ("qwen3_vl_moe", " (a mixture of experts, with which nothing here was tried)"),
        ("qwen3_5", " (Qwen3.5's linear-attention layers cannot score answers under a tree mask)"),
        ("qwen3_5_moe", " (Qwen3.5's linear-attention layers cannot score answers under a tree mask)"),
        ("qwen2_5_omni", ""),
        ("llava", ""),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, model_type, hint):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert f"is a '{model_type}'{hint}; use one of qwen2_vl, qwen2_5_vl, qwen3_vl, for" in load_error(
        tmp_path
    )


def test_a_family_that_transformers_does_not_know_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen9_vl"}))
    assert "`qwen9_vl`" in load_error(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# What the model is shown


@pytest.mark.parametrize(("fps", "count"), [(2.0, 5), (2.0, 8), (1.0, 1), (5.0, 33)])
def test_prompts_are_the_chat_template_token_by_token(originals, fps, count):
    """Put together by hand from the published templates, without one."""
    for family, (_, folder) in originals.items():
        policy = load_policy(str(folder))

        def ids(text, policy=policy):
            return policy.tokenizer(text, add_special_tokens=False)["input_ids"]

        marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
        begin, end, start, stop, pad = policy.tokenizer.convert_tokens_to_ids(list(marks))
        text = build_prompt("the dog runs", count, (1000, 1000), TextFormat(fps=fps))
        grids = (count + 1) // 2
        if family == "qwen3_vl":
            # The form of transformers 4.57 and vLLM. 5.23 has these blocks between one more <|vision_start|>
            # and <|vision_end|>; its times are the same.
            expected, video = [], []
            times = Qwen3VLProcessor._calculate_timestamps(None, list(range(count)), fps, 2)
            for time in times:
                video += [*ids(f"<{time:.1f} seconds>"), start, *([pad] * 6), stop]
            assert len(times) == grids
        else:
            expected = [begin, *ids("system\nYou are a helpful assistant."), end, *ids("\n")]
            video = [start, *([pad] * 6 * grids), stop]
        expected += [begin, *ids("user\n"), *video, *ids(text), end, *ids("\n"), begin, *ids("assistant\n")]
        prompt = encode_prompt(policy, some_frames(policy, count), text, (1000, 1000), fps)
        assert prompt.ids.tolist() == expected, family


def warned(policy, count, height, width):
    """The warnings of two prompts with frames of that size."""
    frames = torch.zeros(count, height, width, 3, dtype=torch.uint8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for length in (count, count - 1):
            encode_prompt(policy, frames[:length], "a dog", (1000, 1000), 2.0)
    return [str(warning.message) for warning in caught]


def test_frames_outside_the_pixel_budget_are_reported_once(originals):
    """The budget of Qwen2.5-VL is of a frame, that of Qwen3-VL of the whole video."""
    policy = load_policy(str(originals["qwen2_5_vl"][1]))
    assert warned(policy, 4, 56, 56) == warned(policy, 60, 28, 336) == []
    assert warned(policy, 4, 28, 84) == [
        "84 x 28 pixels: below the 3,136 to 12,845,056 of a frame that this checkpoint was shown; raise"
        " max_side, unless training is to get it used to such"
    ]
    small = replace(policy, pixel_budget=(3136, 10000))
    (message,) = warned(small, 4, 112, 112)
    assert message.startswith(
        "112 x 112 pixels: above the 3,136 to 10,000 of a frame that this checkpoint was"
    )

    policy = load_policy(str(originals["qwen3_vl"][1]))
    assert warned(policy, 4, 32, 32) == []  # 4 frames of 1,024, or 3 and a copy: just enough
    (message,) = warned(policy, 2, 32, 32)
    assert message.startswith(
        "32 x 32 pixels of less than 4.0 frames: below the 4,096 to 25,165,824 of a video"
    )
    policy = replace(policy, pixel_budget=(4096, 40000))
    assert warned(policy, 9, 64, 64) == [
        "64 x 64 pixels of more than 9.8 frames: above the 4,096 to 40,000 of a video that this checkpoint"
        " was shown; lower max_side, or fps, unless training is to get it used to such"
    ]
    (message,) = warned(policy, 12, 64, 64)  # 12 frames and 11: one message


# ----------------------------------------------------------------------------------------------------------
# The published sizes


@pytest.mark.parametrize(
    ("name", "layer", "root", "static"),
    [
        ("3b", 77_076_992, 349_380_864, (62.9, 31.5, 15.7, 7.9)),
        ("7b", 233_057_792, 1_136_078_080, (139.0, 69.5, 34.8, 17.4)),
        ("qwen3-8b", 192_946_432, 1_409_585_536, (147.0, 73.5, 36.7, 18.4)),
    ],
)
def test_published_sizes(name, layer, root, static):
    """Parameters of the whole and of what FSDP2 gathers, counted on the meta device; and GiB of weights,
    gradients, AdamW's moments and reference on each of 1, 2, 4 and 8 GPUs."""
    model = empty_model(published_config(name))
    assert count(model) == PUBLISHED[name][1]
    sizes = {what.split()[0]: (number, size) for what, number, size in groups(model)}
    assert sizes["decoder"][1] == layer and sizes["root"] == (1, root)
    assert sum(number * size for number, size in sizes.values()) == count(model)
    assert [round(static_bytes(count(model), gpus) / GIB, 1) for gpus in (1, 2, 4, 8)] == list(static)
