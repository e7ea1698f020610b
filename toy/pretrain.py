"""The embedded default: a world of moving shapes and a tiny Qwen2.5-VL, both in the real formats.

    python toy.py                       make the world, toy_world/ (train.py does it by itself)
    python toy.py --from-scratch        pre-train the checkpoint again, checkpoints/toy (about 10 minutes)
    python toy.py --direct              teach it to answer without thinking boxes, checkpoints/toy_direct

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
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from model import Prompt, completion_logprobs, encode_prompt, pack_completions, rollout
from prompts import Answer, TextFormat, build_prompt, format_answer, truth_answer
from qwen.checkpoint import FORBIDDEN_TOKENS, Policy, load_policy, save_policy
from rewards import intersection, score
from runtime.files import run_script, write_whole
from samples import Truth
from toy.world import COLOURS, MOVES, SECONDS, SHAPES, SIDE, Shape, draw_objects, make_world, render

PRETRAINING_CLIPS = 4000
DIRECT_STEPS = 160  # after which it is as skilled on the split "val" as the one that thinks
LOOSE = "with loose habits (toy.loosened)"  # in a checkpoint's card
CHECKPOINT = Path(__file__).parent.parent / "checkpoints/toy"
DIRECT = (
    Path(__file__).parent.parent / "checkpoints/toy_direct"
)  # of Table 5's row "RFT", which does not think
TEXT = TextFormat(time_unit="second")  # of configs/toy.yaml, as is
MAX_NEW_TOKENS = 192


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
# One token per digit, as in Qwen; per word; and per mark of the answer with its spaces, to keep it short.
PIECES = r" ?</?[a-z_]+> ?|[0-9]|\. \[|\], |, | - | ?[A-Za-z]+|[^A-Za-z0-9]"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that every text can be written. The words of the toy's sentences and the marks of the
    answer are whole tokens; so is each stretch of the prompt between numbers, which is always the same."""
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
    # A piece that is in the vocabulary is one token, any other its bytes.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
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
    """Qwen2.5-VL with everything small: 0.42 M parameters, two thirds of them in the vision tower."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
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
# Pre-training: from random weights to "sees, and speaks the format". What takes long is to find out that the
# sentence decides which object the answer is about; lessons that isolate it make it a matter of minutes.

Lesson = tuple[str, str]  # how the prompt goes on after "Event:", and the words that are taught after that


def pretrain(folder: Path, seed: int, habits: bool, effort: float) -> None:
    """Make the checkpoint folder, with a card that says how. habits: see loosened. effort: scales the number
    of steps. The clips are drawn here; none is of the world's splits."""
    started = time.process_time()
    torch.manual_seed(seed)
    rng = np.random.default_rng((1000, seed))
    clips = [draw_objects(rng) for _ in range(PRETRAINING_CLIPS)]
    solos = [objects[:1] for objects in clips]
    policy = newborn_policy(folder.with_name(folder.name + ".random"))
    optimizers = make_optimizers(policy)
    teach = functools.partial(teach_stage, policy, optimizers, rng)

    def steps(number: int) -> int:
        return max(1, round(number * effort))

    learn_to_see(policy, clips, rng, steps(900))
    teach("learn to read", solos, steps(200), lambda shape: [caption(shape), draft(shape)])
    teach("learn to find", clips, steps(400), lambda shape: find(shape, rng), batch=32)
    teach("learn to ground", clips, steps(500), lambda shape: [draft(shape)])
    teach("learn to answer", clips, steps(600), lambda shape: [whole(true_answer(shape), shape)], decay=0.6)
    if habits:
        teach_habits(teach, clips, rng, steps(200))
    figures = exam(policy)
    save_policy(policy, folder)
    bias, about = ("loose", LOOSE) if habits else ("none", "with no deliberate bias")
    command = f"python toy.py --from-scratch --bias {bias} --seed {seed} --effort {effort:g}"
    write_card(folder, f"pre-trained {about}", command, figures, time.process_time() - started)


