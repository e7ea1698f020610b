"""What a run needs of each GPU, worked out from the shapes of its model: no weights, no GPU, no network.

    python train.py CONFIG --plan

prints it for 1 to 16 GPUs, with all weights trained and with LoRA. Each formula names the tensors that it
counts; tests/test_plan.py holds the sums against what steps and rollouts on a CPU, and the sharding of FSDP2,
were seen to allocate. Nothing was measured on a GPU.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass

import torch
from transformers import AutoConfig, PreTrainedConfig

from config import Config
from qwen.checkpoint import BROKEN, EXAMPLE, FAMILIES
from qwen.lora import adapted_layers, base_of
from runtime.files import ModelError
from toy import world as toy_world
from video.frames import frame_size

MIB, GIB = 2**20, 2**30
TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
QWEN2_5 = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    **TOKENS,
    "vision_token_id": 151654,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_cache": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
}
QWEN2_5_VISION = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
PUBLISHED = {  # hub id: its config.json, number of parameters
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        {
            **QWEN2_5,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "max_window_layers": 70,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "vision_config": {**QWEN2_5_VISION, "out_hidden_size": 2048},
        },
        3_754_622_976,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        {
            **QWEN2_5,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
            "vision_config": {**QWEN2_5_VISION, "out_hidden_size": 3584},
        },
        8_292_166_656,
    ),
    "Qwen/Qwen3-VL-8B-Instruct": (
        {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            **TOKENS,
            "text_config": {
                "model_type": "qwen3_vl_text",
                "bos_token_id": 151643,
                "eos_token_id": 151645,
                "attention_bias": False,
                "attention_dropout": 0.0,
                "dtype": "bfloat16",
                "head_dim": 128,
                "hidden_act": "silu",
                "hidden_size": 4096,
                "initializer_range": 0.02,
                "intermediate_size": 12288,
                "max_position_embeddings": 262144,
                "num_attention_heads": 32,
                "num_hidden_layers": 36,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-06,
                "rope_scaling": {
                    "mrope_interleaved": True,
                    "mrope_section": [24, 20, 20],
                    "rope_type": "default",
                },
                "rope_theta": 5000000,
                "use_cache": True,
                "vocab_size": 151936,
            },
            "tie_word_embeddings": False,
            "transformers_version": "4.57.0.dev0",
            "vision_config": {
                "model_type": "qwen3_vl",
                "deepstack_visual_indexes": [8, 16, 24],
                "depth": 27,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 1152,
                "in_channels": 3,
                "initializer_range": 0.02,
                "intermediate_size": 4304,
                "num_heads": 16,
                "num_position_embeddings": 2304,
                "out_hidden_size": 4096,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        8_767_123_696,
    ),
}


# ----------------------------------------------------------------------------------------------------------
# The model


def named_model(name: str) -> torch.nn.Module:
    """The model of a checkpoint folder, of a hub id in the local cache, or of PUBLISHED, without memory for
    its parameters. The hub is not asked: offline that takes half a minute to fail. Raises ModelError."""
    name = base_of(name)
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except BROKEN as error:
        if name in PUBLISHED:
            return empty_model(PUBLISHED[name][0])
        raise ModelError(
            f"model: {name!r} is neither a folder with a good config.json, nor in the local cache of the hub,"
            f" nor one of {', '.join(PUBLISHED)}; for a hub id run: hf download {name} config.json"
        ) from error
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"model: {name!r} is a {config.model_type!r}; use one of {', '.join(FAMILIES)}, for example"
            f" {EXAMPLE}"
        )
    return _on_meta(config)


def empty_model(content: dict) -> torch.nn.Module:
    """The model of a config.json, without memory for its parameters."""
    return _on_meta(AutoConfig.for_model(**copy.deepcopy(content)))  # it changes its arguments


def _on_meta(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return FAMILIES[config.model_type].model_class(config)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())  # tied ones once


def groups(model: torch.nn.Module) -> list[tuple[str, int, int]]:
    """(name, how many, parameters of each) of what FSDP2 gathers at once: the blocks, and the rest."""
    layers, blocks = model.model.language_model.layers, model.model.visual.blocks
    rest = count(model) - count(layers) - count(blocks)
    return [
        ("decoder layer", len(layers), count(layers[0])),
        ("vision block", len(blocks), count(blocks[0])),
        ("root (embeddings, head, merger)", 1, rest),
    ]


# ----------------------------------------------------------------------------------------------------------
# The lengths

SECONDS, FILE_SIZE = 20, (1280, 720)  # of a clip: HC-STVG's duration, and any size of 16:9
PROMPT_TEXT = 230  # tokens of chat template, question and a sentence of 20 words, by Qwen's vocabulary
TOY_PROMPT_TEXT = 40  # and by the toy's, of its own sentences
TIMESTAMP = 9  # tokens of "<12.5 seconds>" and of the marks around a block of Qwen3-VL


@dataclass(frozen=True)
class Lengths:
    """Of a prompt and the answers to it."""

    answers: int  # G
    prompt: int  # P: tokens of the prompt, visual ones included
    completion: int  # C: tokens of an answer
    patches: int  # that the vision tower reads

    @property
    def scored(self) -> int:
        """Tokens of all answers."""
        return self.answers * self.completion


def frames_of(config: Config, model: torch.nn.Module) -> tuple[int, int, int, int]:
    """Seconds, frames, width and height of the clip that is assumed. The toy's is its own."""
    vision = model.config.vision_config
    seconds, size = (
        (toy_world.SECONDS, (toy_world.SIDE, toy_world.SIDE)) if config.toy else (SECONDS, FILE_SIZE)
    )
    factor = vision.patch_size * vision.spatial_merge_size
    return seconds, math.ceil(seconds * config.fps), *frame_size(*size, config.max_side, factor)


