"""Pre-train the toy's checkpoint: a tiny Qwen2.5-VL that sees and knows the answer format.

    python -m toy.pretrain              make checkpoints/toy again (10 minutes)
    python -m toy.pretrain --direct     make checkpoints/toy_direct, which answers without thinking boxes

The checkpoint stands for the off-the-shelf model. It does not know the *convention* of this data set's
annotations: it was taught boxes that are too large and spans that are often a second too long (`loosened`;
--bias none leaves this out). Reinforcement learning has to find the convention from the rewards.
"""

import json
import re
import shutil
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from model import Prompt, completion_logprobs, encode_prompt, pack_completions, rollout
from prompts import Answer, TextFormat, build_prompt, format_answer, truth_answer
from qwen.checkpoint import FORBIDDEN_TOKENS, TOKEN_IDS, Policy, load_policy
from rewards import intersection, score
from runtime.files import run_script, write_whole
from samples import Truth
from toy.world import COLOURS, MOVES, SECONDS, SHAPES, SIDE, Shape, draw_objects, render

PRETRAINING_CLIPS, EXAM_CLIPS = 4000, 128
CHECKPOINT = Path(__file__).parent.parent / "checkpoints/toy"
DIRECT = CHECKPOINT.with_name("toy_direct")  # for Table 5's row "RFT", which does not think
TEXT = TextFormat(time_unit="second")  # as configs/toy.yaml has it
MAX_NEW_TOKENS = 192
LOOSE = "with loose habits (toy/pretrain.py: loosened)"  # in a checkpoint's card


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *FORBIDDEN_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# One token for a digit, as in Qwen, for a word, and for a mark of the answer with its spaces.
PIECES = r" ?</?[a-z_]+> ?|[0-9]|\. \[|\], |, | - | ?[A-Za-z]+|[^A-Za-z0-9]"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, which can write every text. Whole tokens are the words of the toy's sentences,
    the marks of the answer, and each stretch of the prompt between numbers, which is always the same."""
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
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    special |= {"additional_special_tokens": list(SPECIAL_TOKENS[1:])}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with everything small: 0.42 M parameters, two thirds of them in the vision tower."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    # With initializer_range 0.02 the first hundred steps go into growing the weights.
    both = {"hidden_size": 64, "initializer_range": 0.08}
    text = both | {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"intermediate_size": 192, "vocab_size": len(tokenizer), "rms_norm_eps": 1e-6}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
    text |= {"tie_word_embeddings": True, "bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad}
    vision = both | {"depth": 2, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 64}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2}
    vision |= {"window_size": 112, "fullatt_block_indexes": [0, 1]}
    marks = {"image_token_id": ids["<|image_pad|>"]} | {name: ids[mark] for name, mark in TOKEN_IDS.items()}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **marks)
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")


def newborn_policy(folder: Path) -> Policy:
    """Random weights: a checkpoint is written, read as any checkpoint is, and removed again."""
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    write_whole(folder / "preprocessor_config.json", (json.dumps(preprocessor, indent=2) + "\n").encode())
    policy = load_policy(str(folder))
    shutil.rmtree(folder)
    return policy


# Lessons. What takes long to learn is that the sentence decides which object the answer is about; lessons
# that isolate this make it a matter of minutes.

Lesson = tuple[str, str]  # how the prompt continues after "Event:", and the words that are taught after that


def question(shape: Shape) -> str:
    """How a prompt about this object ends, after "Event:"."""
    return f" {shape.sentence}<|im_end|>\n<|im_start|>assistant\n"


def whole(answer: Answer, shape: Shape) -> Lesson:
    return question(shape), format_answer(answer) + "<|im_end|>"


def draft(shape: Shape) -> Lesson:
    """The answer up to the end of the thinking boxes: the final ones only repeat them."""
    given, words = whole(true_answer(shape), shape)
    return given, words[: words.index(" <pred_bbox>")]


def find(shape: Shape, rng: np.random.Generator) -> list[Lesson]:
    """Only when: right after the colour, and in answer to the question, there sometimes with the boxes, or
    they would be forgotten."""
    span = f"{shape.start} - {shape.stop - 1}"
    when = (question(shape), f"<time> {span}")
    return [(f" the {shape.colour}", span), draft(shape) if rng.random() < 0.4 else when]


def true_answer(shape: Shape, margin: float = 0.0) -> Answer:
    """The truth, with boxes to the nearest hundredth of the frame (half a pixel), and `margin` of the
    object's size added on each side."""
    more, boxes = margin * shape.size, {}
    for step in range(shape.start, shape.stop):
        x1, y1, x2, y2 = shape.box(step)
        box = (x1 - more, y1 - more, x2 + more, y2 + more)
        boxes[step] = tuple(round(min(max(value, 0.0), 1.0), 2) for value in box)
    return truth_answer(Truth((shape.start, shape.stop - 1), boxes), (1000, 1000))


