"""Checkpoint folders as they are on the hub load, and mean what they meant there; others read what is saved.

The folders are written here, file by file, in the layout of the published ones: Qwen2-VL-2B (flat config.json
and tied embeddings), Qwen2.5-VL-7B (flat, untied), Qwen3-VL-8B (nested, untied). Only the sizes are tiny.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from one_by_one import answer_logits, edit_json, some_frames
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from vocabulary import QWEN2_TEMPLATE, QWEN3_TEMPLATE

from model import encode_prompt
from prompts import TextFormat, build_prompt
from qwen.checkpoint import FAMILIES, load_policy
from runtime import distributed
from runtime.files import ModelError
from toy import pretrain
from video.frames import frame_size, resize

GOLDEN = Path(__file__).parent.parent / "golden"
Q2, Q25, Q3 = FAMILIES
TEMPLATES = {Q2: QWEN2_TEMPLATE, Q25: QWEN2_TEMPLATE, Q3: QWEN3_TEMPLATE}
TIED = {Q2: True, Q25: False, Q3: False}
CONFIG, GENERATION, SETTINGS = "config.json", "generation_config.json", "tokenizer_config.json"
SAVED, VIDEO, OLD = "processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SIZES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
FLAT = {"min_pixels": 3136, "max_pixels": 12845056, **SIZES, **CLIP}
NESTED = {**SIZES, "patch_size": 16, **HALF}
PREPROCESSORS = {
    Q2: {OLD: FLAT | {"image_processor_type": "Qwen2VLImageProcessor"}},
    Q25: {OLD: FLAT | {"image_processor_type": "Qwen2_5_VLImageProcessor"}},
    Q3: {
        OLD: NESTED | {"size": {"longest_edge": 16777216, "shortest_edge": 65536}},
        VIDEO: NESTED | {"size": {"longest_edge": 25165824, "shortest_edge": 4096}},
    },
}


def take(config, keys):
    return {key: getattr(config, key) for key in keys.split()}


def hub_config(family, config):
    """config.json as published, of a config of transformers 5."""
    text, vision, rope = config.text_config, config.vision_config, config.text_config.rope_parameters
    whole = take(config, "image_token_id video_token_id vision_start_token_id vision_end_token_id")
    whole |= {"architectures": [FAMILIES[family].model_class.__name__], "model_type": family}
    whole |= {"tie_word_embeddings": TIED[family], "transformers_version": "4.41.2"}
    words = take(text, "hidden_size intermediate_size num_hidden_layers num_attention_heads")
    words |= take(text, "num_key_value_heads rms_norm_eps vocab_size bos_token_id eos_token_id")
    words |= {"hidden_act": "silu", "use_cache": True, "rope_theta": rope["rope_theta"]}
    sight = take(vision, "depth hidden_size num_heads patch_size spatial_merge_size temporal_patch_size")
    sections = {"mrope_section": rope["mrope_section"]}
    if family == Q3:
        words |= {"head_dim": text.head_dim, "attention_bias": False, "dtype": "bfloat16"}
        words |= {"model_type": "qwen3_vl_text", "max_position_embeddings": 262144}
        words["rope_scaling"] = {"mrope_interleaved": True, "rope_type": "default", **sections}
        sight |= take(vision, "deepstack_visual_indexes intermediate_size num_position_embeddings")
        sight |= take(vision, "out_hidden_size in_channels") | {"model_type": "qwen3_vl"}
        sight |= {"hidden_act": "gelu_pytorch_tanh"}
        return {**whole, "text_config": words, "vision_config": sight}
    if family == Q2:
        sight |= take(vision, "embed_dim mlp_ratio")
    else:
        sight |= take(vision, "intermediate_size out_hidden_size window_size fullatt_block_indexes")
        sight |= {"hidden_act": "silu", "tokens_per_second": 2}
    sight |= {"in_chans": 3, "spatial_patch_size": 14}
    words |= {"max_position_embeddings": 32768, "use_sliding_window": False, "torch_dtype": "bfloat16"}
    return {**whole, **words, "rope_scaling": {"type": "mrope", **sections}, "vision_config": sight}


def hub_names(family, model):
    """The state of a model by the names in the published files, in bfloat16."""
    state = {}
    for name, value in model.state_dict().items():
        if family != Q3:
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
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink()
        edit_json(folder / SETTINGS, chat_template=TEMPLATES[family])
        write_json(folder / CONFIG, hub_config(family, model.config))
        for name, content in PREPROCESSORS[family].items():
            write_json(folder / name, content)
        pad, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        generation = {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad], "do_sample": True}
        write_json(folder / GENERATION, {**generation, "repetition_penalty": 1.05, "top_k": 1})

        state = hub_names(family, model)
        files = [f"model-0000{k + 1}-of-00003.safetensors" for k in range(3)]
        for k, file in enumerate(files):
            shard = {name: value for n, (name, value) in enumerate(state.items()) if n % 3 == k}
            save_file(shard, folder / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": sum(2 * value.numel() for value in state.values())}}
        index["weight_map"] = {name: files[n % 3] for n, name in enumerate(state)}
        write_json(folder / "model.safetensors.index.json", index)
        made[family] = policy, folder
    return made


@pytest.fixture(params=FAMILIES)
def original(request, originals):
    """(family, policy, folder) for each in turn."""
    return request.param, *originals[request.param]


def logits_of(policy, like=None):
    """Of four tokens after a prompt; of the policy's own, or of the prompt that `like` would show."""
    prompt = encode_prompt(like or policy, some_frames(policy), "a dog", (1000, 1000), 2.0)
    with torch.no_grad():
        return answer_logits(policy, prompt, [9, 10, 11, 12])


