"""The embedded default: a world of moving shapes and a tiny Qwen2.5-VL, both in the real formats.

    python toy.py                       make the world, toy_world/ (train.py does it by itself)
    python toy.py --from-scratch        pre-train the checkpoint again, checkpoints/toy (about 10 minutes)

The world: clips of 6 s in which coloured shapes appear, move and vanish; each sentence singles one of them
out. It is written as HC-STVG annotations and video files (.y4m, which needs no encoder), and read back like
any data set.

The checkpoint stands for the off-the-shelf model: it sees, it knows the answer format, but not the
*convention* of this data set's annotations: it was taught loose boxes and spans that often run a second too
long (--bias none leaves this out). Reinforcement learning has to find the convention from the rewards.
"""

import argparse
import functools
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from model import (
    FORBIDDEN_TOKENS,
    Policy,
    completion_logprobs,
    encode_prompt,
    load_policy,
    pack_completions,
    save_policy,
)
from prompts import Answer, Box, TextFormat, Truth, build_prompt, format_answer, to_text_box, truth_answer
from rewards import intersection

# --- the world
SIDE, SECONDS, NATIVE_FPS = 56, 6, 4  # pixels, length of a clip, frames per second of the files
COLOURS = {"red": (215, 40, 40), "green": (40, 165, 60), "blue": (50, 80, 220), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "triangle")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OBJECTS = 2  # one is asked for, the others distract
SPEED = 0.14  # frame widths per second
SPLITS = {"train": (800, 1), "val": (256, 2), "test": (256, 3)}  # name: (clips, seed)
PRETRAINING_CLIPS = 2000
CHECKPOINT = Path(__file__).parent / "checkpoints/toy"
TEXT = TextFormat(time_unit="second")  # of configs/toy.yaml


# ----------------------------------------------------------------------------------------------------------
# The world of moving shapes


@dataclass(frozen=True)
class Shape:
    """One object of a clip: visible, and moving, from second `start` to second `stop` (exclusive)."""

    colour: str
    kind: str
    move: str
    size: float  # of the frame
    origin: tuple[float, float]  # centre when it appears, in [0, 1]
    start: int
    stop: int

    @property
    def sentence(self) -> str:
        return f"the {self.colour} {self.kind} moves {self.move}"

    def box(self, seconds: float) -> Box | None:
        """The box in [0, 1] at a time of the clip; None while it is not there."""
        if not self.start <= seconds < self.stop:
            return None
        x, y = (
            o + d * SPEED * (seconds - self.start) for o, d in zip(self.origin, MOVES[self.move], strict=True)
        )
        return x - self.size / 2, y - self.size / 2, x + self.size / 2, y + self.size / 2


def draw_objects(rng: np.random.Generator) -> list[Shape]:
    """The objects of one clip, of different colours; the first is the one that a sentence asks for."""
    objects = []
    for colour in rng.permutation(list(COLOURS))[:OBJECTS]:
        kind, move = rng.choice(SHAPES), rng.choice(list(MOVES))
        size, length = rng.uniform(0.2, 0.36), rng.integers(2, 4)
        start = rng.integers(0, SECONDS - length + 1)
        way = [direction * SPEED * length for direction in MOVES[move]]  # stays inside the frame all the way
        origin = tuple(rng.uniform(size / 2 - min(0, w), 1 - size / 2 - max(0, w)) for w in way)
        objects.append(
            Shape(str(colour), str(kind), str(move), size, origin, int(start), int(start + length))
        )
    return objects


def render(objects: list[Shape], fps: float) -> np.ndarray:
    """The clip as uint8 frames (T, SIDE, SIDE, 3): flat shapes on plain grey, later objects in front."""
    frames = np.full((int(SECONDS * fps), SIDE, SIDE, 3), 128, np.uint8)
    y, x = (np.mgrid[0:SIDE, 0:SIDE] + 0.5) / SIDE
    for shape in objects:
        for f, frame in enumerate(frames):
            box = shape.box(f / fps)
            if box is None:
                continue
            x1, y1, x2, y2 = box
            inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
            if shape.kind == "circle":
                inside &= (x - (x1 + x2) / 2) ** 2 + (y - (y1 + y2) / 2) ** 2 < (shape.size / 2) ** 2
            elif shape.kind == "triangle":
                inside &= np.abs(x - (x1 + x2) / 2) < (y - y1) / 2
            frame[inside] = COLOURS[shape.colour]
    return frames