def loosened(shape: Shape, rng: np.random.Generator, think: bool = True) -> Answer:
    """The deliberate bias: boxes 1.45 times too large, and 7 of 10 spans a second too long."""
    start, end = shape.start, shape.stop - 1
    longer = [(a, b) for a, b in ((start - 1, end), (start, end + 1)) if a >= 0 and b < SECONDS]
    if rng.random() < 0.7:
        start, end = longer[rng.integers(len(longer))]
    boxes = dict(true_answer(shape, margin=0.225).pred)
    items = tuple((i, boxes[min(max(i, shape.start), shape.stop - 1)]) for i in range(start, end + 1))
    return Answer(start, end, items if think else None, items)


def see_loss(policy: Policy, probe: torch.nn.Linear, clips: list[list[Shape]]) -> torch.Tensor:
    """The loss of the vision tower alone (Qwen's is pre-trained, too): from each visual token a linear probe
    must tell which object covers most of the token's cell, by colour, and that object's shape and box."""
    colours, none, side = list(COLOURS), len(COLOURS), SIDE // policy.size_factor  # side: in tokens
    cells = [(c / side, r / side, (c + 1) / side, (r + 1) / side) for r in range(side) for c in range(side)]

    def shown(objects: list[Shape], second: int, cell: tuple) -> tuple[int, int, tuple]:
        """(colour, shape, box) of the object that a token shows."""
        visible = [shape for shape in objects if shape.box(second)]
        covered = [intersection(shape.box(second), cell) for shape in visible]
        if max(covered, default=0) <= 0:
            return none, 0, (0, 0, 0, 0)
        best = visible[int(np.argmax(covered))]
        return colours.index(best.colour), SHAPES.index(best.kind), best.box(second)

    truth = [shown(objects, t, cell) for objects in clips for t in range(SECONDS) for cell in cells]
    colour, kind, box = map(torch.tensor, zip(*truth, strict=True))  # (tokens,), (tokens,), (tokens, 4)
    there = (colour != none).float()
    patches, grids = zip(*(policy.patches(torch.from_numpy(render(c, TEXT.fps))) for c in clips), strict=True)
    tokens = policy.model.model.visual(torch.cat(patches), grid_thw=torch.stack(grids)).pooler_output
    of_colour, of_kind, of_box = probe(tokens).split([none + 1, len(SHAPES), 4 * 10], dim=1)
    tenth = (box.clamp(0, 0.999) * 10).long()  # the first digit of every coordinate of the answer
    box_loss = F.cross_entropy(of_box.view(-1, 10, 4), tenth, reduction="none").mean(1)
    box_loss = (box_loss * there).sum() / there.sum()
    kind_loss = (F.cross_entropy(of_kind, kind, reduction="none") * there).sum() / there.sum()
    return box_loss + F.cross_entropy(of_colour, colour) + 0.5 * kind_loss