def test_a_hub_folder_is_the_original_model(original):
    """No weight is missing or left over; logits are equal to the last bit; the files' settings are read."""
    family, policy, folder = original
    _, found = FAMILIES[family].model_class.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    loaded = load_policy(str(folder))
    assert torch.equal(logits_of(loaded), logits_of(policy, loaded)) and logits_of(policy)[:, 9].std() > 0.01
    assert (loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight) == TIED[family]
    assert loaded.eos_ids == sorted(loaded.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert loaded.preprocessors == PREPROCESSORS[family]
    assert loaded.size_factor == (32 if family == Q3 else 28)
    ropes = [p.model.config.text_config.rope_parameters for p in (loaded, policy)]
    assert all(ropes[0][key] == value for key, value in ropes[1].items())
    half = load_policy(str(folder), dtype="auto")  # as they are
    assert {p.dtype for p in half.model.parameters()} == {half.compute} == {torch.bfloat16}
    weights, expected = hub_names(family, half.model), hub_names(family, policy.model)
    assert weights.keys() == expected.keys() == tensors_of(folder).keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


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
    folder = copytree(originals[Q3][1], tmp_path / "three")
    edit_json(folder / OLD, image_mean=[0.1, 0.2, 0.3])
    assert load_policy(str(folder)).image_mean == (0.5, 0.5, 0.5)
    edit_json(folder / VIDEO, image_mean=[0.4, 0.5, 0.6], size={"shortest_edge": 5, "longest_edge": 7})
    write_json(folder / SAVED, {"processor_class": "Qwen3VLProcessor"})
    policy = load_policy(str(folder))
    assert policy.image_mean == (0.4, 0.5, 0.6)
    nested = {"image_mean": [0.7, 0.8, 0.9], "size": {"min_pixels": 1, "max_pixels": 2}}  # of early saves
    write_json(folder / SAVED, {"image_processor": {}, "video_processor": nested})
    policy = load_policy(str(folder))
    assert policy.image_mean == (0.7, 0.8, 0.9)
    assert policy.image_std == (0.5, 0.5, 0.5)  # of the family: the other files are not asked
    policy.save(tmp_path / "out")
    assert load_policy(str(tmp_path / "out")).preprocessors == policy.preprocessors
    for file in (VIDEO, SAVED):
        (folder / file).unlink()
    write_json(folder / OLD, {"image_mean": [0.1, 0.2, 0.3]})
    policy = load_policy(str(folder))
    assert policy.image_mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(("fps", "count"), [(2.0, 5), (1.0, 1), (5.0, 33)])
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


def tensors_of(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def check_stock(folder, family, dtype, policy):
    """Stock transformers reads a saved policy as the same model."""
    config = json.loads((folder / CONFIG).read_text())
    assert config["architectures"] == [FAMILIES[family].model_class.__name__]
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    stock, found = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(stock) is FAMILIES[family].model_class
    assert {parameter.dtype for parameter in stock.parameters()} == {dtype}
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert (stock.lm_head.weight is stock.get_input_embeddings().weight) == TIED[family]
    assert stock.generation_config.to_diff_dict() == policy.model.generation_config.to_diff_dict()
    theirs = replace(policy, model=stock.float())
    torch.testing.assert_close(logits_of(theirs), logits_of(policy), rtol=0, atol=1e-5)


def test_a_saved_policy_is_what_transformers_saves(original, tmp_path):
    """Byte for byte; where it computes in bfloat16, the weights rounded to that."""
    family, _, folder = original
    policy = load_policy(str(folder))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.save(tmp_path / "new" / "ours")
    check_stock(tmp_path / "new" / "ours", family, torch.float32, policy)
    policy.model.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs").iterdir():
        assert path.read_bytes() == (tmp_path / "new" / "ours" / path.name).read_bytes(), path.name
    again = load_policy(str(tmp_path / "new" / "ours"))
    assert torch.equal(logits_of(again), logits_of(policy))
    assert again.preprocessors == policy.preprocessors and again.eos_ids == policy.eos_ids
    assert again.tokenizer.chat_template == policy.tokenizer.chat_template

    policy.compute, before = torch.bfloat16, policy.model.config.to_dict()
    policy.save(tmp_path / "half")
    assert policy.model.config.to_dict() == before
    full, half = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "half")
    assert full.keys() == half.keys()
    for name, value in half.items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, full[name].bfloat16())
    check_stock(tmp_path / "half", family, torch.bfloat16, load_policy(str(tmp_path / "half")))
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}  # these were not rounded


