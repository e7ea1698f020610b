# ruff: noqa: E402 (the project is no package: its folder must be on the path first)
"""One GRPO step on one prompt: what it costs, part by part, and how far that is from what it must cost.

    python benchmarks/step.py --visual-tokens 720 1512 2880 --dtype fp32
    python benchmarks/step.py --visual-tokens 1512 --against naive      beside the padded batch (naive.py)
    python benchmarks/step.py --visual-tokens 1512 --profile            the kernels that take most of the time
    python benchmarks/step.py --make FOLDER                             only write the small model

A step is train.make_prompts, sample and update: decode the clip's file, encode the prompt, sample G = 8
answers of exactly C = 200 tokens, score them under the reference and the policy, loss, backward, AdamW. The
end tokens are taken from the policy, and the advantages are +1 and -1 in turn; all else is the program,
whose functions are wrapped to be timed. reuse_prompts is on, unlike in the program's default (--no-keep). The
clip is an uncompressed file of noise, 2 frames a second of the size that the model sees, 6 x 6 visual tokens
for each pair of frames. N visual tokens are rounded up to a multiple of 36.

One JSON line for each setting and way: of `steps` rounds, in which the ways take turns, after one to warm up,
in which operations are counted.
    step_s          wall, the least of all rounds
    step_cpu_s      seconds of CPU of this process, the least; rounds_cpu_s: of all rounds
    cpu_s           the parts of that round: decode (file, prompt, patches), vision (the policy's tower),
                    prefill (the prompt through its language model), sampling, reference (with its tower),
                    forward (the policy's scores and the loss), backward (with recomputation), optimizer
    base_rss_mb     resident memory with everything loaded, before the first step; 10^6 bytes, as all here
    peak_rss_mb     the most in any round (of all ways that are loaded); above_mb: in a round that began with
                    freed memory (the first, or, beside another way, each) above what was resident then:
                    the models and AdamW's moments
    others_cpu      cores that other processes used in each round; many, and the round is of little worth
    gflop_needed    by the formula below; of them linear_needed in linear layers
    gflop_padded    G times what one answer by itself needs: a padded batch, without recomputation
    gflop_done      counted: products of matrices, convolutions, attention's kernel; linear_done: without
                    attention
    peak_gflops     10^9 operations in a second of CPU, in the best of some products of 2048 x 2048 matrices
    roofline        step_cpu_s / (gflop_needed / peak_gflops)

What is needed, with V visual tokens (V * merge^2 patches) and P of the prompt, these included:
    vision   2 * weights of its blocks and patch embedding * patches + 2 * weights of its mergers * V
             + 4 * width * pairs of patches in one window, in each block
    prompt   2 * weights of the layers * P + layers * 4 * heads * width of a head * P * (P + 1) / 2
    answers  2 * weights of the layers and the head * G * C
             + layers * 4 * heads * width of a head * G * (C * P + C * (C + 1) / 2)
    step     (vision + prompt) * (policy 1 + reference 1 + backward 2)
             + answers * (sampling 1 + policy 1 + reference 1 + backward 2)
             - 2 * weights of the patch embedding * patches, for pixels need no gradient
so nothing is computed twice, nor for each answer what is the same for all. With a frozen tower: vision * 1.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

# Before torch is imported. OpenMP's threads would otherwise spin while they wait, which counts as work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import model
import train
from benchmarks import naive
from config import DTYPES, Config
from model import Prompt
from qwen import checkpoint
from qwen.checkpoint import Policy, load_tokenizer
from runtime.files import UserError
from samples import Sample
from toy.pretrain import tiny_tokenizer
from toy.world import write_y4m
from video.loader import FrameLoader

FPS, GRID = 2, 6  # of the frames shown: a second; merged patches a side, 36 visual tokens for two frames
NAMED = ("completion", "dtype", "threads", "checkpointing", "keep", "freeze_vision", "steps")
PARTS = ("decode", "vision", "prefill", "sampling", "reference", "forward", "backward", "optimizer")


# ----------------------------------------------------------------------------------------------------------
# The work


def write_model(folder: Path, light: bool = False) -> None:
    """A small Qwen2.5-VL with random weights, 9.8 M of them; light: half as wide a vision tower, whose cost
    beside the language model's is that of the published 3B (the other's is four times that)."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"[{n}]" for n in range(2048 - len(tokenizer))])
    marks = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    text = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    text |= {"intermediate_size": 1024, "vocab_size": 2048, "rope_parameters": rope}
    text |= {"eos_token_id": end, "bos_token_id": pad, "pad_token_id": pad}
    width, between = (128, 344) if light else (256, 688)
    vision = {"depth": 4, "hidden_size": width, "intermediate_size": between, "num_heads": 4}
    vision |= {"out_hidden_size": 256, "fullatt_block_indexes": [1, 3], "window_size": 112, "patch_size": 14}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2}
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    torch.manual_seed(0)
    network = Qwen2_5_VLForConditionalGeneration._from_config(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    )
    network.generation_config.update(eos_token_id=end)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes), encoding="utf-8")