def lengths_of(config: Config, model: torch.nn.Module) -> Lengths:
    """The worst case: every answer runs to max_new_tokens."""
    vision, family = model.config.vision_config, FAMILIES[model.config.model_type]
    _, frames, width, height = frames_of(config, model)
    grids = -(-frames // vision.temporal_patch_size)
    patches = grids * (width // vision.patch_size) * (height // vision.patch_size)
    stamps = TIMESTAMP * grids if family.timed == "text" else 0
    prompt = (TOY_PROMPT_TEXT if config.toy else PROMPT_TEXT) + stamps
    prompt += patches // vision.spatial_merge_size**2
    return Lengths(config.num_generations, prompt, config.max_new_tokens, patches)


# ----------------------------------------------------------------------------------------------------------
# What the activations take, in bytes


@dataclass(frozen=True)
class Tower:
    """The sizes of the language model or, with patches for tokens, of the vision tower."""

    layers: int
    H: int  # width of the hidden states
    A: int  # attention heads
    K: int  # heads of keys and values
    d: int  # width of a head
    F: int  # width of the MLP
    gated: bool  # MLP: down(act(gate(x)) * up(x)), or down(act(up(x)))
    rms: bool  # its norms are RMSNorm, computed in fp32
    qk_norm: bool  # queries and keys are normalised, too
    compute: int  # bytes of a number in the matrix products
    frozen: bool  # there are adapters; the weights themselves need no gradient

    def norm(self) -> int:
        """Kept by a norm for each token: its input in fp32; for the gradient of its weight the normalised
        input, too; its output for that of what follows. A GPU that has rms_norm as one kernel keeps less."""
        weight = 0 if self.frozen else 4
        return self.H * (4 + weight + self.compute if self.rms else 2 * self.compute)

    def mlp(self) -> int:
        """For each token: gate, its activation, up, their product; or up and its activation."""
        return (4 if self.gated else 2) * self.F * self.compute


def towers(model: torch.nn.Module, compute: int, frozen: bool = False) -> tuple[Tower, Tower]:
    """The language model and the vision tower."""
    text, layer = model.config.text_config, model.model.language_model.layers[0]
    block, heads = model.model.visual.blocks[0], model.config.vision_config.num_heads
    width, d = block.attn.proj.in_features, layer.self_attn.head_dim
    gated = hasattr(block.mlp, "gate_proj")
    inner = (block.mlp.gate_proj if gated else next(block.mlp.children())).out_features
    rms, qk_norm = not hasattr(block.norm1, "bias"), hasattr(layer.self_attn, "q_norm")
    A, K = text.num_attention_heads, text.num_key_value_heads
    sizes = (text.num_hidden_layers, text.hidden_size, A, K, d, text.intermediate_size)
    blocks = (len(model.model.visual.blocks), width, heads, heads, width // heads, inner)
    return (
        Tower(*sizes, True, True, qk_norm, compute, frozen),
        Tower(*blocks, gated, rms, False, compute, frozen),
    )


def keys_values(t: Tower, heads: int, tokens: int) -> int:
    """Of one layer. Rotary positions leave keys in the dtype of the hidden states."""
    return tokens * heads * t.d * 2 * t.compute


def layer_kept(t: Tower, tokens: int) -> int:
    """What one decoder layer keeps for its backward pass, of so many tokens; keys and values apart."""
    attention = 3 * t.A * t.d * t.compute + 4 * t.A  # q, the output, its copy in order; its normaliser
    if t.qk_norm:
        attention += (t.A + t.K) * t.d * (4 + t.compute)  # q and k in fp32, and normalised
    return tokens * (2 * t.norm() + attention + t.mlp())


def block_kept(t: Tower, patches: int) -> int:
    """The same of a block of the vision tower, keys and values included."""
    # Qwen2.5: q, k, v and the output window by window, and the output in order; the others: q, k, what q, k
    # and v were cut from, the output frame by frame, and in one.
    attention = (5 if t.rms else 7) * t.H * t.compute + 4 * t.A
    return patches * (2 * t.norm() + attention + t.mlp())


def layer_backward(t: Tower) -> int:
    """What the backward pass through a layer adds for each token at most: in the MLP, where gradients of its
    three inner tensors are there but their product is not any more; the gradients of input and output."""
    return 2 * t.F * t.compute + 2 * t.H * t.compute


def layer_forward(t: Tower, tokens: int) -> int:
    """What a pass without gradients through one layer takes: hidden states before and after the norm; in
    attention q, k, v, the output and two copies of it; in the MLP three tensors."""
    attention = (4 * t.A + 2 * t.K) * t.d * t.compute
    return tokens * (2 * t.H * t.compute + max(attention, 3 * t.F * t.compute))


def block_forward(t: Tower, patches: int) -> int:
    """The same of a vision block: rotary positions are applied in fp32, and take most."""
    attention = t.H * (3 * t.compute + 6 * 4)  # q, k, v together; q and k in fp32, and four terms of them
    return patches * (2 * t.H * t.compute + max(attention, 3 * t.F * t.compute))


CHUNK = 1024  # tokens whose logits exist at once: the default of model.completion_logprobs


def chunk_logits(vocabulary: int, tokens: int) -> int:
    """In the backward pass of cross_entropy, in fp32: log-probabilities, their gradient and the logits'."""
    return 3 * 4 * min(CHUNK, tokens) * vocabulary


def sampled_logits(vocabulary: int) -> int:
    """One token's: as the model gives them, in fp32; in fp64 the softmax and its cumsum."""
    return (4 + 4 + 8 + 8) * vocabulary


def pass_kept(t: Tower, tokens: int, keys: int, recompute: bool, own: int) -> tuple[int, int]:
    """What so many tokens keep of their pass through the layers of the language model, and what the backward
    pass through one layer adds to it.

    keys: bytes of keys and values in each layer. recompute: with gradient checkpointing. own: numbers that
    adapters in fp32 keep for a token and layer, over what a layer keeps.
    """
    of_layer = layer_kept(t, tokens) + keys + tokens * t.compute * own
    kept = tokens * 2 * t.d * t.compute  # rotary positions
    work = tokens * layer_backward(t)
    if recompute:  # only the input of each layer is kept
        return kept + t.layers * tokens * t.H * t.compute, work + of_layer
    return kept + t.layers * of_layer, work


def prompt_kept(text: Tower, vision: Tower | None, n: Lengths, recompute: bool, own: int) -> tuple[int, int]:
    """The same of reading a prompt. vision: None where it is frozen: features, made once, stand for it."""
    prefix = keys_values(text, text.K, n.prompt)
    kept, work = pass_kept(text, n.prompt, prefix, recompute, own)
    kept += n.prompt * text.norm() + recompute * text.layers * prefix  # the final norm; these for the answers
    work += text.layers * prefix  # the gradients that these have left
    if vision:
        of_block = block_kept(vision, n.patches)
        kept += vision.layers * (n.patches * vision.H * vision.compute if recompute else of_block)
        work = max(work, n.patches * layer_backward(vision) + recompute * of_block)
    return kept, work


def answers_kept(text: Tower, heads: int, n: Lengths, recompute: bool, own: int) -> tuple[int, int]:
    """The same of scoring the answers to it. heads: of keys and values; each answer's follow the prompt's."""
    both = n.prompt + n.completion
    keys = keys_values(text, heads, n.answers * both)
    kept, work = pass_kept(text, n.scored, keys, recompute, own)
    # The states that tokens are predicted from, later their gradients; the mask.
    return kept + (n.scored * text.H + n.completion * both) * text.compute, work


def sampling(t: Tower, n: Lengths, vocabulary: int) -> tuple[int, int]:
    """Keys and values of a prompt and its whole answers in a rollout; what is there beside them at most."""
    read, own = keys_values(t, t.K, n.prompt), keys_values(t, t.K, n.scored)
    # Attention in fp32, a layer at a time: keys and values; scores in two parts, as one, and their softmax.
    attention = 3 * 4 * n.answers * t.A * (n.prompt + n.completion)
    attention += 2 * (read + own) if t.compute == 2 else 0
    return t.layers * (read + own), max(attention, n.answers * sampled_logits(vocabulary))


# ----------------------------------------------------------------------------------------------------------
# The memory of a GPU


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU. The first four are there all the time (gradients: in training only), each of the
    others at its largest. They are not at their largest at once: the peaks can be less than the sums."""

    weights: float
    gradients: float
    adam: float
    reference: float
    gathered: float  # FSDP2: whole groups and their gradients, for as long as they compute; or cast adapters
    activations: float  # kept for the backward pass, and what the pass through one layer adds
    logits: float  # of one chunk of tokens, with gradients
    cache: float  # keys and values of a rollout
    train: float  # the peaks
    rollout: float
    prompt: float  # of the activations, those of one prompt, which reuse_prompts keeps


def lasting_bytes(trained: float, gpus: int, compute: int = 2, frozen: float = 0) -> tuple[float, ...]:
    """Weights, gradients, AdamW's two moments and reference, on each GPU, of a model with so many parameters:
    those that are trained are kept in fp32, frozen ones and the reference in `compute` bytes."""
    sizes = (4 * trained + compute * frozen, 4 * trained, 8 * trained, compute * (trained + frozen))
    return tuple(size / gpus for size in sizes)


def memory(
    config: Config, model: torch.nn.Module, gpus: int, lora: bool, n: Lengths | None = None, cpu: bool = False
) -> Memory:
    """What a run takes. lora: adapters on a frozen model, or all weights trained, whatever the config says.
    n: lengths other than the worst case. cpu: as attention.AnswerAttention works there, with as many heads of
    keys as there are; on a GPU it repeats them to as many as there are of queries."""
    n, prompts = n or lengths_of(config, model), math.ceil(config.batch_size / gpus)
    rows, decoded = min(config.micro_batch, prompts), min(config.rollout_batch, prompts)  # prompts at once
    compute = 4 if config.precision == "fp32" else 2
    sharded = gpus > 1 or (compute == 2 and not lora)  # checkpoint.load_trainable
    text, vision = towers(model, compute, lora)
    (_, layers, layer), (_, _, block), (_, _, root) = groups(model)
    head, vocabulary = model.lm_head.weight.numel(), model.lm_head.out_features

    # What is there all the time.
    frozen = count(model.model.visual) if config.freeze_vision else 0
    trained, trained_layer, trained_root, trained_head = count(model) - frozen, layer, root, head
    if lora:
        adapted = adapted_layers(model, config.lora.targets)
        inputs, outputs = sum(x.in_features for x in adapted), sum(x.out_features for x in adapted)
        frozen, trained_root, trained_head = count(model), 0, 0
        trained = (config.lora.rank or LORA_RANK) * (inputs + outputs)
        trained_layer = trained / layers
    weights, gradients, adam, reference = lasting_bytes(trained, gpus, compute, frozen)
    if not sharded:
        reference = weights  # a copy of the policy
    if lora or not config.kl_beta:
        reference = 0.0
    # Gradients that are exchanged in the last backward pass only are whole on each GPU until then.
    late = sharded and config.sync_gradients == "last" and prompts > rows
    gathering = 4 * trained if late else gradients

    # What computing gathers or copies, at three moments of a training step.
    if sharded:
        # The backward pass of a layer: the root and the gradient of the head; of the layer the buffer it came
        # in, the weights cut from it, their gradients, those of the layer before in fp32, under way; the
        # buffer of the next layer.
        in_layer = compute * (root + trained_head + 3 * max(layer, block)) + (compute + 4) * trained_layer
        # That of the logits: another gradient of the head for each chunk, to be added to the first.
        in_logits = compute * (root + 2 * trained_head + layer)
        # Its end: the root, its gradients, these once more in fp32, and of their sum this GPU's part.
        at_end = (compute + (4 if late else compute) + 4 + 4 / gpus) * trained_root
        whole = compute * (count(model) + (trained if lora else 0))  # for a rollout
        buffer = compute * max(root, layer)  # in which a group of it arrives
    else:
        whole = in_layer = 0 if compute == 4 else compute * trained  # the adapters, cast by autocast
        in_logits = in_layer + 4 * trained_head
        at_end = buffer = 0
    in_adam = 4 * trained / gpus  # the root of the second moments, of all parameters at once

    # Activations of a training step.
    sees, own = not (lora or config.freeze_vision), 0
    if lora and not sharded and compute == 2:
        # An adapter in fp32 has its input cast for itself alone; then nothing keeps the outputs of the norms
        # and the product in the MLP, which adapters in bf16 share.
        own = max(0, inputs // layers - 2 * text.H - text.F)
    recompute, heads = config.gradient_checkpointing, text.K if cpu else text.A
    pixels = n.patches * model.model.visual.patch_embed.proj.weight[0].numel()
    read, reading = prompt_kept(text, vision if sees else None, n, recompute, own)
    read += sees * pixels * compute
    if config.reuse_prompts and not (sharded or recompute):
        read += whole  # each is read with its own copy of the adapters
    scored, work = answers_kept(text, heads, n, recompute, own)
    logits = chunk_logits(vocabulary, rows * n.scored)
    at_logits = in_logits + logits + rows * n.scored * text.norm()  # it is the final norm's
    passing = rows * (read + scored) + max(in_layer + rows * work, at_logits)
    passing = max(passing, rows * (read + reading) + in_layer)
    # Prompts that wait: all but those of the first pass; or without the next ones, beside its gradients.
    waiting = max(0, (prompts - 2 * rows) * read, (prompts - rows) * read - gathering) * config.reuse_prompts

    # A rollout. Prompts that are kept are read one by one.
    cache, beside = (decoded * size for size in sampling(text, n, vocabulary))
    at_once, kept = decoded, decoded * text.layers * keys_values(text, text.K, n.prompt)
    if config.reuse_prompts:
        at_once, kept = 1, prompts * read
    seeing = max(0, kept - read) + at_once * (pixels * (4 + compute) + block_forward(vision, n.patches))
    rolling = max(buffer, seeing, kept + max(layer_forward(text, at_once * n.prompt), cache + beside))
    return Memory(
        weights,
        gathering,
        adam,
        reference,
        max(in_layer, in_logits, at_end),
        waiting + rows * (read + max(scored + work, reading)),
        logits,
        cache,
        weights + adam + reference + max(gathering + waiting + passing, gradients + max(at_end, in_adam)),
        weights + adam + reference + whole + rolling,
        read,
    )


# ----------------------------------------------------------------------------------------------------------
# The table

GPUS, CAPACITIES = (1, 2, 4, 8, 16), (24, 40, 80, 141)  # how many; GiB of each
USABLE = 0.9  # of a GPU: the rest is for fragmentation, the CUDA context and NCCL
LORA_RANK = 16  # where the config has none
COLUMNS = ("weights", "grads", "Adam", "ref.", "buffers", "activ.", "logits", "KV", "train", "rollout")
NOTES = (
    "train, rollout: the peaks. They can be less than the sums: activations, logits, and the buffers of",
    "weights in use (with their gradients) are at their largest at different times; KV is of rollouts only.",
    "rollout: in training. Evaluation answers eval_batch prompts at once, which can take more.",
    f"fits: the larger peak is at most {USABLE:.0%} of the GPU; the rest is for fragmentation, CUDA, NCCL.",
    "GPUs: numbers that divide batch_size. Assumed: every answer runs to max_new_tokens, the worst case.",
    "Nothing was measured on a GPU.",
)


def print_plan(config: Config) -> None:
    """Print the derived sizes and the memory of each GPU. Raises ModelError."""
    print(format_plan(config))


def format_plan(config: Config) -> str:
    """Some 40 lines of at most 110 columns."""
    model, rank = named_model(config.model), config.lora.rank
    blocks = []  # (title, configuration, with LoRA, whether it is the given one)
    for way in ("last", "each"):
        title = f"all weights{', vision frozen' * config.freeze_vision}, sync_gradients={way}"
        mine = not rank and way == config.sync_gradients
        blocks.append((title, dataclasses.replace(config, sync_gradients=way), False, mine))
    blocks.append((f"LoRA of rank {rank or LORA_RANK}", config, True, bool(rank)))
    counts = [gpus for gpus in GPUS if config.batch_size % gpus == 0]  # ranks have equally many prompts
    plans = [[memory(block, model, gpus, lora) for gpus in counts] for _, block, lora, _ in blocks]
    unit, name = (GIB, "GiB") if plans[0][-1].train >= GIB else (MIB, "MiB")
    lines = [
        *_sizes(config, model),
        f"Memory of each GPU in {name}; whether it fits into one of 24 to 141 GiB:",
    ]
    heads = "".join(f"{column:>8}" for column in COLUMNS) + "".join(f"{size:>4}" for size in CAPACITIES)
    for (title, _, _, mine), plan in zip(blocks, plans, strict=True):
        lines += ["", f"{title}{' <- this config' * mine}", f"GPUs prompts{heads}"]
        for gpus, m in zip(counts, plan, strict=True):
            numbers = "".join(f"{value / unit:8.1f}" for value in dataclasses.astuple(m)[: len(COLUMNS)])
            fits = [max(m.train, m.rollout) <= USABLE * size * GIB for size in CAPACITIES]
            marks = "".join(f"{'yes' if fit else '-':>4}" for fit in fits)
            lines.append(f"{gpus:4}{config.batch_size // gpus:8}{numbers}{marks}")
    return "\n".join([*lines, "", *NOTES])


def _sizes(config: Config, model: torch.nn.Module) -> list[str]:
    """The derived sizes."""
    n, (seconds, frames, width, height) = lengths_of(config, model), frames_of(config, model)
    visual = n.patches // model.config.vision_config.spatial_merge_size**2
    (_, layers, layer), (_, blocks, block), (_, _, root) = groups(model)
    answers, keeps = config.batch_size * n.answers, "on" if config.gradient_checkpointing else "off"
    rows, keeping = (
        min(config.micro_batch, config.batch_size),
        dataclasses.replace(config, reuse_prompts=True),
    )
    kept = memory(keeping, model, 1, bool(config.lora.rank), n).prompt / MIB
    return [
        f"{config.model}: {count(model):,} parameters; {layers} decoder layers of {layer:,},",
        f"  {blocks} vision blocks of {block:,}, and {root:,} for embeddings, head and merger",
        f"A clip of {seconds} s at {config.fps:g} fps: {frames} frames of {width} x {height};"
        f" {visual:,} visual + {n.prompt - visual} other = {n.prompt:,} prompt tokens",
        f"To score at once: {rows} x ({n.prompt:,} + {n.answers} answers x {n.completion:,}) ="
        f" {rows * (n.prompt + n.scored):,} tokens; gradient checkpointing {keeps}, {config.precision}",
        f"A step: {config.batch_size} prompts x {n.answers} = {answers:,} answers;"
        f" {config.batch_size * n.prompt:,} prompt and at most {answers * n.completion:,} completion tokens",
        f"reuse_prompts {'is on: it keeps' if config.reuse_prompts else 'is off: it would keep'} {kept:,.1f}"
        " MiB of each of a GPU's prompts, from rollout to update",
    ]