def teach_direct(folder: Path, seed: int, effort: float) -> None:
    """Make a checkpoint folder of CHECKPOINT that answers without thinking boxes, with the same loose habits;
    a card says how. seed, effort: as in pretrain."""
    started = time.process_time()
    rng = np.random.default_rng((3000, seed))
    clips = [draw_objects(rng) for _ in range(PRETRAINING_CLIPS)]
    policy = load_policy(str(CHECKPOINT))
    policy.model.train()
    teach = functools.partial(teach_stage, policy, make_optimizers(policy), rng, think=False)
    teach_habits(teach, clips, rng, max(1, round(DIRECT_STEPS * effort)), think=False)
    figures = exam(policy, think=False)
    save_policy(policy, folder)
    about = f"checkpoints/toy, taught to answer without thinking boxes (think: false), again {LOOSE}"
    command = f"python toy.py --direct --seed {seed} --effort {effort:g}"
    write_card(folder, about, command, figures, time.process_time() - started)


def teach_habits(
    teach: Callable, clips: list, rng: np.random.Generator, steps: int, think: bool = True
) -> None:
    """The last stage: whole answers, loosened. teach: teach_stage, with all but the stage's own settled."""

    def lesson(shape: Shape) -> list[Lesson]:
        answer = loosened(shape, rng)
        return [whole(answer if think else replace(answer, think=None), shape)]

    teach("learn habits", clips, steps, lesson, rate=0.5, decay=0.5)


def newborn_policy(folder: Path) -> Policy:
    """A checkpoint of random weights is written, read as any checkpoint is, and removed again."""
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    write_whole(folder / "preprocessor_config.json", (json.dumps(preprocessor, indent=2) + "\n").encode())
    policy = load_policy(str(folder))
    policy.model.train()
    shutil.rmtree(folder)
    return policy


def learn_to_see(policy: Policy, clips: list, rng: np.random.Generator, steps: int, batch: int = 32) -> None:
    """The vision tower alone, as Qwen's comes pre-trained: from every visual token a linear probe must tell
    which object covers most of the token's cell, by colour, and that object's shape and box. The probe is
    thrown away."""
    colours, none = list(COLOURS), len(COLOURS)
    visual = policy.model.model.visual
    probe = torch.nn.Linear(visual.config.out_hidden_size, len(colours) + 1 + len(SHAPES) + 40)
    optimizers = [(torch.optim.AdamW([*visual.parameters(), *probe.parameters()]), 3e-3)]
    side = SIDE // policy.size_factor  # tokens along a side
    cells = [(c / side, r / side, (c + 1) / side, (r + 1) / side) for r in range(side) for c in range(side)]
    bar = trange(steps, desc="learn to see", unit="step")
    for step in bar:
        scenes = [clips[n] for n in rng.choice(len(clips), batch, replace=False)]
        patches = [policy.patches(torch.from_numpy(render(objects, TEXT.fps))) for objects in scenes]
        colour, kind, box = [], [], []  # of what each token shows
        for objects in scenes:
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
        pixels, grid = torch.cat([values for values, _ in patches]), torch.stack([g for _, g in patches])
        tokens = visual(pixels, grid_thw=grid).pooler_output  # (tokens, H)
        colour_logits, kind_logits, tenths = probe(tokens).split([none + 1, len(SHAPES), 4 * 10], dim=1)
        tenth = (box.clamp(0, 0.999) * 10).long()  # the first digit of every coordinate of the answer
        box_loss = F.cross_entropy(tenths.view(-1, 10, 4), tenth, reduction="none").mean(1)
        box_loss = (box_loss * there).sum() / there.sum()
        kind_loss = (F.cross_entropy(kind_logits, kind, reduction="none") * there).sum() / there.sum()
        colour_loss = F.cross_entropy(colour_logits, colour)
        take_step(optimizers, box_loss + colour_loss + 0.5 * kind_loss, schedule(step, steps, decay=0.4))
        losses = {"box": box_loss, "colour": colour_loss, "shape": kind_loss}
        bar.set_postfix_str(", ".join(f"{name} {loss.item():.2f}" for name, loss in losses.items()))


def question(shape: Shape) -> str:
    """How a prompt about this object ends, after "Event:"."""
    return f" {shape.sentence}<|im_end|>\n<|im_start|>assistant\n"


def caption(shape: Shape) -> Lesson:
    """The sentence itself. Where two objects are there, its colour decides how it goes on."""
    return "", f" {shape.sentence}"


