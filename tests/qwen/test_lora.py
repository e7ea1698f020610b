"""qwen/lora.py against matrices multiplied out by hand, and against peft; two ranks against one."""

import json
import sys

import pytest
import torch
from one_by_one import (
    KEYS,
    answer_logits,
    assert_gradients_close,
    edit_json,
    gradients_of,
    ids_of,
    make_prompts,
    random_completions,
    slow_logprobs,
    with_many_ends,
)
from peft import PeftModel
from ranks import on_ranks
from safetensors.torch import load_file, save_file

from config import Lora
from model import completion_logprobs, pack_completions, rollout, with_video_features
from qwen.checkpoint import load_policy, load_tokenizer
from qwen.lora import add_adapters, base_of, without_adapters
from qwen.speed import speed_up
from runtime import distributed
from runtime.files import ModelError

# Output and input width of each layer of the tiny language models.
WIDTHS = {"q_proj": (48, 48), "k_proj": (24, 48), "v_proj": (24, 48), "o_proj": (48, 48)}
WIDTHS |= {"gate_proj": (96, 48), "up_proj": (96, 48), "down_proj": (48, 96)}
SOME = Lora(rank=3, alpha=6.0, targets=["q_proj", "down_proj"])
FILES = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]
FILES += ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]


def adapters_of(policy):
    return {name: p for name, p in policy.model.named_parameters() if "lora_" in name}