def save_sharded(folder, originals):
    for family, checkpoint in originals.items():
        for compute in (torch.float32, torch.bfloat16):
            policy = replace(load_policy(checkpoint, dtype="auto"), compute=compute)
            distributed.shard(policy.model, policy.blocks, compute)
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.mul_(2)
            policy.save(folder / f"{family}_{compute}")
    (folder / "file").write_text("")
    with pytest.raises(ModelError, match=r"file/out: cannot be written \(.*Not a directory"):
        policy.save(folder / "file" / "out")


def test_two_ranks_save_every_tensor(originals, tmp_path):
    """By its name on the hub; an error of the one that writes is the error of both."""
    folders = {family: str(folder) for family, (_, folder) in originals.items()}
    on_ranks(2, save_sharded, tmp_path, folders)
    for family, folder in folders.items():
        published = tensors_of(Path(folder))
        for compute in (torch.float32, torch.bfloat16):
            written = tensors_of(tmp_path / f"{family}_{compute}")
            assert written.keys() == published.keys()
            for name, value in written.items():
                assert value.dtype == compute and torch.equal(value, 2 * published[name].to(compute)), name


def change(file, *keys, **changes):
    return lambda folder: edit_json(folder / file, *keys, **changes)


def template(text):
    return change(SETTINGS, chat_template=text)


def lacks(token):
    def rename(folder):
        for path in (folder / "tokenizer.json", folder / SETTINGS):
            path.write_text(path.read_text().replace(f'"{token}"', '"<|other|>"'))

    return rename


def damage(file, content=b"{"):
    return lambda folder: (folder / file).write_bytes(content)