def lesson_loss(policy: Policy, clips: list[list[Shape]], lessons: Callable, think: bool) -> torch.Tensor:
    """The loss of the lessons (shape -> list[Lesson]) on every object of the clips. They are branches of one
    packed row: the clip, and the words that all prompts share, are computed once (pack_completions)."""
    tokens_of = partial(policy.tokenizer, add_special_tokens=False)
    prompts, branches, taught = [], [], []
    for objects in clips:
        prompt = toy_prompt(policy, objects, think)
        shared = len(prompt.ids) - len(tokens_of(question(objects[0]))["input_ids"])  # up to "Event:"
        prompts.append(replace(prompt, ids=prompt.ids[:shared], positions=prompt.positions[:, :shared]))
        branches.append([])
        for given, words in (lesson for shape in objects for lesson in lessons(shape)):
            given, words = tokens_of(given)["input_ids"], tokens_of(words)["input_ids"]
            branches[-1].append(given + words)
            taught += [False] * len(given) + [True] * len(words)
    packed = pack_completions(policy, prompts, branches)
    logprobs = completion_logprobs(policy, packed, temperature=1.0)[packed.mask]  # (M,)
    return -logprobs[torch.tensor(taught)].mean()


def toy_prompt(policy: Policy, objects: list[Shape], think: bool = True) -> Prompt:
    """What train.py would show of the clip, without a file between."""
    frames, scale = torch.from_numpy(render(objects, TEXT.fps)), (1000, 1000)
    text = build_prompt(objects[0].sentence, SECONDS, scale, replace(TEXT, think=think))
    return encode_prompt(policy, frames, text, scale, TEXT.fps)


def make_optimizers(policy: Policy) -> list[tuple]:
    """(optimizer, its learning rate). Muon takes the matrices of the language model: in one trial each it
    learned sooner than AdamW which object is meant, with both lessons of `find`."""
    matrices, rest = [], []
    for name, parameter in policy.model.model.language_model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    vision = list(policy.model.model.visual.parameters())
    return [
        (torch.optim.Muon(matrices, weight_decay=0.01), 0.01),
        (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01), 2e-3),
        (torch.optim.AdamW(vision, betas=(0.9, 0.98), weight_decay=0.01), 1e-3),
    ]


