"""Work out the memory that a run takes on each of 1 to 16 GPUs.

    python -m lab.memory CONFIG.yaml [key=value ...]

needs neither weights nor a GPU. Each formula names the tensors that it counts; tests/lab/test_memory.py
compares the sums with what steps and rollouts of tiny models allocate. Nothing was measured on a GPU.

Letters: L layers, H wide; A attention heads, K of them for keys and values, d wide; an MLP F wide; c bytes of
a number in the matrix products; G answers of C tokens to a prompt of P tokens; V tokens in the vocabulary.
"""

import dataclasses
import math
import os
import sys
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig

from config import Config, load_config
from data import load_samples
from qwen.checkpoint import FAMILIES
from qwen.lora import adapted_layers, base_of
from runtime.files import ModelError, run_script
from toy import world
from video.frames import frame_size

MIB, GIB = 2**20, 2**30
SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
VISION = {"hidden_size": 1280, "intermediate_size": 3420}  # of Qwen2.5-VL
PUBLISHED = {  # hub id: (model_type, SIZES, tied embeddings, vision tower); all else is transformers' default
    "Qwen/Qwen2.5-VL-3B-Instruct": ("qwen2_5_vl", (2048, 11008, 36, 16, 2, 151936), True, VISION),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("qwen2_5_vl", (3584, 18944, 28, 28, 4, 152064), False, VISION),
    "Qwen/Qwen3-VL-8B-Instruct": ("qwen3_vl", (4096, 12288, 36, 32, 8, 151936), False, {}),
}
GPUS, CAPACITIES = (1, 2, 4, 8, 16), (24, 40, 80, 141)  # how many; GiB of each
USABLE = 0.9  # of a GPU: the rest is for fragmentation, the CUDA context and NCCL
LORA_RANK = 64  # where the config has none: that of configs/hcstvg_v1_lora.yaml
CHUNK = 1024  # tokens whose logits exist at once (model.completion_logprobs)


def named_model(name: str) -> nn.Module:
    """A model without memory: of a folder, a hub id in the local cache, or PUBLISHED. Raises ModelError."""
    name = base_of(name)
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if name not in PUBLISHED:
            raise ModelError(
                f"model: {name!r} is no folder with a good config.json, not in the hub's local cache, and not"
                f" one of {', '.join(PUBLISHED)}; run: hf download {name} config.json"
            ) from error
        kind, sizes, tied, vision = PUBLISHED[name]
        text, vision = dict(zip(SIZES.split(), sizes, strict=True)), vision | {"out_hidden_size": sizes[0]}
        config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=tied)
    if config.model_type not in FAMILIES:
        raise ModelError(f"model: {name!r} is a {config.model_type!r}; use one of {', '.join(FAMILIES)}")
    with torch.device("meta"):
        return FAMILIES[config.model_type].model_class(config)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())  # tied ones once


class Lengths(NamedTuple):
    G: int  # answers to a prompt
    P: int  # tokens of the prompt, visual ones included
    C: int  # tokens of an answer
    patches: int  # that the vision tower reads


