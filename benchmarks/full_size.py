# ruff: noqa: E402 (the project is no package: its folder must be on the path first)
"""The published sizes of Qwen-VL, without their weights: what they take, and that they run.

    python benchmarks/full_size.py
        builds each published shape on the meta device (no memory), checks its number of parameters, and
        prints how FSDP2 would cut it and what that takes on each GPU. Takes seconds.

    python benchmarks/full_size.py --run 7b --video FILE --folder DIR
        writes a checkpoint of that shape to DIR, with random weights and Qwen's vocabulary, loads it in a new
        process as any checkpoint is loaded, and puts one real video through it: prefill, 8 answers of 12
        tokens, their log-probs. 7b takes 17 GB of memory and of disk, and minutes.

A DIR that is there already is measured as it is.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.vocabulary import QWEN2_TEMPLATE, QWEN3_TEMPLATE, qwen_tokenizer
from lab.memory import GIB, count, named_model
from model import completion_logprobs, encode_prompt, pack_completions, rollout
from prompts import TextFormat, build_prompt
from qwen.checkpoint import FAMILIES, load_policy
from video.frames import frame_size, read_frames, resize

SHAPES = {  # hub id, its parameters, what its config.json says of rotary positions
    "3b": ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976, 1e6, [16, 24, 24]),
    "7b": ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656, 1e6, [16, 24, 24]),
    "qwen3-8b": ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696, 5e6, [24, 20, 20]),
}


# ----------------------------------------------------------------------------------------------------------
# The plan


def print_plan(name: str) -> None:
    """fp32 weights, gradients and AdamW's two moments, and a frozen bf16 reference, sharded."""
    hub_id, expected, *_ = SHAPES[name]
    model = named_model(hub_id)
    total = count(model)
    if total != expected:
        sys.exit(f"error: {name} has {total:,} parameters, not the published {expected:,}")
    print(f"{name}: {total:,} parameters, {2 * total / 1e9:.1f} GB in bf16")
    layers, blocks = model.model.language_model.layers, model.model.visual.blocks
    rest = total - count(layers) - count(blocks)
    groups = {
        "decoder layer": (len(layers), count(layers[0])),
        "vision block": (len(blocks), count(blocks[0])),
    }
    groups["root (embeddings, head, merger)"] = (1, rest)
    for group, (number, size) in groups.items():
        print(f"  {number:3} x {group:32} {size:13,} parameters, {2 * size / 2**20:7,.0f} MiB in bf16")
    largest = max(size for _, size in groups.values())
    print("  GiB per GPU    weights   grads    Adam   reference   static   + the largest group")
    for gpus in (1, 2, 4, 8):
        each = [size * total / gpus / GIB for size in (4, 4, 8, 2)]
        weights, grads, adam, reference = each
        row = f"{weights:10.1f} {grads:7.1f} {adam:7.1f} {reference:11.1f} {sum(each):8.1f}"
        print(f"  with {gpus} of them {row} {sum(each) + 2 * largest / GIB:21.1f}")


# ----------------------------------------------------------------------------------------------------------
# The run