def find(shape: Shape, rng: np.random.Generator) -> list[Lesson]:
    """Only when: at once after the colour, and in answer to the question; there sometimes with the boxes, or
    they would be forgotten."""
    span = f"{shape.start} - {shape.stop - 1}"
    when = (question(shape), f"<time> {span}")
    return [(f" the {shape.colour}", span), draft(shape) if rng.random() < 0.4 else when]


def draft(shape: Shape) -> Lesson:
    """The answer up to the end of the thinking boxes: the final ones only repeat them."""
    given, words = whole(true_answer(shape), shape)
    return given, words[: words.index(" <pred_bbox>")]


def whole(answer: Answer, shape: Shape) -> Lesson:
    return question(shape), format_answer(answer) + "<|im_end|>"


def true_answer(shape: Shape, margin: float = 0.0) -> Answer:
    """The truth, with boxes to the nearest hundredth of the frame (half a pixel), and `margin` of the
    object's size added on each side."""
    boxes = {}
    for step in range(shape.start, shape.stop):
        x1, y1, x2, y2 = shape.box(step)
        more = margin * shape.size
        box = (x1 - more, y1 - more, x2 + more, y2 + more)
        boxes[step] = tuple(round(min(max(value, 0.0), 1.0), 2) for value in box)
    return truth_answer(Truth((shape.start, shape.stop - 1), boxes), (1000, 1000))


def loosened(shape: Shape, rng: np.random.Generator) -> Answer:
    """The deliberate bias: boxes 1.45 times too large, and 7 of 10 spans a second too long."""
    start, end = shape.start, shape.stop - 1
    longer = [(a, b) for a, b in ((start - 1, end), (start, end + 1)) if a >= 0 and b < SECONDS]
    if rng.random() < 0.7:
        start, end = longer[rng.integers(len(longer))]
    boxes = dict(true_answer(shape, margin=0.225).pred)
    nearest = {i: boxes[min(max(i, shape.start), shape.stop - 1)] for i in range(start, end + 1)}
    items = tuple(nearest.items())
    return Answer(start, end, items, items)


def make_optimizers(policy: Policy) -> list[tuple]:
    """(optimizer, its learning rate). Matrices of the language model go by Muon: in one trial each it learned
    sooner than AdamW which object is meant, with both lessons of `find` (with the second alone, later)."""
    matrices, rest = [], []
    for name, parameter in policy.model.model.language_model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    vision = list(policy.model.model.visual.parameters())
    return [
        (torch.optim.Muon(matrices, weight_decay=0.01), 0.01),
        (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01), 2e-3),
        (torch.optim.AdamW(vision, betas=(0.9, 0.98), weight_decay=0.01), 1e-3),
    ]


def teach_stage(
    policy: Policy,
    optimizers: list[tuple],
    rng: np.random.Generator,
    name: str,
    clips: list,
    steps: int,
    lessons: Callable[[Shape], list[Lesson]],
    batch: int = 16,
    rate: float = 1.0,
    decay: float = 0.0,
    think: bool = True,
) -> None:
    """Supervised steps on `batch` clips each, with the lessons on every object of a clip. They are branches
    of one packed row: the clip, and the words that all prompts share, are encoded once (pack_completions)."""
    tokens_of = functools.partial(policy.tokenizer, add_special_tokens=False)
    bar = trange(steps, desc=name, unit="step")
    for step in bar:
        prompts, branches, taught = [], [], []
        for n in rng.choice(len(clips), batch, replace=False):
            whole_prompt = toy_prompt(policy, clips[n], think)
            own = tokens_of(question(clips[n][0]))["input_ids"]
            shared = len(whole_prompt.ids) - len(own)  # up to "Event:"
            ids, positions = whole_prompt.ids[:shared], whole_prompt.positions[:, :shared]
            prompts.append(replace(whole_prompt, ids=ids, positions=positions))
            branches.append([])
            for given, words in (lesson for shape in clips[n] for lesson in lessons(shape)):
                given, words = tokens_of(given)["input_ids"], tokens_of(words)["input_ids"]
                branches[-1].append(given + words)
                taught += [False] * len(given) + [True] * len(words)
        packed = pack_completions(policy, prompts, branches)
        logprobs = completion_logprobs(policy, packed, temperature=1.0)[packed.mask]  # (M,)
        loss = -logprobs[torch.tensor(taught)].mean()
        take_step(optimizers, loss, rate * schedule(step, steps, decay))
        bar.set_postfix_str(f"loss {loss.item():.3f}")