@dataclass
class Work:
    """What a step is done on."""

    config: Config
    sample: Sample
    clips: FrameLoader


def work_of(options: argparse.Namespace, visual: int, folder: Path) -> Work:
    """visual: tokens of the video. folder: an empty one for the clip and, where none is given, the model."""
    if options.model is None:
        write_model(folder / "model", options.light)
    checkpoint = options.model or str(folder / "model")
    side = GRID * load_tokenizer(checkpoint)[1]  # pixels
    frames = 2 * -(-visual // GRID**2)
    path = folder / "clip.y4m"
    noise = np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
    write_y4m(path, noise, FPS)
    # The clip is the whole file, and its event all of it.
    whole = {"num_frames": frames, "begin_frame": 0, "file_frames": frames, "first_frame": 0}
    whole |= {"stop_frame": frames, "boxes": {0: (0.2, 0.2, 0.6, 0.6)}}
    sample = Sample("clip", str(path), "the person in the red shirt turns.", side, side, fps=FPS, **whole)
    config = Config(
        model=checkpoint,
        fps=float(FPS),
        max_side=side,
        video_workers=0,  # what a worker hides is to be seen here
        batch_size=1,
        num_generations=options.group,
        max_new_tokens=options.completion,
        kl_beta=0.04,
        precision=options.dtype,
        gradient_checkpointing=options.checkpointing,
        reuse_prompts=options.keep,
        freeze_vision=options.freeze_vision,
    )
    return Work(config, sample, FrameLoader(config, side // GRID))


class Parts:
    """Where the CPU seconds of a step go. Of a part within another only the inner one counts."""

    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._running: list[str] = []
        self._counted = 0.0

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.begin(part)
        try:
            yield
        finally:
            self.end()

    def begin(self, part: str) -> None:
        self._count()
        self._running.append(part)

    def end(self) -> None:
        self._count()
        self._running.pop()

    def split(self) -> dict[str, float]:
        """Seconds of each part since the last split."""
        seconds, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

    def _count(self) -> None:
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._counted
        self._counted = now

    def watch(self, tower: torch.nn.Module) -> None:
        """What this vision tower computes forward is `vision`."""
        tower.register_forward_pre_hook(lambda *_: self.begin("vision"))
        tower.register_forward_hook(lambda *_: self.end())


parts = Parts()  # of the step at hand


@dataclass
class Way:
    """A way to do the step."""

    impl: str
    step: Callable[[int], None]  # of a round
    micro: int | None = None  # of the naive way: answers that are scored at a time
    rounds: list[dict] = field(default_factory=list)
    flops: tuple[int, int] = (0, 0)  # counted: in linear layers, in all


def prompts_of(work: Work, policy: Policy) -> list[Prompt]:
    return train.make_prompts(policy, [(0, work.sample)], work.clips, work.config)[2]


def adamw(policy: Policy, config: Config) -> torch.optim.Optimizer:
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)


def our_way(work: Work) -> tuple[Way, Policy]:
    """As train.learn and train.reinforce do it."""
    config = work.config
    policy = checkpoint.load_trainable(config)
    policy.eos_ids = []
    if config.gradient_checkpointing:
        policy.model.activation_checkpointing_enable()
    policy.model.train()
    reference = checkpoint.freeze(policy, config)
    optimizer = adamw(policy, config)
    optimizer.register_step_pre_hook(lambda *_: parts.begin("optimizer"))
    optimizer.register_step_post_hook(lambda *_: parts.end())
    parts.watch(policy.model.model.visual)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(config.num_generations)

    def step(n: int) -> None:
        with timed(reference):
            batch, _, prompts = train.make_prompts(policy, [(0, work.sample)], work.clips, config)
            keys = [(config.seed, n, k) for k, _ in batch]
            prompts, completions = train.sample_answers(policy, prompts, keys, config)
            row = [advantages[: config.num_generations]]
            train.update(policy, reference, optimizer, prompts, completions, row, config)

    return Way("ours", step), policy


@contextlib.contextmanager
def timed(reference: Policy) -> Iterator[None]:
    """Within it the functions that a step consists of count their time."""

    def scores(policy: Policy, *_) -> str:
        return "reference" if policy is reference else "forward"

    functions = [
        (train, "make_prompts", "decode"),
        (Policy, "patches", "decode"),
        (train, "rollout", "sampling"),
    ]
    functions += [(train, "prefill", "prefill"), (model, "prefill", "prefill")]
    functions += [(train, "with_video_features", "vision")]
    functions += [(train, "completion_logprobs", scores), (train, "policy_loss", "forward")]
    functions += [(torch.Tensor, "backward", "backward"), (torch.nn.utils, "clip_grad_norm_", "optimizer")]

    def wrapped(function: Callable, part: str | Callable) -> Callable:
        def call(*arguments, **named):
            with parts(part if isinstance(part, str) else part(*arguments)):
                return function(*arguments, **named)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name, part in functions:
            stack.enter_context(mock.patch.object(owner, name, wrapped(getattr(owner, name), part)))
        yield


# ----------------------------------------------------------------------------------------------------------
# Operations


def weights(module: torch.nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> int:
    """Of the linear layers and convolutions whose name is wanted."""
    kinds = (torch.nn.Linear, torch.nn.Conv3d)
    return sum(
        m.weight.numel() for name, m in module.named_modules() if isinstance(m, kinds) and wanted(name)
    )


def needed(network: torch.nn.Module, visual: int, P: int, G: int, C: int, frozen: bool) -> tuple[int, int]:
    """Floating-point operations that a step needs, in linear layers and in attention: the formula above.

    network: the policy's. visual: tokens of the video, GRID^2 a temporal patch. P: of the prompt, these
    included. frozen: the vision tower is not trained."""
    config, tower = network.config.vision_config, network.model.visual
    merge = config.spatial_merge_size
    merged = weights(tower, lambda name: "merger" in name)
    vision = 2 * ((weights(tower) - merged) * visual * merge**2 + merged * visual)
    # Qwen2.5-VL: some blocks see windows of so many merged patches a side, the others the whole frame.
    window = getattr(config, "window_size", 0) // merge // config.patch_size or GRID
    full = getattr(config, "fullatt_block_indexes", range(config.depth))
    pairs = 0
    for block in range(config.depth):
        side = GRID if block in full else window
        sides = [min(side, GRID - begin) for begin in range(0, GRID, side)]
        pairs += sum((a * b * merge**2) ** 2 for a in sides for b in sides)
    width = tower.patch_embed.proj.weight.shape[0]
    vision_attention = 4 * width * pairs * visual // GRID**2

    text = network.config.text_config
    layers = weights(network.model.language_model)
    pair = 4 * text.num_hidden_layers * network.model.language_model.layers[0].self_attn.o_proj.in_features
    prompt, prompt_attention = 2 * layers * P, pair * P * (P + 1) // 2
    answers = 2 * (layers + network.lm_head.weight.numel()) * G * C
    answers_attention = pair * G * (C * P + C * (C + 1) // 2)

    seen = 1 if frozen else 4  # times: by the policy and the reference, and backward, which costs two
    linear = seen * vision + 4 * prompt + 5 * answers
    if not frozen:
        linear -= 2 * tower.patch_embed.proj.weight.numel() * visual * merge**2
    return linear, seen * vision_attention + 4 * prompt_attention + 5 * answers_attention


aten = torch.ops.aten
# Attention's own products are "bmm" (those of a single token, in decoding) or within the flash kernel.
LINEAR = (aten.mm, aten.addmm, aten.convolution, aten.convolution_backward)


def _flash(query, key, value, dropout=0.0, causal=False, **_) -> int:
    return sdpa_flop_count(query, key, value) // (2 if causal else 1)


def _flash_backward(grad, query, key, value, out, logsumexp, dropout, causal, **_) -> int:
    return 5 * _flash(query, key, value, dropout, causal) // 2  # five products for the forward's two


FLASH = {  # torch does not count the kernels of the CPU
    aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}


def counted(step: Callable[[], None]) -> tuple[int, int]:
    """Floating-point operations that it did, in linear layers and in all."""
    with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(kind, 0) for kind in LINEAR), sum(counts.values())


def matmul_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """10^9 operations in a second of CPU."""
    a, best = torch.randn(size, size).to(dtype), float("inf")
    for _ in range(6):
        began = time.process_time()
        a @ a
        best = min(best, time.process_time() - began)
    return 2 * size**3 / best / 1e9


# ----------------------------------------------------------------------------------------------------------
# Measuring


def measured(way: Way, n: int, fresh: bool) -> dict:
    """One round. fresh: begin with freed memory."""
    if fresh:
        free()
    parts.split()  # what came before does not count
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # the highest mark of resident memory begins anew (man 5 proc)
    before, busy = resident("VmRSS"), machine_seconds()
    wall, cpu = time.perf_counter(), time.process_time()
    way.step(n)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    others = [round((machine_seconds() - busy - cpu) / wall, 2)] if busy else []
    peak = resident("VmHWM")
    return {
        "wall": wall,
        "cpu": cpu,
        "parts": parts.split(),
        "others": others,
        "peak": peak,
        "above": peak - before if fresh else 0.0,
    }


def free() -> None:
    gc.collect()
    with contextlib.suppress(AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


def resident(kind: str) -> float:
    """VmRSS or VmHWM, the resident memory of this process now or at most, in 10^6 bytes; 0 without /proc."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(f"{kind}:")[1].split()[0]) * 1024 / 1e6 if status.exists() else 0.0


def machine_seconds() -> float:
    """CPU seconds that all processes together have used since the machine began; 0 without /proc."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure(options: argparse.Namespace, visual: int) -> Iterator[dict]:
    """The JSON lines of one size of video, `visual` tokens."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work = work_of(options, visual, Path(folder))
        stack.callback(work.clips.close)
        ours, policy = our_way(work)
        ways = [ours]
        if options.against:
            models = naive.load(policy, work.config)
            parts.watch(models.policy.model.model.visual)
            for micro in options.naive_micro or [options.group, 1]:
                ways.append(Way("naive", naive.step_of(models, work, micro, parts), micro))
        peak = matmul_peak(getattr(torch, DTYPES[options.dtype]))
        free()
        base = resident("VmRSS")
        for way in ways:
            way.flops = counted(lambda way=way: way.step(0))
        for n in range(1, options.steps + 1):
            for way in ways:
                # Freed of what the warming up, or another way, has left. Of its own a way uses it again.
                way.rounds.append(measured(way, n, fresh=n == 1 or len(ways) > 1))
        (prompt,) = prompts_of(work, policy)
        visual, P = int((prompt.ids == policy.video_id).sum()), len(prompt.ids)
        G, C, frozen = options.group, options.completion, options.freeze_vision
        needs = needed(policy.model, visual, P, G, C, frozen)
        padded = G * sum(needed(policy.model, visual, P, 1, C, frozen))
        setting = {"model": options.model or ("light" if options.light else "small")}
        setting |= {"visual_tokens": visual, "prompt_tokens": P, "group": options.group}
        setting |= {name: getattr(options, name) for name in NAMED}
        for way in ways:
            yield line_of(way, setting, base, needs, padded, peak)
        if options.against:
            yield {"ratios": {f"naive, {way.micro} at a time": ratios(way, ours) for way in ways[1:]}}
        if options.profile:
            yield {"profile": kernels(lambda: ours.step(options.steps + 1))}


def line_of(way: Way, setting: dict, base: float, needs: tuple[int, int], padded: int, peak: float) -> dict:
    rounds = way.rounds
    best = min(rounds, key=lambda one: one["cpu"])
    linear_done, done = (round(flops / 1e9, 1) for flops in way.flops)
    linear_needed, all_needed = needs[0] / 1e9, sum(needs) / 1e9
    return {
        "impl": way.impl,
        **({"micro": way.micro} if way.micro else {}),
        **setting,
        "step_s": round(min(one["wall"] for one in rounds), 3),
        "step_cpu_s": round(best["cpu"], 3),
        "rounds_cpu_s": [round(one["cpu"], 3) for one in rounds],
        "cpu_s": {part: round(seconds, 3) for part, seconds in best["parts"].items()},
        "peak_rss_mb": round(max(one["peak"] for one in rounds)),
        "base_rss_mb": round(base),
        "above_mb": round(max(one["above"] for one in rounds)),
        "others_cpu": [cores for one in rounds for cores in one["others"]],
        "gflop_needed": round(all_needed, 1),
        "linear_needed": round(linear_needed, 1),
        "gflop_padded": round(padded / 1e9, 1),
        "gflop_done": done,
        "linear_done": linear_done,
        "peak_gflops": round(peak, 1),
        "roofline": round(best["cpu"] / (all_needed / peak), 2),
    }


def ratios(way: Way, ours: Way) -> dict[str, float]:
    """Of another way to ours: the least and the median CPU seconds, the most memory above the models."""

    def ratio(choose: Callable, key: str) -> float:
        return round(choose(r[key] for r in way.rounds) / choose(r[key] for r in ours.rounds), 2)

    return {
        "cpu": ratio(min, "cpu"),
        "median": ratio(statistics.median, "cpu"),
        "memory": ratio(max, "above"),
    }


def kernels(step: Callable[[], None], most: int = 15) -> dict[str, float]:
    """Those that take most of the CPU time of a step, with their share in per cent."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: round(100 * event.self_cpu_time_total / total, 1) for event in events[:most]}


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"{word!r}: a whole number, at least 1, is needed")
    return int(word)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    switch = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--model", help="a checkpoint folder of any Qwen-VL; default: a small one is made")
    parser.add_argument("--light", action="store_true", help="make the one with the lighter vision tower")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="only write the small model there")
    parser.add_argument("--visual-tokens", type=positive, nargs="+", default=[1512], metavar="N")
    parser.add_argument("--group", type=positive, default=8, metavar="G", help="answers")
    parser.add_argument("--completion", type=positive, default=200, metavar="C", help="tokens of each answer")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--steps", type=positive, default=5, help="rounds")
    parser.add_argument("--checkpointing", **switch, help="gradient checkpointing")
    parser.add_argument("--keep", **switch, help="keep the rollout's prompt for the update (reuse_prompts)")
    parser.add_argument("--freeze-vision", action="store_true")
    parser.add_argument("--against", choices=["naive"])
    parser.add_argument(
        "--naive-micro", type=positive, nargs="+", help="answers at a time; default: G, and 1"
    )
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args(words)


def main() -> None:
    options = parse(sys.argv[1:])
    if options.make:
        write_model(options.make, options.light)
        return
    try:
        for visual in options.visual_tokens:
            for line in measure(options, visual):
                print(json.dumps(line), flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