def write_checkpoint(name: str, layers: int | None, folder: Path) -> None:
    """A folder of random bf16 weights: scaled so that signals neither die out nor explode."""
    hub_id, _, theta, sections = SHAPES[name]
    config = named_model(hub_id).config
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    config.text_config.rope_parameters |= {"rope_theta": theta, "mrope_section": sections}
    qwen3, family = config.model_type == "qwen3_vl", FAMILIES[config.model_type]
    if qwen3:
        config.text_config.rope_parameters["mrope_interleaved"] = True
    ids = {"image": 151655, "video": 151656, "vision_start": 151652, "vision_end": 151653}
    config.update({f"{name}_token_id": token for name, token in ids.items()})
    with torch.device("meta"):
        model = family.model_class(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.data.fill_(0.0 if key.endswith("bias") else 1.0)
    model.generation_config.update(
        bos_token_id=151643, pad_token_id=151643, eos_token_id=[151645, 151643], do_sample=True
    )
    model.generation_config.update(repetition_penalty=1.05, temperature=1e-6, top_k=1)
    model.save_pretrained(folder, max_shard_size="2GB")
    qwen_tokenizer(QWEN3_TEMPLATE if qwen3 else QWEN2_TEMPLATE).save_pretrained(folder)
    sizes = {"patch_size": config.vision_config.patch_size, "temporal_patch_size": 2, "merge_size": 2}
    sizes |= {"image_mean": family.image_mean, "image_std": family.image_std}
    if qwen3:
        files = {
            "preprocessor_config.json": {"size": {"longest_edge": 16777216, "shortest_edge": 65536}},
            "video_preprocessor_config.json": {"size": {"longest_edge": 25165824, "shortest_edge": 4096}},
        }
    else:
        files = {"preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 12845056}}
    for file, budget in files.items():
        (folder / file).write_text(json.dumps(budget | sizes, indent=2), encoding="utf-8")


@contextlib.contextmanager
def timed(what: str):
    """Prints the wall time of a part, and the memory it took: at most so far, of this process. Weights are
    mapped from their files, and such memory can be taken back; what cannot is the anonymous part."""
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB -> GiB
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    anonymous = int(status.split("RssAnon:")[1].split()[0]) / 2**20
    figures = f"{seconds:8.1f} s   peak {peak:5.1f} GiB   ({anonymous:.1f} GiB anonymous at its end)"
    print(f"{what:28}{figures}", flush=True)


def measure(folder: Path, video: str, seconds: float, answers: int, tokens: int) -> None:
    """One prompt through a checkpoint folder, as train.py would. seconds: of the video that are shown."""
    text_format = TextFormat()
    with timed("load_policy in bf16"):
        policy = load_policy(str(folder), dtype=torch.bfloat16)
    print(f"{policy.family.name}: {count(policy.model):,} parameters, {policy.model.dtype}")
    with timed("frames and prompt"):
        times = [step / text_format.fps for step in range(math.ceil(seconds * text_format.fps))]
        frames = read_frames(video, times)
        size = frame_size(frames.shape[2], frames.shape[1], 336, policy.size_factor)
        text = build_prompt("an adult holds a bat in the contest.", len(frames), (1000, 1000), text_format)
        prompt = encode_prompt(policy, resize(frames, size), text, (1000, 1000), text_format.fps)
    visual = int((prompt.ids == policy.video_id).sum())
    print(f"{len(frames)} frames of {size[0]} x {size[1]}: {len(prompt.ids)} tokens, {visual} of them visual")
    with timed("prefill and one token"):
        rollout(policy, [prompt], 1, 1, 1.0, [(0,)])
    with timed(f"{answers} answers of {tokens} tokens"):
        (group,) = rollout(policy, [prompt], answers, tokens, 1.0, [(0,)])
    with timed("their log-probs, packed"), torch.no_grad():
        batch = pack_completions(policy, [prompt], [[completion.ids for completion in group]])
        logprobs = completion_logprobs(policy, batch, 1.0)[batch.mask]
    if not logprobs.isfinite().all():
        sys.exit("error: log-probs are not finite")
    uniform = -math.log(policy.model.lm_head.weight.shape[0])
    print(f"{len(logprobs)} tokens, mean log-prob {logprobs.mean():.3f} (of a uniform draw: {uniform:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--run", choices=SHAPES, help="put a video through a model of this size")
    parser.add_argument("--video", help="a video file")
    parser.add_argument("--seconds", type=float, default=4.4, help="of the video that are shown")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written")
    parser.add_argument("--layers", type=int, help="of the decoder, fewer than published: for a trial")
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=12, help="of each answer")
    parser.add_argument("--stage", choices=("write", "measure"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is None:
        for name in SHAPES:
            print_plan(name)
    elif options.video is None or options.folder is None:
        parser.error("--run needs --video and --folder")
    elif options.stage == "write":
        with timed("write the checkpoint"):
            write_checkpoint(options.run, options.layers, options.folder)
    elif options.stage == "measure":
        measure(options.folder, options.video, options.seconds, options.answers, options.tokens)
    else:  # each in a process of its own, so that its peak of memory is its own
        for stage in ("write", "measure"):
            if stage == "write" and options.folder.exists():
                continue
            subprocess.run([sys.executable, *sys.argv, "--stage", stage], check=True, env=os.environ)


if __name__ == "__main__":
    main()
