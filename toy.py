"""The embedded default: a world of moving shapes and a tiny Qwen2.5-VL, both in the real formats.

    python toy.py                       make the world, toy_world/ (train.py does it by itself)
    python toy.py --from-scratch        pre-train the checkpoint again, checkpoints/toy (about 10 minutes)

The world: clips of 6 s in which coloured shapes appear, move and vanish; each sentence singles one of them out. It is
written as HC-STVG annotations and video files (.y4m, which needs no encoder), and read back like any data set.

The checkpoint stands for the off-the-shelf model: it sees, it knows the answer format, but not the *convention* of
this data set's annotations: it was taught loose boxes and spans that often run a second too long (--bias none leaves
this out). Reinforcement learning has to find the convention from the rewards.
"""

import argparse
import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from model import FORBIDDEN_TOKENS, Policy, Prompt, completion_logprobs, encode_prompt, load_policy, pack_completions, save_policy
from prompts import Answer, Box, TextFormat, Truth, build_prompt, format_answer, to_text_box, truth_answer

# --- the world
SIDE, SECONDS, NATIVE_FPS = 56, 6, 4  # pixels, length of a clip, frames per second of the files
COLOURS = {"red": (215, 40, 40), "green": (40, 165, 60), "blue": (50, 80, 220), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "triangle")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OBJECTS = 2  # one is asked for, the others distract
SPEED = 0.14  # frame widths per second
SPLITS = {"train": (800, 1), "val": (256, 2), "test": (256, 3)}  # name: (clips, seed)
TEXT = TextFormat(time_unit="second")  # of configs/toy.yaml


# ------------------------------------------------------------------------------------------------------------
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
        x, y = (o + d * SPEED * (seconds - self.start) for o, d in zip(self.origin, MOVES[self.move], strict=True))
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
        objects.append(Shape(str(colour), str(kind), str(move), size, origin, int(start), int(start + length)))
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
_RGB_TO_YCBCR = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255


def to_ycbcr(frames: np.ndarray) -> np.ndarray:
    """uint8 RGB (..., 3) -> uint8 Y, Cb, Cr (..., 3)."""
    return (frames @ _RGB_TO_YCBCR.T + (16, 128, 128)).round().clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------
# The tiny Qwen2.5-VL

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *FORBIDDEN_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
# One token per digit as in Qwen; per word; and per mark of the answer together with its spaces, to keep it short.
PIECES = r" ?</?[a-z_]+> ?|[0-9]|\. \[|\], |, | - | ?[A-Za-z]+|[^A-Za-z0-9]"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that every text can be written; the words of the toy's prompts and answers are whole tokens."""
    example = truth_answer(Truth((0, 1), {0: (0, 0, 1, 1)}), (1000, 1000))
    texts = [build_prompt("", SECONDS, (1000, 1000), TEXT), format_answer(example), "user\n", "assistant\n0123456789"]
    texts += [f"the {c} {s} moves {m}" for c in COLOURS for s in SHAPES for m in MOVES]
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Sequence([split, bytes_])
    words = sorted({piece for text in texts for piece, _ in pieces.pre_tokenize_str(text)})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: k for k, token in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *alphabet, *words]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))  # a known piece is a token, else its bytes
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
    """Qwen2.5-VL with everything small: 0.4 M parameters, more than half of them in the vision tower's merger."""
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


# ------------------------------------------------------------------------------------------------------------
# Pre-training: from random weights to "sees, and speaks the format", in three stages of growing difficulty