def lengths_of(config: Config, model: nn.Module) -> tuple[Lengths, str]:
    """The lengths, if every answer runs to max_new_tokens, and lines that say which clip they are of: the
    largest of train_annotations, or an assumed one where this file is not there. Raises DataError."""
    vision = model.config.vision_config

    def shown(clip: tuple[float, int, int]) -> tuple[int, int, int]:
        """(frames, width, height) that the model sees of a clip: its seconds, and the file's size."""
        size = frame_size(*clip[1:], config.max_side, vision.patch_size * vision.spatial_merge_size)
        return math.ceil(clip[0] * config.fps - 1e-6), *size

    text = 230  # tokens of chat template, question and a sentence of 20 words
    if config.toy:
        clip, text, source = (world.SECONDS, world.SIDE, world.SIDE), 40, "the toy's"
    elif os.path.isfile(config.train_annotations):
        samples, _ = load_samples(config.dataset, config.train_annotations, config.videos, config.vidor)
        clips = {(sample.num_frames / sample.fps, sample.width, sample.height) for sample in samples}
        clip, source = max(clips, key=lambda clip: math.prod(shown(clip))), "the largest in train_annotations"
    else:
        clip = (180 if config.dataset == "vidstg" else 20, 1280, 720)
        source = f"assumed, as there is no file {config.train_annotations or 'train_annotations'}"
    frames, width, height = shown(clip)
    grids = -(-frames // vision.temporal_patch_size)
    patches = grids * (width // vision.patch_size) * (height // vision.patch_size)
    visual = patches // vision.spatial_merge_size**2
    if FAMILIES[model.config.model_type].timed == "text":
        text += 9 * grids  # "<12.5 seconds>" and the marks around a block of frames
    lines = (
        f"A clip of {clip[0]:.3g} s, {source}:\n  {frames} frames of {width} x {height} at {config.fps:g} fps"
        f"; {visual:,} visual + {text} other = {visual + text:,} prompt tokens"
    )
    return Lengths(config.num_generations, visual + text, config.max_new_tokens, patches), lines


def shapes_of(model: nn.Module, c: int, frozen: bool) -> SimpleNamespace:
    """Numbers of parameters, and the bytes that a decoder layer keeps of each token, and a vision block of
    each patch, for the backward pass. frozen: only adapters are trained."""
    s, text, heads = SimpleNamespace(), model.config.text_config, model.config.vision_config.num_heads
    layers, blocks = model.model.language_model.layers, model.model.visual.blocks
    s.H, s.F, s.L, s.A, s.K = (getattr(text, size) for size in SIZES.split()[:5])
    s.d, s.blocks, s.W = layers[0].self_attn.head_dim, len(blocks), blocks[0].attn.proj.in_features
    s.total, s.tower, s.layer, s.block = map(count, (model, model.model.visual, layers[0], blocks[0]))
    s.root = s.total - count(layers) - count(blocks)  # embeddings, head, merger
    s.head, s.V = model.lm_head.weight.numel(), model.lm_head.out_features
    s.pixels = model.model.visual.patch_embed.proj.weight[0].numel()  # of a patch

    # RMSNorm: the input in fp32; for the gradient of its weight the normalised input, too; the output. A GPU
    # that has rms_norm as one kernel keeps less. Attention: queries, the output, its copy in order, its
    # normaliser; queries and keys in fp32, and normalised. MLP: gate, its activation, up, their product.
    norm, qk_norm = 4 + 4 * (not frozen) + c, hasattr(layers[0].self_attn, "q_norm")
    attention = 3 * s.A * s.d * c + 4 * s.A + qk_norm * (s.A + s.K) * s.d * (4 + c)
    s.norm, s.of_layer = norm * s.H, 2 * norm * s.H + attention + 4 * s.F * c
    # The backward pass adds the gradients of input and output, and of two inner tensors of the MLP.
    s.layer_backward = 2 * (s.F + s.H) * c
    # The vision tower's MLP is down(act(gate(x)) * up(x)), or down(act(up(x))). Attention of Qwen2.5: q, k, v
    # and the output window by window, and the output in order; of the others: q, k, what q, k and v were cut
    # from, the output frame by frame, and in one.
    gated, rms = hasattr(blocks[0].mlp, "gate_proj"), not hasattr(blocks[0].norm1, "bias")
    inner = (blocks[0].mlp.gate_proj if gated else next(blocks[0].mlp.children())).out_features
    attention = (5 if rms else 7) * s.W * c + 4 * heads
    s.of_block = 2 * s.W * (norm if rms else 2 * c) + attention + (4 if gated else 2) * inner * c
    s.block_backward = 2 * (inner + s.W) * c
    # Without gradients: patches in fp32 and cast, hidden states twice; q, k, v; q, k and four terms in fp32.
    s.block_forward = s.pixels * (4 + c) + 2 * s.W * c + s.W * (3 * c + 6 * 4)
    return s


def memory(config: Config, model: nn.Module, gpus: int, lora: bool, n=None, cpu=False) -> dict[str, float]:
    """{column of the table: bytes on each GPU}. The first four are there all the time (gradients: in training
    only), the others at their largest; `train` and `rollout` are the peaks, which can be less than the sums.

    lora: adapters on a frozen model, or all weights trained, whatever the config says. n: other Lengths. cpu:
    keys and values are not repeated for each head of the queries (qwen.attention.AnswerAttention).
    """
    (G, P, C, patches), prompts = n or lengths_of(config, model)[0], math.ceil(config.batch_size / gpus)
    rows, decoded = min(config.micro_batch, prompts), min(config.rollout_batch, prompts)  # prompts at once
    c, again = 4 if config.precision == "fp32" else 2, config.gradient_checkpointing
    sharded = gpus > 1 or (c == 2 and not lora)  # qwen.checkpoint.load_trainable
    s = shapes_of(model, c, lora)

    # Weights, gradients, Adam and reference
    frozen, inputs = s.tower if config.freeze_vision else 0, 0
    trained, every = s.total - frozen, not lora
    if lora:
        adapted = adapted_layers(model, config.lora.targets)
        inputs, outputs = sum(x.in_features for x in adapted), sum(x.out_features for x in adapted)
        trained, frozen = (config.lora.rank or LORA_RANK) * (inputs + outputs), s.total
    # What is trained is kept in fp32, the rest in c bytes; so is the reference, unless it is a copy.
    weights, own_gradients, adam = (x / gpus for x in (4 * trained + c * frozen, 4 * trained, 8 * trained))
    reference = (c * s.total / gpus if sharded else weights) if config.kl_beta and not lora else 0.0
    # Gradients that are exchanged in the last backward pass only are whole on each GPU until then.
    late = sharded and config.sync_gradients == "last" and prompts > rows
    gradients = 4 * trained if late else own_gradients

    # Buffers: whole groups of weights and gradients while they compute (FSDP2), or adapters cast by autocast
    whole = 0 if c == 4 else c * trained  # for a rollout
    in_layer, in_logits, at_end, arriving = whole, whole + 4 * s.head * every, 0, 0
    if sharded:
        whole, arriving = c * (s.total + trained * lora), c * max(s.root, s.layer)
        # The backward pass of a layer: the root, the gradient of the head; the layer as it arrived, cut into
        # weights, and its gradients; those of the layer before in fp32; the next layer, arriving.
        in_layer = c * (s.root + 3 * max(s.layer, s.block)) + every * (c * s.head + (c + 4) * s.layer)
        # That of the logits: another gradient of the head for each chunk, to be added to the first.
        in_logits = c * (s.root + s.layer + 2 * every * s.head)
        # Its end: the root, its gradients, these once more in fp32, and of their sum this GPU's part.
        at_end = (c + (4 if late else c) + 4 + 4 / gpus) * s.root * every

    # Activations. Adapters in fp32 keep inputs of their own, beside what a layer keeps of a token.
    own = max(0, inputs // s.L - 2 * s.H - s.F) if lora and not sharded and c == 2 else 0

    def passed(tokens: int, keys: int) -> tuple[int, int]:
        """What tokens keep of their forward pass, and what the backward pass through one layer adds."""
        kept, work = tokens * 2 * s.d * c, tokens * s.layer_backward  # rotary positions
        of_layer = tokens * (s.of_layer + own * c) + keys
        if again:  # with gradient checkpointing only the input of each layer is kept
            return kept + s.L * tokens * s.H * c, work + of_layer
        return kept + s.L * of_layer, work

    prefix, answers = 2 * P * s.K * s.d * c, G * C  # keys and values of a prompt in one layer
    read, reading = passed(P, prefix)
    read += P * s.norm + again * s.L * prefix  # the final norm; the keys and values for the answers
    reading += s.L * prefix  # the gradients that these have left
    if not (lora or config.freeze_vision):  # else features, made once, stand for the vision tower
        of_block = patches * s.of_block
        read += patches * s.pixels * c + s.blocks * (patches * s.W * c if again else of_block)
        reading = max(reading, patches * s.block_backward + again * of_block)
    read += whole * config.reuse_prompts * (not sharded and not again)  # each has its copy of the adapters
    # Each answer's keys and values follow the prompt's; the states that predict tokens; the mask.
    scored, work = passed(answers, 2 * G * (P + C) * (s.K if cpu else s.A) * s.d * c)
    scored += (answers * s.H + C * (P + C)) * c
    # Of one chunk: log-probabilities, their gradient and the logits', in fp32; beside them the final norm's.
    logits = 3 * 4 * min(CHUNK, rows * answers) * s.V
    passing = max(in_layer + rows * work, in_logits + logits + rows * answers * s.norm)
    passing = max(rows * (read + scored) + passing, rows * (read + reading) + in_layer)
    # Prompts that wait: all but those of the first pass; or without the next ones, beside its gradients.
    waiting = max(0, (prompts - 2 * rows) * read, (prompts - rows) * read - gradients) * config.reuse_prompts

    # A rollout: keys and values; beside them attention in fp32, a layer at a time (scores in two parts and as
    # one, softmax; keys and values), or a token's logits (as they come, in fp32; in fp64 softmax and cumsum).
    cache = prefix + 2 * answers * s.K * s.d * c
    beside = max(3 * 4 * G * s.A * (P + C) + 2 * cache * (c == 2), G * (4 + 4 + 8 + 8) * s.V)
    kept = prompts * read if config.reuse_prompts else decoded * s.L * prefix
    rolling = kept + decoded * (s.L * cache + beside)
    seeing = patches * s.block_forward * (1 if config.reuse_prompts else decoded)
    lasting = weights + adam + reference
    in_adam = 4 * trained / gpus  # the square root of all second moments at once
    return {
        **{"weights": weights, "grads": gradients, "Adam": adam, "ref.": reference},
        "buffers": max(in_layer, in_logits, at_end),
        "activ.": waiting + rows * (read + max(scored + work, reading)),
        "logits": logits,
        "KV": decoded * s.L * cache,
        "train": lasting + max(gradients + waiting + passing, own_gradients + max(at_end, in_adam)),
        "rollout": lasting + whole + max(arriving, seeing, rolling),
    }


NOTES = f"""
train, rollout: the peaks. They can be less than the sums, since activations, logits and buffers (weights in
use, and their gradients) are at their largest at different times, and KV is of rollouts only. Assumed: every
answer runs to max_new_tokens. Evaluation answers eval_batch prompts at once, which can take more.
yes: the larger peak is at most {USABLE:.0%} of the GPU; the rest is for fragmentation, CUDA and NCCL."""


def table(config: Config) -> str:
    """The derived sizes and the memory of each GPU, in lines of at most 110 columns. Raises ModelError."""
    model, rank = named_model(config.model), config.lora.rank
    (n, clip), s, rows = lengths_of(config, model), shapes_of(model, 2, False), config.micro_batch
    unit, name = (GIB, "GiB") if s.total > 1e8 else (MIB, "MiB")
    lines = [
        f"{config.model}: {s.total:,} parameters; {s.L} decoder layers of {s.layer:,},",
        f"  {s.blocks} vision blocks of {s.block:,}, and {s.root:,} for embeddings, head and merger",
        clip,
        f"To score at once: {rows} x ({n.P:,} + {n.G} answers x {n.C:,}) tokens; {config.precision},"
        f" gradient_checkpointing={config.gradient_checkpointing}",
        f"Memory of each GPU in {name}, and whether it fits one of 24 to 141 GiB; reuse_prompts="
        f"{config.reuse_prompts}, freeze_vision={config.freeze_vision}:",
    ]
    for lora, way in ((False, "last"), (False, "every"), (True, config.sync_gradients)):
        title = f"LoRA of rank {rank}" if rank else f"LoRA of rank {LORA_RANK}, as there is no lora.rank"
        title = title if lora else f"all weights, sync_gradients={way}"
        mine = lora == bool(rank) and way == config.sync_gradients
        lines += ["", title + " <- this config" * mine]
        for gpus in (gpus for gpus in GPUS if config.batch_size % gpus == 0):
            m = memory(dataclasses.replace(config, sync_gradients=way), model, gpus, lora, n)
            if gpus == 1:
                heads = "".join(f"{column:>8}" for column in m) + "".join(f"{x:>4}" for x in CAPACITIES)
                lines.append(f"GPUs prompts{heads}")
            fits = [max(m["train"], m["rollout"]) <= USABLE * size * GIB for size in CAPACITIES]
            row = "".join(f"{value / unit:8.1f}" for value in m.values())
            row += "".join(f"{'yes' if fit else '-':>4}" for fit in fits)
            lines.append(f"{gpus:4}{config.batch_size // gpus:8}{row}")
    return "\n".join(lines) + "\n" + NOTES


def main(arguments: list[str]) -> None:
    files = [word for word in arguments if "=" not in word]
    if not files or files[0].startswith("-"):
        sys.exit(__doc__.strip())
    print(table(load_config(files, [word for word in arguments if "=" in word])))


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]), "standard output")
