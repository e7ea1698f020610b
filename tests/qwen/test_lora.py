"""LoRA: adapters.py against matrices multiplied out by hand, and against peft; two ranks against one."""

import json
import os
import socket
import sys
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_model import (
    KEYS,
    LENGTHS,
    answer_logits,
    ids_of,
    make_prompts,
    random_completions,
    slow_logprobs,
    with_many_ends,
)

from config import Lora
from model import completion_logprobs, pack_completions, rollout, with_video_features
from qwen.checkpoint import load_policy, load_tokenizer, save_policy, speed_up, write_policy
from qwen.lora import add_adapters, base_of, has_adapters, without_adapters
from runtime import distributed
from runtime.files import ModelError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = Lora(rank=3, alpha=6.0, targets=["q_proj", "down_proj"])
IDS = [11, 12, 13, 14]  # of an answer


def adapters_of(policy):
    return {name: p for name, p in policy.model.named_parameters() if "lora_" in name}


def adapted(policy, lora=SOME):
    """The policy with adapters that do something."""
    add_adapters(policy, lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapters_of(policy).items():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


@torch.no_grad()
def logits_of(policy):
    return answer_logits(policy, make_prompts(policy)[0], IDS)


# ----------------------------------------------------------------------------------------------------------
# The adapters


def test_adapters_begin_as_nothing(policy):
    """In the language model alone, though the vision tower of Qwen2.5-VL has layers of the same names."""
    before, random = logits_of(policy), torch.get_rng_state()
    add_adapters(policy, Lora(rank=4, alpha=8.0, targets=ALL))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(logits_of(policy), before)
    adapters = adapters_of(policy)
    assert len(adapters) == 2 * len(ALL) * 2  # layers of the language model, A and B
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == (name in adapters)
    widths = {"q_proj": (48, 48), "k_proj": (24, 48), "v_proj": (24, 48), "o_proj": (48, 48)}  # out, in
    widths |= {"gate_proj": (96, 48), "up_proj": (96, 48), "down_proj": (48, 96)}
    for name, parameter in adapters.items():
        assert name.startswith("model.language_model.layers.")
        out, into = widths[name.split(".")[-4]]
        assert parameter.shape == ((4, into) if "lora_A" in name else (out, 4))
        assert (parameter == 0).all() == ("lora_B" in name)


def test_adapters_are_the_same_on_every_rank(checkpoints):
    """And in float32 on weights in bfloat16; another seed gives others."""
    made = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # what a rank has drawn before does not matter
        policy = load_policy(str(checkpoints["qwen2_5_vl"]), dtype=torch.bfloat16)
        add_adapters(policy, SOME, seed)
        assert {p.dtype for p in adapters_of(policy).values()} == {torch.float32}
        assert policy.model.lm_head.weight.dtype == torch.bfloat16
        made.append(torch.cat([p.flatten() for p in adapters_of(policy).values()]))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_adapters_add_alpha_over_rank_b_a(policy, checkpoints):
    """W + (alpha / rank) B A multiplied out in a model without adapters; and with others it would differ."""
    adapted(policy)
    plain = load_policy(str(checkpoints[policy.model.config.model_type]))
    before, weights = logits_of(plain), dict(plain.model.named_parameters())
    with torch.no_grad():
        for name, a in adapters_of(policy).items():
            if "lora_A" in name:
                b = adapters_of(policy)[name.replace("lora_A", "lora_B")]
                weights[name.replace("lora_A.default.", "")] += 6.0 / 3 * b @ a
    expected = logits_of(plain)
    torch.testing.assert_close(logits_of(policy), expected, rtol=0, atol=1e-4)
    assert (expected - before).nan_to_num().abs().max() > 0.5


def test_without_adapters_a_policy_is_its_base(policy):
    base = logits_of(policy)
    adapted(policy)
    after = logits_of(policy)
    assert not torch.equal(after, base)
    trained = [p.requires_grad for p in policy.model.parameters()]
    with pytest.raises(KeyError), without_adapters(policy):
        assert torch.equal(logits_of(policy), base)
        assert [p.requires_grad for p in policy.model.parameters()] == trained
        raise KeyError
    assert torch.equal(logits_of(policy), after)


def test_without_adapters_there_is_nothing_to_switch_off(qwen2_5, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # nor need it be installed
    before = logits_of(qwen2_5)
    with without_adapters(qwen2_5):
        assert torch.equal(logits_of(qwen2_5), before)


@pytest.mark.parametrize("target", ["lm_head", "qkv", "query", "layers"])
def test_unknown_targets_are_refused(qwen2_5, target):
    """The head, a layer of the vision tower, nothing, and a module that is no layer."""
    with pytest.raises(ModelError) as caught:
        add_adapters(qwen2_5, Lora(rank=4, targets=["q_proj", target]))
    said = f"lora: targets: {target!r} is no linear layer of this language model; name some of"
    assert str(caught.value) == f"{said} {', '.join(sorted(ALL))}"
    assert not has_adapters(qwen2_5)


def test_peft_is_needed_for_adapters_alone(qwen2_5, tmp_path, monkeypatch):
    adapted(qwen2_5)
    save_policy(qwen2_5, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "peft", None)
    fresh = load_policy(qwen2_5.model.name_or_path)
    for use in (lambda: add_adapters(fresh, SOME), lambda: load_policy(str(tmp_path / "out"))):
        with pytest.raises(ModelError) as caught:
            use()
        assert str(caught.value) == "LoRA needs the package peft: pip install peft==0.21.2"


def test_adapters_on_adapters_are_refused(qwen2_5):
    add_adapters(qwen2_5, SOME)
    with pytest.raises(ModelError, match="has adapters already; set `model` to their base"):
        add_adapters(qwen2_5, SOME)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_adapters_equal_one_at_a_time(policy, checkpointing):
    """The packed forward, its video encoded before, and the reference in between, which changes nothing."""
    adapted(policy)
    prompts, completions = make_prompts(policy), random_completions(policy, LENGTHS)
    slow = torch.cat(slow_logprobs(policy, prompts, completions, 0.9))
    weights = torch.randn(len(slow), generator=torch.Generator().manual_seed(0))
    parameters = adapters_of(policy)
    gradients = torch.autograd.grad((weights * slow).sum(), parameters.values())
    expected = dict(zip(parameters, gradients, strict=True))

    if checkpointing:
        policy.model.activation_checkpointing_enable()
    policy.model.train()
    batch = pack_completions(policy, with_video_features(policy, prompts), completions)
    logprobs = completion_logprobs(policy, batch, 0.9)
    with torch.no_grad(), without_adapters(policy):
        reference = completion_logprobs(policy, batch, 0.9)
        base = torch.cat(slow_logprobs(policy, prompts, completions, 0.9))
    torch.testing.assert_close(reference[batch.mask], base, rtol=0, atol=5e-5)
    assert (reference - logprobs).abs().max() > 0.1
    (weights * logprobs[batch.mask]).sum().backward()
    size = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    for name, parameter in policy.model.named_parameters():
        if name not in parameters:
            assert parameter.grad is None
            continue
        assert (parameter.grad - expected[name]).norm() <= 2e-5 * size and expected[name].norm() > 0, name


# ----------------------------------------------------------------------------------------------------------
# Checkpoints of adapters


FILES = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]
FILES += ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def saved(qwen2_5, tmp_path):
    save_policy(adapted(qwen2_5), tmp_path / "out")
    return tmp_path / "out"


def test_saved_adapters_are_those_of_peft(policy, tmp_path):
    """PeftModel.from_pretrained of stock transformers and peft: the same logits; and load_policy's are equal
    to the last bit. What it saves again is the same, byte for byte."""
    base, folder = policy.model.name_or_path, tmp_path / "out"
    stock = type(policy.model)
    save_policy(adapted(policy, Lora(rank=3, alpha=5.0, targets=ALL)), folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert base_of(str(folder)) == base and base_of(base) == base
    expected = logits_of(policy)

    again = load_policy(str(folder))
    assert again.preprocessors == policy.preprocessors and again.eos_ids == policy.eos_ids
    assert torch.equal(logits_of(again), expected)
    assert load_tokenizer(str(folder))[0].get_vocab() == policy.tokenizer.get_vocab()
    save_policy(again, tmp_path / "again")
    for name in FILES:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name

    theirs = stock.from_pretrained(base, dtype=torch.float32)
    speed_up(theirs)  # which rounds otherwise
    policy.model = PeftModel.from_pretrained(theirs, str(folder))
    torch.testing.assert_close(logits_of(policy), expected, rtol=0, atol=1e-5)


def test_the_base_is_found_from_anywhere(checkpoints, tmp_path, monkeypatch):
    """Though the model was named by a path that holds only in one place."""
    monkeypatch.chdir(checkpoints["qwen2_5_vl"].parent)
    policy = adapted(load_policy("qwen2_5_vl"))
    write_policy(policy, tmp_path / "new" / "out")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits_of(load_policy("new/out")), logits_of(policy))


def error_of(folder):
    with pytest.raises(ModelError) as caught:
        load_policy(str(folder))
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_base_that_is_not_there_is_named(saved, tmp_path):
    edit(saved / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    message = error_of(saved)
    assert f"model: '{tmp_path}/gone' is neither a checkpoint folder" in message
    assert f"the base of the adapters in '{saved}': base_model_name_or_path in their" in message
    for bad in (None, "", 5):
        edit(saved / "adapter_config.json", base_model_name_or_path=bad)
        assert "adapter_config.json names no base_model_name_or_path; write" in error_of(saved)
    (saved / "adapter_config.json").write_text("{")
    assert "names no base_model_name_or_path" in error_of(saved)
    edit_base = {"base_model_name_or_path": str(saved)}  # adapters on adapters
    (saved / "adapter_config.json").write_text(json.dumps(edit_base))
    assert "neither a checkpoint folder" in error_of(saved)


def test_broken_adapters_are_refused(saved):
    """Never in part, which peft would do in silence."""
    path, settings = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    state, before = load_file(path), settings.read_text()
    name, *others = state
    save_file({other: state[other] for other in others}, path)
    message = error_of(saved)
    assert f"'{saved}': its adapter_model.safetensors does not fit its adapter_config.json and its" in message
    assert "base: model.language_model." in message and "does not load" not in message
    save_file({**state, name.replace("down_proj", "lm_head"): torch.zeros(3, 48)}, path)
    assert "does not fit its adapter_config.json and its base: " in error_of(saved)
    edit(settings, r=2)
    assert "does not load: RuntimeError" in error_of(saved)
    settings.write_text(before)
    path.write_bytes(path.read_bytes()[:1000])
    assert "does not load: SafetensorError" in error_of(saved)
    path.unlink()
    assert "does not load: FileNotFoundError" in error_of(saved)
    other = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    settings.write_text(json.dumps({**other, "base_model_name_or_path": base_of(str(saved))}))
    assert "holds" in error_of(saved) and "only LoRA is known here" in error_of(saved)


# vLLM: Qwen2_5_VLForConditionalGeneration.hf_to_vllm_mapper (vllm/model_executor/models/qwen2_5_vl.py; that
# of Qwen2-VL is the same, that of Qwen3-VL lacks "model."), applied to what follows "base_model.model."
# (vllm/lora/utils.py, parse_fine_tuned_lora_name); and the layers that it packs (packed_modules_mapping).
VLLM = {"model.language_model.": "language_model.model.", "model.visual.": "visual."}
VLLM |= {"lm_head.": "language_model.lm_head."}


def test_saved_adapters_are_named_as_vllm_reads_them(policy, tmp_path):
    save_policy(adapted(policy, Lora(rank=3, targets=ALL)), tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(ALL) and settings["r"] == 3 and settings["lora_alpha"] == 32
    # PEFTHelper of vllm/lora/peft_helper.py refuses these.
    assert settings["modules_to_save"] is None and not settings["use_dora"] and settings["bias"] == "none"
    found = set()
    for name in load_file(tmp_path / "out" / "adapter_model.safetensors"):
        assert name.startswith("base_model.model.")
        name = name.removeprefix("base_model.model.")
        for prefix, new in VLLM.items():
            name = new + name.removeprefix(prefix) if name.startswith(prefix) else name
        *module, matrix, kind = name.split(".")
        assert kind == "weight"
        found.add((".".join(module), matrix))
    kinds = dict.fromkeys(ALL[:4], "self_attn") | dict.fromkeys(ALL[4:], "mlp")
    assert found == {
        (f"language_model.model.layers.{layer}.{kinds[name]}.{name}", matrix)
        for layer in (0, 1)
        for name in ALL
        for matrix in ("lora_A", "lora_B")
    }


# ----------------------------------------------------------------------------------------------------------
# Two ranks


def on_two_ranks(job, folder, *arguments):
    """job(rank, folder, *arguments) in two processes that share their models. Returns what each returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_rank, (port, job, folder, arguments), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def _one_rank(rank, port, job, folder, arguments):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()})
    torch.set_num_threads(1)
    distributed.init()
    torch.save(job(rank, folder, *arguments), folder / f"rank{rank}.pt")
    distributed.barrier()
    distributed.destroy()
    # A thread of gloo frees the last tensor that was exchanged, for which it needs the interpreter; where it
    # has ended by then, that aborts the process.
    time.sleep(0.2)


COMPLETIONS = [[[9, 20, 31], [40, 41]], [[17] * 7], [[15, 16]]]
TOKENS = 12  # of the first two prompts, which are trained on


def learn(policy, prompts, chosen, ranks):
    """Log-probs of the answers to the chosen prompts, now and without adapters; and gradients of this rank's
    part of the mean over tokens. FSDP2 averages over the ranks."""
    batch = pack_completions(policy, [prompts[k] for k in chosen], [COMPLETIONS[k] for k in chosen])
    logprobs = completion_logprobs(policy, batch, 1.0)
    with torch.no_grad(), without_adapters(policy):
        reference = completion_logprobs(policy, batch, 1.0)
    policy.model.zero_grad()
    (logprobs.square().sum() / TOKENS * ranks).backward()
    return logprobs.detach()[batch.mask], reference[batch.mask]


def gradients_of(policy):
    named = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in named.items()}


def sample(policy, prompts, chosen):
    policy = with_many_ends(policy)
    answers = rollout(policy, [prompts[k] for k in chosen], 2, 12, 1.0, [KEYS[k] for k in chosen])
    return ids_of(answers)


SHARES = ([1], [0, 2])  # of the prompts, for sampling: unequal


def lora_job(rank, folder, checkpoint):
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        policy = adapted(load_policy(checkpoint, dtype=dtype))
        distributed.shard(policy.model, policy.blocks, dtype)
        calls = []
        policy.model.model.visual.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        policy.model.activation_checkpointing_enable()
        policy.model.train()
        prompts = make_prompts(policy)
        with distributed.unsharded(policy.model):
            prompts = with_video_features(policy, prompts)
            samples = sample(policy, prompts, SHARES[rank])
        scores = learn(policy, prompts, [rank], 2)
        results[dtype] = samples, scores, gradients_of(policy), len(calls)
        write_policy(policy, folder / str(dtype))
        save_policy(policy, folder / f"{dtype} at once")
    return results


def compare_gradients(found, expected, tolerance):
    assert found.keys() == expected.keys() and found
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32 and gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= tolerance * size, name


def test_adapters_on_two_ranks(checkpoints, tmp_path):
    """The same samples, scores and gradients as in one process; the same files; the tower runs once."""
    checkpoint = str(checkpoints["qwen2_5_vl"])
    results = on_two_ranks(lora_job, tmp_path, checkpoint)
    for dtype, values_within, gradients_within in (
        (torch.float32, 2e-5, 1e-6),
        (torch.bfloat16, 2e-5, 5e-3),  # each rank's gradients are rounded to bf16 before they are added
    ):
        policy = adapted(load_policy(checkpoint, dtype=dtype))
        save_policy(policy, tmp_path / "one")
        for folder in (str(dtype), f"{dtype} at once"):
            assert sorted(path.name for path in (tmp_path / folder).iterdir()) == FILES
            for name in FILES:
                assert (tmp_path / folder / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
        (tmp_path / "one").rename(tmp_path / f"one {dtype}")
        prompts = make_prompts(policy)
        again = load_policy(str(tmp_path / str(dtype)), dtype=dtype)  # as it will be evaluated
        for rank, (samples, *_) in enumerate(result[dtype] for result in results):
            assert samples == sample(again, prompts, SHARES[rank])

        policy.autocast = dtype == torch.bfloat16  # how one process mixes adapters in fp32 with the others
        scores = learn(policy, with_video_features(policy, prompts), [0, 1], 1)
        found = [torch.cat([result[dtype][1][kind] for result in results]) for kind in (0, 1)]
        for values, expected in zip(found, scores, strict=True):
            torch.testing.assert_close(values, expected, rtol=0, atol=values_within)
        assert (found[0] - found[1]).abs().max() > 0.5
        for result in results:
            compare_gradients(result[dtype][2], gradients_of(policy), gradients_within)
            assert result[dtype][3] == 1


def frozen_job(rank, folder, checkpoints):
    results = {}
    for family, checkpoint in checkpoints.items():
        policy = load_policy(checkpoint, dtype="auto")
        policy.model.model.visual.requires_grad_(False)
        distributed.shard(policy.model, policy.blocks, torch.float32)
        policy.model.train()
        prompts = with_video_features(policy, make_prompts(policy))  # together, sharded as it is
        results[family] = learn(policy, prompts, [rank], 2), gradients_of(policy)
    return results


def test_a_frozen_tower_on_two_ranks(checkpoints, tmp_path):
    """The gradients of the language model, in each family, as with the tower run in one process."""
    names = {family: str(folder) for family, folder in checkpoints.items()}
    results = on_two_ranks(frozen_job, tmp_path, names)
    for family, checkpoint in names.items():
        policy = load_policy(checkpoint)
        scores, _ = learn(policy, make_prompts(policy), [0, 1], 1)
        expected = {n: g for n, g in gradients_of(policy).items() if "visual" not in n}
        torch.testing.assert_close(
            torch.cat([result[family][0][0] for result in results]), scores, rtol=0, atol=2e-5
        )
        for result in results:
            compare_gradients(result[family][1], expected, 1e-6)