def pretrain(folder: Path, seed: int, bias: bool) -> None:
    """Make the checkpoint folder. Clips are drawn afresh, never from the splits of the world."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    folder.mkdir(parents=True)
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")
    policy = load_policy(str(folder))
    policy.model.train()
    rng = np.random.default_rng((seed, 0))
    learn_to_see(policy, rng)
    learn_to_ground(policy, rng)
    learn_to_answer(policy, rng, bias)
    policy.model.eval()
    policy.model.save_pretrained(folder)


def learn_to_see(policy: Policy, rng: np.random.Generator, steps: int = 400, clips: int = 32) -> None:
    """The vision tower alone, as Qwen's comes pre-trained: a linear probe on the mean token of every second must tell
    for each colour whether it is there, its box, and its shape. The probe is thrown away."""
    colours, width = list(COLOURS), 1 + 4 + len(SHAPES)
    visual = policy.model.model.visual
    probe = torch.nn.Linear(visual.config.out_hidden_size, len(colours) * width)
    parameters = [*visual.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for step in trange(steps, desc="learn to see", unit="step"):
        _set_learning_rate(optimizer, 3e-3, step, steps)
        worlds = [draw_objects(rng) for _ in range(clips)]
        there = torch.zeros(clips, SECONDS, len(colours))
        boxes = torch.zeros(clips, SECONDS, len(colours), 4)
        kinds = torch.zeros(clips, SECONDS, len(colours), dtype=torch.long)
        for n, objects in enumerate(worlds):
            for shape in objects:
                for second in range(shape.start, shape.stop):
                    at = (n, second, colours.index(shape.colour))
                    there[at], kinds[at] = 1, SHAPES.index(shape.kind)
                    boxes[at] = torch.tensor(shape.box(second))
        patches = [policy.patches(torch.from_numpy(render(objects, TEXT.fps))) for objects in worlds]
        grid = torch.stack([grid for _, grid in patches])
        tokens = visual(torch.cat([values for values, _ in patches]), grid_thw=grid).pooler_output
        out = probe(tokens.view(clips, SECONDS, -1, tokens.shape[-1]).mean(2))
        out = out.view(clips, SECONDS, len(colours), width)
        box_loss = ((out[..., 1:5] - boxes).abs().sum(-1) * there).sum() / there.sum()
        there_loss = F.binary_cross_entropy_with_logits(out[..., 0], there)
        kind_loss = F.cross_entropy(out[..., 5:].flatten(0, 2), kinds.flatten(), reduction="none")
        kind_loss = (kind_loss * there.flatten()).sum() / there.sum()
        loss = 4 * box_loss + 2 * there_loss + 0.5 * kind_loss
        _step(optimizer, parameters, loss)


def learn_to_ground(policy: Policy, rng: np.random.Generator, steps: int = 1200) -> None:
    """Short prompts, short answers: the sentence alone, then the span and the first digits of one box, for every step
    of the span. All there is to learn is which object, when and where; with the long prompt it takes much longer."""

    def lesson(shape: Shape) -> list[str]:
        start, end = shape.start, shape.stop - 1
        boxes = {step: to_text_box(clamp(shape.box(step)), (1000, 1000)) for step in range(start, end + 1)}
        opening = f"<time> {start} - {end} </time> <think_bbox> "
        return [f"{opening}{step}. [{', '.join(map(str, box))}" for step, box in boxes.items()]

    _teach(policy, rng, "learn to ground", steps, 2e-3, lambda sentence: sentence, lesson)


def learn_to_answer(policy: Policy, rng: np.random.Generator, bias: bool, steps: int = 500) -> None:
    """The real prompt and whole answers; the last fifth of the steps with the bias."""

    def prompt(sentence: str) -> str:
        return build_prompt(sentence, SECONDS, (1000, 1000), TEXT)

    def lesson(shape: Shape, loose: bool = False) -> list[str]:
        truth = loosened(shape, rng) if loose else true_answer(shape)
        return [format_answer(truth) + "<|im_end|>"]

    _teach(policy, rng, "learn to answer", steps, 1e-3, prompt, lesson)
    if bias:
        loose = functools.partial(lesson, loose=True)
        _teach(policy, rng, "learn loose habits", steps // 4, 5e-4, prompt, loose)


def true_answer(shape: Shape) -> Answer:
    steps = range(shape.start, shape.stop)
    truth = Truth((shape.start, shape.stop - 1), {step: clamp(shape.box(step)) for step in steps})
    return truth_answer(truth, (1000, 1000))


def loosened(shape: Shape, rng: np.random.Generator) -> Answer:
    """The deliberate bias: boxes 1.45 times too large about their centre, and 7 of 10 spans a second too long."""
    start, end = shape.start, shape.stop - 1
    boxes = {}
    for step in range(start, end + 1):
        x1, y1, x2, y2 = shape.box(step)
        dx, dy = 0.225 * (x2 - x1), 0.225 * (y2 - y1)
        boxes[step] = clamp((x1 - dx, y1 - dy, x2 + dx, y2 + dy))
    if rng.random() < 0.7:
        longer = [span for span in ((start - 1, end), (start, end + 1)) if span[0] >= 0 and span[1] < SECONDS]
        start, end = longer[rng.integers(len(longer))]
    return truth_answer(Truth((start, end), boxes), (1000, 1000))


def clamp(box: Box) -> Box:
    return tuple(min(max(value, 0.0), 1.0) for value in box)


def _teach(policy, rng, name, steps, learning_rate, prompt_text, lesson, clips: int = 16) -> None:
    """Supervised steps on fresh clips. All sentences of a clip, and all lessons on a sentence, are branches of one
    packed row: the clip and the words that the prompts share are encoded once (pack_completions)."""
    parameters = list(policy.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    closing = "<|im_end|>\n<|im_start|>assistant\n"
    tokens_of = functools.partial(policy.tokenizer, add_special_tokens=False)
    bar = trange(steps, desc=name, unit="step")
    for step in bar:
        _set_learning_rate(optimizer, learning_rate, step, steps)
        prompts, branches, taught = [], [], []
        for _ in range(clips):
            objects = draw_objects(rng)
            frames = torch.from_numpy(render(objects, TEXT.fps))
            whole = encode_prompt(policy, frames, prompt_text(""), (1000, 1000), TEXT.fps)
            shared = len(whole.ids) - len(tokens_of(closing)["input_ids"])
            prompts.append(replace(whole, ids=whole.ids[:shared], positions=whole.positions[:, :shared]))
            branches.append([])
            for shape in objects:
                question = tokens_of(shape.sentence + closing)["input_ids"]
                for text in lesson(shape):
                    answer = tokens_of(text)["input_ids"]
                    branches[-1].append(question + answer)
                    taught += [False] * len(question) + [True] * len(answer)
        batch = pack_completions(policy, prompts, branches)
        logprobs = completion_logprobs(policy, batch, temperature=1.0)[batch.mask]  # (M,)
        loss = -logprobs[torch.tensor(taught)].mean()
        _step(optimizer, parameters, loss)
        bar.set_postfix_str(f"loss {loss.item():.3f}")


def _set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Linear warm-up over 30 steps, constant, linear decay over the last 40 %."""
    scale = min((step + 1) / 30, 1.0, (steps - step) / (0.4 * steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * scale


def _step(optimizer: torch.optim.Optimizer, parameters: list, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