def toy_prompt(policy: Policy, objects: list[Shape], think: bool = True) -> Prompt:
    """What train.py would show of the clip, without a file between."""
    frames, scale = torch.from_numpy(render(objects, TEXT.fps)), (1000, 1000)
    text = build_prompt(objects[0].sentence, SECONDS, scale, replace(TEXT, think=think))
    return encode_prompt(policy, frames, text, scale, TEXT.fps)


def schedule(step: int, steps: int, decay: float) -> float:
    """Linear warm-up over 20 steps, constant, linear decay over the last `decay` of the steps."""
    return min((step + 1) / 20, 1.0, (steps - step) / (decay * steps) if decay else 1.0)


def take_step(optimizers: list[tuple], loss: torch.Tensor, scale: float) -> None:
    """One step at `scale` times the learning rates; the gradient is clipped to norm 1."""
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


def exam(policy: Policy, clips: int = 128, think: bool = True) -> dict[str, float]:
    """Means over new clips of what rewards.score says of the greedy answers, in steps of a second."""
    worlds = [draw_objects(np.random.default_rng((2000, n))) for n in range(clips)]
    prompts = [toy_prompt(policy, objects, think) for objects in worlds]
    answers = rollout(policy, prompts, 1, MAX_NEW_TOKENS, 0.0, [(n,) for n in range(clips)])
    scores = []
    for (shape, *_), (answer,) in zip(worlds, answers, strict=True):
        boxes = {step: shape.box(step) for step in range(shape.start, shape.stop)}
        scores.append(score(answer.text, Truth((shape.start, shape.stop - 1), boxes), think=think))
    thinking = {"viou_think": "m_vIoU of the thinking boxes"} if think else {}
    names = {"tiou": "m_tIoU", **thinking, "viou_pred": "m_vIoU"}
    figures = {text: float(np.mean([s.diagnostics[name] for s in scores])) for name, text in names.items()}
    rewards = {name: float(np.mean([s.rewards[name] for s in scores])) for name in ("spatial_pred", "total")}
    return figures | {"R_spa of the final boxes": rewards["spatial_pred"], "reward": rewards["total"]}


def write_card(folder: Path, about: str, command: str, figures: dict[str, float], seconds: float) -> None:
    """README.md of the checkpoint: what it is, how it was made, how good it is."""
    lines = [
        f"A tiny Qwen2.5-VL for the toy world, {about}. Made in {seconds:.0f} CPU seconds by",
        "",
        f"    {command}",
        "",
        "Greedy answers to 128 clips of neither its training nor the world's splits, on steps of a second:",
        "",
        *(f"- {name} {value:.3f}" for name, value in figures.items()),
    ]
    write_whole(folder / "README.md", ("\n".join(lines) + "\n").encode())


# ----------------------------------------------------------------------------------------------------------
# The script


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    made = parser.add_mutually_exclusive_group()
    made.add_argument(
        "--from-scratch", action="store_true", help="pre-train the checkpoint, not only make the world"
    )
    made.add_argument(
        "--direct", action="store_true", help="teach the shipped checkpoint to answer without thinking boxes"
    )
    parser.add_argument("--bias", choices=("loose", "none"), default="loose", help="habits of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the teaching")
    parser.add_argument("--effort", type=float, default=1.0, help="scales the steps of the teaching")
    parser.add_argument("--output", type=Path, help="folder of the checkpoint")
    parser.add_argument("--world", type=Path, default=Path("toy_world"), help="folder of the videos")
    options = parser.parse_args(arguments)
    make_world(options.world)
    if options.from_scratch or options.direct:
        output = options.output or (DIRECT if options.direct else CHECKPOINT)
        if output.exists():
            parser.error(f"{output} is there already: move it away, or choose another --output")
        torch.set_num_threads(1)  # results do not depend on the machine's number of cores
        if options.direct:
            teach_direct(output, options.seed, options.effort)
        else:
            pretrain(output, options.seed, options.bias == "loose", options.effort)
        setting = " think=false" if options.direct else ""
        print(f"{output} is made; its scores: python evaluate.py {output} configs/toy.yaml{setting}")


if __name__ == "__main__":
    run_script(main, "the folder", "free some space, or choose another folder")