def adapted(policy, lora=SOME):
    """The policy with adapters that do something."""
    add_adapters(policy.model, lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapters_of(policy).items():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


@torch.no_grad()
def logits_of(policy):
    return answer_logits(policy, make_prompts(policy)[0], [11, 12, 13, 14])


def test_adapters_begin_as_nothing(policy):
    """In the language model alone, though the vision tower of Qwen2.5-VL has layers of the same names."""
    before, random = logits_of(policy), torch.get_rng_state()
    add_adapters(policy.model, Lora(rank=4, alpha=8.0, targets=list(WIDTHS)))
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(logits_of(policy), before)
    adapters = adapters_of(policy)
    assert len(adapters) == 2 * len(WIDTHS) * 2  # layers of the language model, A and B
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == (name in adapters)
    for name, parameter in adapters.items():
        assert name.startswith("model.language_model.layers.")
        out, into = WIDTHS[name.split(".")[-4]]
        assert parameter.shape == ((4, into) if "lora_A" in name else (out, 4))
        assert (parameter == 0).all() == ("lora_B" in name)


def test_a_seed_gives_the_same_adapters(checkpoints):
    """In float32 on weights in bfloat16, whatever a rank has drawn before."""
    made = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        policy = load_policy(str(checkpoints["qwen2_5_vl"]), dtype=torch.bfloat16)
        add_adapters(policy.model, SOME, seed)
        assert {p.dtype for p in adapters_of(policy).values()} == {torch.float32}
        assert policy.model.lm_head.weight.dtype == torch.bfloat16
        made.append(torch.cat([p.flatten() for p in adapters_of(policy).values()]))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_adapters_add_alpha_over_rank_b_a(policy, checkpoints):
    """W + (alpha / rank) B A multiplied out in a model without adapters, which they are when switched off."""
    plain = load_policy(str(checkpoints[policy.model.config.model_type]))
    before, weights = logits_of(plain), dict(plain.model.named_parameters())
    after = logits_of(adapted(policy))
    trained = [p.requires_grad for p in policy.model.parameters()]
    with pytest.raises(KeyError), without_adapters(policy):
        assert torch.equal(logits_of(policy), before)
        assert [p.requires_grad for p in policy.model.parameters()] == trained
        raise KeyError
    assert torch.equal(logits_of(policy), after)
    with torch.no_grad():
        for name, a in adapters_of(policy).items():
            if "lora_A" in name:
                b = adapters_of(policy)[name.replace("lora_A", "lora_B")]
                weights[name.replace("lora_A.default.", "")] += 6.0 / 3 * b @ a
    torch.testing.assert_close(after, logits_of(plain), rtol=0, atol=1e-4)
    assert (after - before).nan_to_num().abs().max() > 0.5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_adapters_equal_one_at_a_time(policy, checkpointing):
    """The packed forward on video features, and the reference in between, which changes nothing."""
    adapted(policy)
    prompts, completions = make_prompts(policy), random_completions(policy)
    slow = torch.cat(slow_logprobs(policy, prompts, completions, 0.9))
    weights = torch.randn(len(slow), generator=torch.Generator().manual_seed(0))
    (weights * slow).sum().backward()
    expected = gradients_of(policy)
    assert expected.keys() == adapters_of(policy).keys()
    policy.model.zero_grad()
    if checkpointing:
        policy.model.activation_checkpointing_enable()
    policy.model.train()
    packed = pack_completions(policy, with_video_features(policy, prompts), completions)
    logprobs = completion_logprobs(policy, packed, 0.9)
    with torch.no_grad(), without_adapters(policy):
        reference = completion_logprobs(policy, packed, 0.9)
        base = torch.cat(slow_logprobs(policy, prompts, completions, 0.9))
    torch.testing.assert_close(reference[packed.mask], base, rtol=0, atol=5e-5)
    assert (reference - logprobs).abs().max() > 0.1
    (weights * logprobs[packed.mask]).sum().backward()
    assert_gradients_close(gradients_of(policy), expected, 2e-5)


def test_saved_adapters_are_those_of_peft(policy, tmp_path):
    """PeftModel.from_pretrained on stock transformers gives the same logits; load_policy's are equal to the
    last bit. What it saves again is the same, byte for byte."""
    base, folder, stock = policy.model.name_or_path, tmp_path / "out", type(policy.model)
    adapted(policy, Lora(rank=3, alpha=5.0, targets=list(WIDTHS))).save(folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert base_of(str(folder)) == base and base_of(base) == base
    expected = logits_of(policy)
    again = load_policy(str(folder))
    assert again.preprocessors == policy.preprocessors and again.eos_ids == policy.eos_ids
    assert torch.equal(logits_of(again), expected)
    assert load_tokenizer(str(folder))[0].get_vocab() == policy.tokenizer.get_vocab()
    again.save(tmp_path / "again")
    for name in FILES:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name

    theirs = stock.from_pretrained(base, dtype=torch.float32)
    speed_up(theirs)  # which rounds otherwise
    policy.model = PeftModel.from_pretrained(theirs, str(folder))
    torch.testing.assert_close(logits_of(policy), expected, rtol=0, atol=1e-5)

    settings = json.loads((folder / "adapter_config.json").read_text())  # vLLM refuses others than these
    assert settings["modules_to_save"] is None and not settings["use_dora"] and settings["bias"] == "none"
    kinds = {name: "self_attn" if name in list(WIDTHS)[:4] else "mlp" for name in WIDTHS}
    layers = [f"model.language_model.layers.{k}.{kinds[name]}.{name}" for k in (0, 1) for name in WIDTHS]
    assert load_file(folder / "adapter_model.safetensors").keys() == {
        f"base_model.model.{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"
    }


def test_the_base_is_found_from_anywhere(checkpoints, tmp_path, monkeypatch):
    """Though the model was named by a path that holds only in one place."""
    monkeypatch.chdir(checkpoints["qwen2_5_vl"].parent)
    policy = adapted(load_policy("qwen2_5_vl"))
    policy.save(tmp_path / "new" / "out")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits_of(load_policy("new/out")), logits_of(policy))


def edit(**changes):
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


def spoil(change):
    path = "adapter_model.safetensors"
    return lambda folder: save_file(change(load_file(folder / path)), folder / path)


LEFT_OVER = {"base_model.model.lm_head.more.lora_A.weight": torch.zeros(3, 48)}


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("'/gone' .the base in .*adapter_config.json. does not load", edit(base_model_name_or_path="/gone")),
        ("write base_model_name_or_path into", edit(base_model_name_or_path=None)),
        # Never in part, which transformers would only warn about.
        ("1, such as model.language", spoil(lambda state: dict(list(state.items())[1:]))),
        ("1, such as .*lm_head.more", spoil(lambda state: state | LEFT_OVER)),
        ("does not load: RuntimeError", edit(r=2)),
    ],
)
def test_broken_adapters_are_refused(qwen2_5, tmp_path, says, change):
    adapted(qwen2_5).save(tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(ModelError, match=says):
        load_policy(str(tmp_path / "out"))


@pytest.mark.parametrize("target", ["lm_head", "qkv", "query", "layers"])
def test_unknown_targets_are_refused(qwen2_5, target):
    """The head, a layer of the vision tower, nothing, and a module that is no layer."""
    with pytest.raises(ModelError, match=f"'{target}'; use q_proj, k_proj, v_proj"):
        add_adapters(qwen2_5.model, Lora(rank=4, targets=["q_proj", target]))
    assert not qwen2_5.has_adapters


def test_peft_is_needed_for_adapters_alone(qwen2_5, tmp_path, monkeypatch):
    adapted(qwen2_5).save(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "peft", None)
    fresh = load_policy(qwen2_5.model.name_or_path)
    with without_adapters(fresh):
        pass
    for use in (lambda: add_adapters(fresh.model, SOME), lambda: load_policy(str(tmp_path / "out"))):
        with pytest.raises(ModelError, match="pip install peft=="):
            use()


COMPLETIONS = [[[9, 20, 31], [40, 41]], [[17] * 7]]
SHARES = ([1], [0, 2])  # of the prompts, for sampling: unequal


def learn(policy, prompts, chosen, ranks):
    """Log-probs of the answers to the chosen prompts, now and without adapters; and gradients of this rank's
    part of the mean over tokens. FSDP2 averages over the ranks."""
    packed = pack_completions(policy, [prompts[k] for k in chosen], [COMPLETIONS[k] for k in chosen])
    logprobs = completion_logprobs(policy, packed, 1.0)
    with torch.no_grad(), without_adapters(policy):
        reference = completion_logprobs(policy, packed, 1.0)
    policy.model.zero_grad()
    (logprobs.square().sum() / 12 * ranks).backward()
    return torch.stack([logprobs.detach()[packed.mask], reference[packed.mask]]), gradients_of(policy)


def sample(policy, prompts, chosen):
    keys = [KEYS[k] for k in chosen]
    return ids_of(rollout(with_many_ends(policy), [prompts[k] for k in chosen], 2, 12, 1.0, keys))


def on_one_of_two(checkpoint, dtype, lora, folder):
    rank, _ = distributed.init()
    policy = load_policy(checkpoint, dtype)
    if lora:
        adapted(policy)
    policy.model.model.visual.requires_grad_(False)
    distributed.shard(policy.model, policy.blocks, dtype)
    policy.model.activation_checkpointing_enable()
    policy.model.train()
    visits = []
    policy.model.model.visual.register_forward_hook(lambda *_: visits.append(1))
    prompts = with_video_features(policy, make_prompts(policy))  # together, sharded as it is
    with distributed.unsharded(policy.model):
        samples = sample(policy, prompts, SHARES[rank])
    scores = learn(policy, prompts, [rank], 2)
    policy.save(folder / "two")
    return samples, *scores, len(visits)


CASES = [("qwen2_5_vl", torch.float32, True), ("qwen2_5_vl", torch.bfloat16, True)]
CASES += [("qwen2_vl", torch.float32, False), ("qwen3_vl", torch.float32, False)]


@pytest.mark.parametrize(("family", "dtype", "lora"), CASES)
def test_two_ranks_are_one(checkpoints, tmp_path, family, dtype, lora):
    """The same samples, scores and gradients as in one process; the same files; a frozen tower runs once."""
    checkpoint = str(checkpoints[family])
    results = on_ranks(2, on_one_of_two, checkpoint, dtype, lora, tmp_path)
    policy = load_policy(checkpoint, dtype)
    if lora:
        adapted(policy)
    policy.model.model.visual.requires_grad_(False)
    policy.save(tmp_path / "one")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    again = load_policy(str(tmp_path / "two"), dtype)  # as it will be evaluated
    policy.autocast = dtype == torch.bfloat16  # how one process mixes adapters in fp32 with the others
    scores, gradients = learn(policy, with_video_features(policy, make_prompts(policy)), [0, 1], 1)
    torch.testing.assert_close(torch.cat([r[1] for r in results], 1), scores, rtol=0, atol=2e-5)
    assert (scores[0] - scores[1]).abs().max() > 0.5 or not lora
    for rank, (samples, _, found, visits) in enumerate(results):
        assert samples == sample(again, make_prompts(again), SHARES[rank]) and visits == 1
        # In bf16 each rank's gradients are rounded before they are added.
        assert_gradients_close(found, gradients, 1e-6 if dtype == torch.float32 else 5e-3)