BLOCK, SAY = "<|vision_start|><|video_pad|><|vision_end|>", "{{ messages[0]['content'][1]['text'] }}"
OPEN, QUANTIZED = "{{ '<|im_start|>assistant\n' }}", {"quant_method": "awq", "bits": 4, "group_size": 128}
WEIGHTS = "model-00001-of-00003.safetensors"
SPOILED = [  # family, what is done to its folder, what the message says
    (Q25, change(OLD, patch_size=16), "patch_size is 14 in its config.json, but 16 in its preprocessor"),
    (Q3, change(VIDEO, temporal_patch_size=1), "temporal_patch_size is 2 .* but 1"),
    (Q25, change(CONFIG, video_token_id=8), "video_token_id is 8 .* but 7 in its tokenizer"),
    (Q2, lacks("<|video_pad|>"), "lacks .*video_pad"),
    (Q25, change(CONFIG, quantization_config=QUANTIZED), "quantized"),
    (Q25, change(SETTINGS, chat_template=None), "template gives 'an error: ValueError"),
    (
        Q25,
        template("{{ messages[0]['content'] + '!' }}"),
        "template gives 'an error: TypeError",
    ),  # it knows text only
    (Q25, template(f"{SAY}{OPEN}"), "template gives 'What happens"),
    (Q25, template(f"{BLOCK}{BLOCK}{SAY}{OPEN}"), "not <.vision_start"),
    (Q25, template(f"{BLOCK}{SAY}"), "not <.vision_start"),
    (Q25, template("{{ 1 / 0 }}"), "template gives .an error: ZeroDivisionError: division by zero., not"),
    (Q25, template("{{ range(10**9) }}"), "template gives .an error: OverflowError: .{50,66}, not"),
    (
        Q25,
        template("{% set r = range(99999) %}" + "{% for _ in r %}" * 3 + "{% endfor %}" * 3),
        "nothing within",
    ),
    (Q25, template("{{ 'x' * 20001 }}"), "template gives .an error: more than 20000 characters., not"),
    (Q25, template("{{ 'x' * 200000000000 }}"), "template gives .an error: MemoryError., not"),
    (Q3, template(f"{BLOCK}{SAY}{OPEN}<think>"), "<think>', not"),  # of "Thinking" checkpoints
    (Q3, damage(CONFIG), "good config.json"),
    (Q3, damage(GENERATION), "does not load: JSONDecodeError"),  # transformers passes over it in silence
    (Q25, damage("tokenizer.json"), "does not load: "),
    (Q25, damage(WEIGHTS, b"8"), "does not load: SafetensorError"),
    # transformers would fill what it does not find, or finds in another shape, with random numbers.
    (Q25, change(CONFIG, intermediate_size=64), "do not fit .*mlp.down_proj"),
    (Q3, change(CONFIG, "text_config", num_hidden_layers=3), r"do not fit .*layers\.2\."),
]


@pytest.mark.parametrize(("family", "spoil", "says"), SPOILED, ids=[says[:30] for *_, says in SPOILED])
def test_folders_that_would_train_wrong_are_refused(originals, tmp_path, family, spoil, says):
    """In one line that names the folder and a remedy."""
    folder = copytree(originals[family][1], tmp_path / "spoiled")
    spoil(folder)
    with pytest.raises(ModelError, match=says) as caught:
        load_policy(str(folder))
    assert re.fullmatch(f"model: '{folder}' does not load: .*; [^;\n]*", str(caught.value))


@pytest.mark.parametrize(("model_type", "says"), [("qwen3_5", "not supported yet"), ("llava", "llava'; use")])
def test_other_families_are_refused_by_name(tmp_path, model_type, says):
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match=says):
        load_policy(str(tmp_path))


def test_what_is_no_folder(tmp_path):
    """A hub id that is not in the cache, offline; and a path."""
    with pytest.raises(ModelError, match="no network, or HF_HUB_OFFLINE"):
        load_policy("Qwen/Qwen2.5-VL-7B-Instruct")
    with pytest.raises(ModelError, match=r"nothing' does not load: .* nor a hub id"):
        load_policy(str(tmp_path / "nothing"))