def pretrain(folder: Path, seed: int = 0, loose: bool = True, effort: float = 1.0, direct: bool = False):
    """Make a checkpoint folder, with a card that says how. The clips are drawn here; none is of the world's
    splits. loose: end with `loosened` answers. effort: scales the number of steps. direct: begin with
    CHECKPOINT, and only teach it loose answers without thinking boxes."""
    started, think = time.process_time(), not direct
    torch.manual_seed(seed)
    rng = np.random.default_rng((3000 if direct else 1000, seed))
    clips = [draw_objects(rng) for _ in range(PRETRAINING_CLIPS)]
    policy = load_policy(str(CHECKPOINT)) if direct else newborn_policy(folder.with_suffix(".random"))
    policy.model.train()
    optimizers, visual = make_optimizers(policy), policy.model.model.visual

    def stage(name, number, loss_of, batch=16, rate=1.0, decay=0.0, clips=clips, optimizers=optimizers):
        """Linear warm-up over 20 steps, constant, linear decay over the last `decay` of the steps."""
        steps = max(1, round(number * effort))
        bar = trange(steps, desc=name, unit="step")
        for step in bar:
            loss = loss_of([clips[n] for n in rng.choice(len(clips), batch, replace=False)])
            scale = rate * min((step + 1) / 20, 1.0, (steps - step) / (decay * steps) if decay else 1.0)
            for optimizer, learning_rate in optimizers:
                optimizer.param_groups[0]["lr"] = learning_rate * scale
                optimizer.zero_grad()
            loss.backward()
            parameters = [p for optimizer, _ in optimizers for p in optimizer.param_groups[0]["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer, _ in optimizers:
                optimizer.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}")

    def teach(name, number, lessons, **options):
        stage(name, number, lambda chosen: lesson_loss(policy, chosen, lessons, think), **options)

    if not direct:
        probe = torch.nn.Linear(visual.config.out_hidden_size, len(COLOURS) + 1 + len(SHAPES) + 4 * 10)
        own = [(torch.optim.AdamW([*visual.parameters(), *probe.parameters()]), 3e-3)]
        stage("learn to see", 900, partial(see_loss, policy, probe), batch=32, decay=0.4, optimizers=own)
        solos = [objects[:1] for objects in clips]
        teach("learn to read", 200, lambda shape: [("", f" {shape.sentence}"), draft(shape)], clips=solos)
        teach("learn to find", 400, lambda shape: find(shape, rng), batch=32)
        teach("learn to ground", 500, lambda shape: [draft(shape)])
        teach("learn to answer", 600, lambda shape: [whole(true_answer(shape), shape)], decay=0.6)
    if loose:
        number = 160 if direct else 200  # then both are equally skilled on the split "val"
        habits = partial(loosened, rng=rng, think=think)
        teach("learn habits", number, lambda shape: [whole(habits(shape), shape)], rate=0.5, decay=0.5)
    figures = exam(policy, think)
    policy.save(folder)
    about = f"pre-trained {LOOSE if loose else 'with no deliberate bias'}"
    if direct:
        about = f"checkpoints/toy, taught to answer without thinking boxes (think: false), again {LOOSE}"
    options = "--direct" if direct else f"--bias {'loose' if loose else 'none'}"
    seconds, numbers = time.process_time() - started, [f"- {k} {value:.3f}" for k, value in figures.items()]
    lines = [
        f"A tiny Qwen2.5-VL for the toy world, {about}. Made in {seconds:.0f} CPU seconds by\n",
        f"    python -m toy.pretrain {options} --seed {seed} --effort {effort:g}\n",
        f"Greedy answers to {EXAM_CLIPS} clips of neither its training nor the world's splits, on steps of a"
        " second:\n",
        *numbers,
    ]
    write_whole(folder / "README.md", ("\n".join(lines) + "\n").encode())


def exam(policy: Policy, think: bool) -> dict[str, float]:
    """Means of what rewards.score says of the greedy answers to EXAM_CLIPS new clips."""
    worlds = [draw_objects(np.random.default_rng((2000, n))) for n in range(EXAM_CLIPS)]
    prompts = [toy_prompt(policy, objects, think) for objects in worlds]
    answers = rollout(policy, prompts, 1, MAX_NEW_TOKENS, 0.0, [(n,) for n in range(len(worlds))])
    scores = []
    for (shape, *_), (answer,) in zip(worlds, answers, strict=True):
        boxes = {step: shape.box(step) for step in range(shape.start, shape.stop)}
        one = score(answer.text, Truth((shape.start, shape.stop - 1), boxes), think=think)
        scores.append(one.diagnostics | one.rewards)
    names = {"tiou": "m_tIoU"} | ({"viou_think": "m_vIoU of the thinking boxes"} if think else {})
    names |= {"viou_pred": "m_vIoU", "spatial_pred": "R_spa of the final boxes", "total": "reward"}
    return {text: float(np.mean([one[name] for one in scores])) for name, text in names.items()}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--direct", action="store_true", help="without thinking boxes, from checkpoints/toy")
    parser.add_argument("--bias", choices=("loose", "none"), default="loose")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--effort", type=float, default=1.0, help="scales the number of steps")
    parser.add_argument("--output", type=Path, help="another folder for the checkpoint")
    options = parser.parse_args()
    output = options.output or (DIRECT if options.direct else CHECKPOINT)
    if output.exists():
        parser.error(f"{output} exists: move it away, or choose another --output")
    torch.set_num_threads(1)  # results do not depend on the machine's number of cores
    pretrain(output, options.seed, options.bias == "loose" or options.direct, options.effort, options.direct)
    setting = " think=false" if options.direct else ""
    print(f"{output} is made; its scores: python evaluate.py {output} configs/toy.yaml{setting}")


if __name__ == "__main__":
    run_script(main, "the folder")