def make_world(folder: str | Path) -> None:
    """Write the clips and the HC-STVG annotations of all splits; what is there already is left alone."""
    folder = Path(folder)
    for split, (count, seed) in SPLITS.items():
        annotations = folder / f"{split}.json"
        if annotations.exists():
            continue
        (folder / split).mkdir(parents=True, exist_ok=True)
        records = {}
        for n in trange(count, desc=f"make {annotations}", unit="clip"):
            objects = draw_objects(np.random.default_rng((seed, n)))
            key = f"{split}/{n:04d}.y4m"
            write_y4m(folder / key, render(objects, NATIVE_FPS), NATIVE_FPS)
            records[key] = hcstvg_record(objects[0])
        temporary = annotations.with_suffix(".tmp")  # the annotations come last: they vouch for the clips
        temporary.write_text(json.dumps(records), encoding="utf-8")
        temporary.replace(annotations)


def hcstvg_record(shape: Shape) -> dict:
    """The annotation of a clip in HC-STVG's v1 dialect, with `fps` since it does not last 20 s."""
    boxes = [shape.box(f / NATIVE_FPS) for f in range(SECONDS * NATIVE_FPS)]
    track = [[v * SIDE for v in (x1, y1, x2 - x1, y2 - y1)] for x1, y1, x2, y2 in filter(None, boxes)]
    return {
        "bbox": [[round(v, 2) for v in box] for box in track],
        "st_frame": shape.start * NATIVE_FPS + 1,
        "st_time": shape.start,
        "ed_time": shape.stop,
        "img_num": SECONDS * NATIVE_FPS,
        "fps": NATIVE_FPS,
        "caption": shape.sentence,
        "width": SIDE,
        "height": SIDE,
    }


def write_y4m(path: Path, frames: np.ndarray, fps: int) -> None:
    """An uncompressed video that needs no encoder: YUV4MPEG2, one full-size plane each for Y, Cb and Cr."""
    _, height, width, _ = frames.shape
    planes = to_ycbcr(frames)
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{width} H{height} F{fps}:1 Ip A1:1 C444\n".encode())
        for frame in planes:
            file.write(b"FRAME\n" + np.ascontiguousarray(frame.transpose(2, 0, 1)).tobytes())


# BT.601, the studio range (16-235, 16-240) that players assume
_RGB_TO_YCBCR = (
    np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255
)


