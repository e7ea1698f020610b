"""The slow way to score answers: one at a time, by stock transformers, the whole sequence, no cache."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import torch

from model import encode_prompt

SENTENCES = ("the red circle moves left", "the blue square moves up, then it rests", "a triangle")
SHAPES = ((5, 2, 3), (4, 1, 2), (2, 3, 1))  # frames, and sides in multiples of the policy's size_factor
KEYS = [(0, 3, k) for k in range(3)]
LENGTHS = ([3, 1, 9], [6, 6, 2, 4], [12])  # of the answers to the three prompts


def some_frames(policy, count=5, rows=2, columns=3, seed=0):
    size = (count, rows * policy.size_factor, columns * policy.size_factor, 3)
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def make_prompts(policy, fps=2.0):
    """Three prompts of different length, with videos of different size, one of an odd number of frames."""
    return [
        encode_prompt(policy, some_frames(policy, *shape, seed=k), sentence, (1000, 1000), fps)
        for k, (sentence, shape) in enumerate(zip(SENTENCES, SHAPES, strict=True))
    ]


def with_many_ends(policy):
    """Every seventh token ends an answer, so that random answers end, and at different times."""
    return replace(policy, eos_ids=list(range(0, len(policy.tokenizer), 7)))


def ids_of(answers):
    return [[completion.ids for completion in group] for group in answers]


def random_completions(policy, lengths=LENGTHS):
    """completions[b][g]: random tokens without the forbidden ones."""
    rng = np.random.default_rng(0)
    allowed = sorted(set(range(len(policy.tokenizer))) - set(policy.forbidden_ids))
    return [[rng.choice(allowed, n).tolist() for n in group] for group in lengths]


def is_sped_up(module):
    return "forward" in module.__dict__


@contextlib.contextmanager
def stock(model):
    """Within it a model computes as transformers has it, without qwen.speed.speed_up."""
    changed = [(module, module.__dict__.pop("forward")) for module in model.modules() if is_sped_up(module)]
    try:
        yield
    finally:
        for module, forward in changed:
            module.forward = forward


def answer_logits(policy, prompt, ids, temperature=1.0):
    """Logits (n, V), at the temperature, that the n tokens of one answer were drawn from."""
    after = prompt.next_position + torch.arange(len(ids)).expand(3, -1)
    values, grid = policy.patches(prompt.frames)
    with stock(policy.model):
        logits = policy.model(
            input_ids=torch.cat([prompt.ids, torch.tensor(ids, dtype=torch.long)])[None],
            position_ids=torch.cat([prompt.positions, after], 1)[:, None],
            pixel_values_videos=values,
            video_grid_thw=grid[None],
            use_cache=False,
        ).logits[0, len(prompt.ids) - 1 : -1]
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
    allowed[policy.forbidden_ids] = False
    return (logits.float() / temperature).where(allowed, -torch.inf)


def slow_logprobs(policy, prompts, completions, temperature):
    """One list of log-probs (n,) for each completion, prompt after prompt."""
    return [
        answer_logits(policy, prompt, ids, temperature).log_softmax(-1)[range(len(ids)), ids]
        for prompt, group in zip(prompts, completions, strict=True)
        for ids in group
    ]


def assert_gradients_close(found, expected, tolerance):
    """name -> gradient: each within `tolerance` of the size of all of them together, and none forgotten."""
    assert found.keys() == expected.keys() and found
    size = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * size, name
        assert gradient.abs().max() > 0 or "bias" in name, name  # else no gradient at all would pass


def gradients_of(policy):
    """name -> gradient, whole where it is sharded."""
    found = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def edit_json(path, *keys, **changes):
    """Change values of a JSON file, in the object at the path `keys`."""
    content = inner = json.loads(path.read_text())
    for key in keys:
        inner = inner[key]
    inner.update(changes)
    path.write_text(json.dumps(content, indent=2))