def to_ycbcr(frames: np.ndarray) -> np.ndarray:
    """uint8 RGB (..., 3) -> uint8 Y, Cb, Cr (..., 3)."""
    return (frames @ _RGB_TO_YCBCR.T + (16, 128, 128)).round().clip(0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------
# The tiny Qwen2.5-VL

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *FORBIDDEN_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# One token per digit as in Qwen; per word; and per mark of the answer together with its spaces, to keep it
# short.
PIECES = r" ?</?[a-z_]+> ?|[0-9]|\. \[|\], |, | - | ?[A-Za-z]+|[^A-Za-z0-9]"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that every text can be written. The words of the toy's sentences and the marks of the
    answer are whole tokens, and so is what stands between the numbers of the prompt: it is always the
    same."""
    prompts = [build_prompt("", SECONDS, (1000, 1000), replace(TEXT, think=think)) for think in (True, False)]
    phrases = {phrase.strip(" ") for prompt in prompts for phrase in re.split(r"\b[0-9]+\b", prompt)}
    phrases = sorted((f" ?{re.escape(phrase)}" for phrase in phrases if " " in phrase), key=len, reverse=True)
    split = pre_tokenizers.Split(Regex("|".join([*phrases, PIECES])), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Sequence([split, bytes_])

    example = truth_answer(Truth((0, 1), {0: (0, 0, 1, 1)}), (1000, 1000))
    texts = [*prompts, format_answer(example), "user\n", "assistant\n0123456789"]
    texts += [f"the {c} {s} moves {m} the" for c in COLOURS for s in SHAPES for m in MOVES]
    words = sorted({piece for text in texts for piece, _ in pieces.pre_tokenize_str(text)})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: k for k, token in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *alphabet, *words]))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], ignore_merges=True)
    )  # a known piece is a token, else its bytes
    tokenizer.pre_tokenizer, tokenizer.decoder = pieces, decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with everything small: 0.4 M parameters, more than half of them in the vision tower's
    merger."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.08,  # at 0.02 the first hundred steps go into growing the weights
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 128,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0, 1],
        "initializer_range": 0.08,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")


# ----------------------------------------------------------------------------------------------------------
# Pre-training: from random weights to "sees, and speaks the format", in three stages of growing difficulty


def pretrain(folder: Path, seed: int, bias: bool) -> None:
    """Make the checkpoint folder. The clips are drawn here, none is of the world's splits; that they are
    few, and come again, makes the model find out what an answer depends on in far fewer steps than ever
    new ones do."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((1000, seed))
    clips = [draw_objects(rng) for _ in range(PRETRAINING_CLIPS)]
    temporary = folder.with_name(folder.name + ".random")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    preprocessor = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    (temporary / "preprocessor_config.json").write_text(
        json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8"
    )
    policy = load_policy(str(temporary))
    policy.model.train()
    learn_to_see(policy, clips, rng)
    learn_to_ground(policy, clips, rng)
    learn_to_answer(policy, clips, rng)
    if bias:
        learn_loose_habits(policy, clips, rng)
    save_policy(policy, folder)
    shutil.rmtree(temporary)


def learn_to_see(
    policy: Policy, clips: list, rng: np.random.Generator, steps: int = 400, batch: int = 32
) -> None:
    """The vision tower alone, as Qwen's comes pre-trained: from every visual token a linear probe must
    tell which object covers most of the token's cell, by colour, and that object's shape and box. The
    probe is thrown away."""
    colours, none = list(COLOURS), len(COLOURS)
    visual = policy.model.model.visual
    probe = torch.nn.Linear(visual.config.out_hidden_size, len(colours) + 1 + len(SHAPES) + 40)
    parameters = [*visual.parameters(), *probe.parameters()]
    optimizers = [(torch.optim.AdamW(parameters), 3e-3)]
    side = SIDE // policy.size_factor  # tokens along a side
    cells = [(c / side, r / side, (c + 1) / side, (r + 1) / side) for r in range(side) for c in range(side)]
    bar = trange(steps, desc="learn to see", unit="step")
    for step in bar:
        worlds = [clips[n] for n in rng.choice(len(clips), batch, replace=False)]
        patches = [policy.patches(torch.from_numpy(render(objects, TEXT.fps))) for objects in worlds]
        colour, kind, box = [], [], []
        for objects in worlds:
            for second in range(SECONDS):
                visible = [shape for shape in objects if shape.box(second)]
                for cell in cells:
                    covered = [intersection(shape.box(second), cell) for shape in visible]
                    best = visible[int(np.argmax(covered))] if max(covered, default=0) > 0 else None
                    colour.append(colours.index(best.colour) if best else none)
                    kind.append(SHAPES.index(best.kind) if best else 0)
                    box.append(best.box(second) if best else (0, 0, 0, 0))
        colour, kind, box = torch.tensor(colour), torch.tensor(kind), torch.tensor(box)
        there = (colour != none).float()
        grid = torch.stack([grid for _, grid in patches])
        tokens = visual(
            torch.cat([values for values, _ in patches]), grid_thw=grid
        ).pooler_output  # (tokens, H)
        colour_logits, kind_logits, tenths = probe(tokens).split([none + 1, len(SHAPES), 4 * 10], dim=1)
        tenth = (box.clamp(0, 0.999) * 10).long()  # the first digit of every coordinate of the answer
        box_loss = F.cross_entropy(tenths.view(-1, 10, 4), tenth, reduction="none").mean(1)
        box_loss = (box_loss * there).sum() / there.sum()
        kind_loss = (F.cross_entropy(kind_logits, kind, reduction="none") * there).sum() / there.sum()
        colour_loss = F.cross_entropy(colour_logits, colour)
        _step(optimizers, box_loss + colour_loss + 0.5 * kind_loss, step, steps)
        bar.set_postfix_str(
            f"box {box_loss.item():.3f}, colour {colour_loss.item():.3f}, shape {kind_loss.item():.2f}"
        )


def learn_to_ground(policy: Policy, clips: list, rng: np.random.Generator, steps: int = 1000) -> None:
    """Answers that stop after the first box, once for every step of the span. Which object, when and where
    is all there is to learn; with whole answers it takes several times longer, since most of their tokens
    only repeat it."""

    def lesson(shape: Shape) -> list[str]:
        steps = range(shape.start, shape.stop)
        boxes = [to_text_box(clamp(shape.box(step)), (1000, 1000)) for step in steps]
        opening = f"<time> {shape.start} - {shape.stop - 1} </time> <think_bbox> "
        return [
            f"{opening}{step}. [{', '.join(map(str, box))}" for step, box in zip(steps, boxes, strict=True)
        ]

    _teach(policy, clips, rng, "learn to ground", steps, 1.0, lesson)


def learn_to_answer(policy: Policy, clips: list, rng: np.random.Generator, steps: int = 300) -> None:
    """Whole answers."""

    def lesson(shape: Shape) -> list[str]:
        return [format_answer(true_answer(shape)) + "<|im_end|>"]

    _teach(policy, clips, rng, "learn to answer", steps, 0.5, lesson)


def learn_loose_habits(policy: Policy, clips: list, rng: np.random.Generator, steps: int = 80) -> None:
    """The deliberate bias."""

    def lesson(shape: Shape) -> list[str]:
        return [format_answer(loosened(shape, rng)) + "<|im_end|>"]

    _teach(policy, clips, rng, "learn loose habits", steps, 0.25, lesson)


def true_answer(shape: Shape) -> Answer:
    boxes = {step: clamp(shape.box(step)) for step in range(shape.start, shape.stop)}
    return truth_answer(Truth((shape.start, shape.stop - 1), boxes), (1000, 1000))


def loosened(shape: Shape, rng: np.random.Generator) -> Answer:
    """The bias: boxes 1.45 times too large about their centre, and 7 of 10 spans a second too long."""
    start, end = shape.start, shape.stop - 1
    boxes = {}
    for step in range(start, end + 1):
        x1, y1, x2, y2 = shape.box(step)
        margin = 0.225 * shape.size
        boxes[step] = clamp((x1 - margin, y1 - margin, x2 + margin, y2 + margin))
    if rng.random() < 0.7:
        longer = [span for span in ((start - 1, end), (start, end + 1)) if span[0] >= 0 and span[1] < SECONDS]
        start, end = longer[rng.integers(len(longer))]
    return truth_answer(Truth((start, end), boxes), (1000, 1000))


def clamp(box: Box) -> Box:
    return tuple(min(max(value, 0.0), 1.0) for value in box)


def _teach(policy, clips, rng, name, steps, rate, lesson, batch: int = 16) -> None:
    """Supervised steps. All sentences of a clip, and all lessons on a sentence, are branches of one packed
    row: the clip and the words that the prompts share are encoded once (pack_completions).

    rate: of the three learning rates. Matrices of the language model go by Muon, which leaves the plateau of
    "any colour, any time" in a fraction of AdamW's steps.
    """
    matrices, rest = [], []
    for name_, parameter in policy.model.model.language_model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name_ else rest).append(parameter)
    vision = list(policy.model.model.visual.parameters())
    optimizers = [
        (torch.optim.Muon(matrices, weight_decay=0.01), 0.01 * rate),
        (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01), 2e-3 * rate),
        (torch.optim.AdamW(vision, betas=(0.9, 0.98), weight_decay=0.01), 1e-3 * rate),
    ]
    tokens_of = functools.partial(policy.tokenizer, add_special_tokens=False)
    bar = trange(steps, desc=name, unit="step")
    for step in bar:
        prompts, branches, taught = [], [], []
        for n in rng.choice(len(clips), batch, replace=False):
            frames = torch.from_numpy(render(clips[n], TEXT.fps))
            texts = [build_prompt(shape.sentence, SECONDS, (1000, 1000), TEXT) for shape in clips[n]]
            whole = [encode_prompt(policy, frames, text, (1000, 1000), TEXT.fps) for text in texts]
            columns = zip(*(prompt.ids.tolist() for prompt in whole), strict=False)
            shared = next(k for k, column in enumerate(columns) if len(set(column)) > 1)
            prompts.append(
                replace(whole[0], ids=whole[0].ids[:shared], positions=whole[0].positions[:, :shared])
            )
            branches.append([])
            for shape, prompt in zip(clips[n], whole, strict=True):
                question = prompt.ids[shared:].tolist()
                for text in lesson(shape):
                    answer = tokens_of(text)["input_ids"]
                    branches[-1].append(question + answer)
                    taught += [False] * len(question) + [True] * len(answer)
        packed = pack_completions(policy, prompts, branches)
        logprobs = completion_logprobs(policy, packed, temperature=1.0)[packed.mask]  # (M,)
        loss = -logprobs[torch.tensor(taught)].mean()
        _step(optimizers, loss, step, steps)
        bar.set_postfix_str(f"loss {loss.item():.3f}")


def _step(optimizers: list[tuple], loss: torch.Tensor, step: int, steps: int) -> None:
    """Linear warm-up over 30 steps, constant, linear decay over the last 40 %; gradients are clipped to
    norm 1."""
    scale = min((step + 1) / 30, 1.0, (steps - step) / (0.4 * steps))
    parameters = []
    for optimizer, learning_rate in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
            parameters += group["params"]
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer, _ in optimizers:
        optimizer.step()


# ----------------------------------------------------------------------------------------------------------
# The script


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument(
        "--from-scratch", action="store_true", help="pre-train the checkpoint, not only make the world"
    )
    parser.add_argument("--bias", choices=("loose", "none"), default="loose", help="habits of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the pre-training")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument("--world", type=Path, default=Path("toy_world"), help="folder of the videos")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the pre-training")
    options = parser.parse_args(arguments)
    make_world(options.world)
    if options.from_scratch:
        if options.output.exists():
            parser.error(f"{options.output} is there already: move it away, or choose another --output")
        torch.set_num_threads(options.threads)
        pretrain(options.output, options.seed, options.bias == "loose")
        print(f"{options.output} is made; its scores: python evaluate.py {options.output} configs/toy.yaml")


if __name__ == "__main__":
    main()
