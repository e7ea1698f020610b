"""benchmarks/step.py: a step does what it must and no more; the baseline is the same step."""

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks import naive, step
from model import completion_logprobs, pack_completions


@pytest.fixture
def work_of(tmp_path, checkpoints):
    """work_of(visual tokens, option, ...) -> the work"""
    model = f"--model={checkpoints['qwen2_5_vl']}"
    return lambda visual, *words: step.work_of(step.parse([model, *words]), visual, tmp_path)


# option -> the least and the most that is done, of what is needed
SPENT = dict.fromkeys(("", "--freeze-vision"), (0.95, 1.05))
SPENT |= dict.fromkeys(("--checkpointing", "--no-keep"), (1.05, 2))


@pytest.mark.parametrize("option", SPENT)
def test_a_step_does_no_more_than_it_needs(work_of, option):
    """Nothing twice, and nothing for each answer that is the same for all: in linear layers, which is what
    counters see alike in every way of doing attention."""
    work = work_of(108, "--no-checkpointing", "--group=4", "--completion=12", *option.split())
    way, policy = step.our_way(work)
    (prompt,), config = step.prompts_of(work, policy), work.config
    visual = int((prompt.ids == policy.video_id).sum())
    linear, _ = step.needed(policy.model, visual, len(prompt.ids), 4, 12, config.freeze_vision)
    least, most = SPENT[option]
    assert least < step.counted(lambda: way.step(0))[0] / linear <= most


def test_the_padded_batch_is_the_same_step(work_of):
    """Its log-probs of its own answers are ours, so it is a fair measure."""
    work = work_of(72)
    _, policy = step.our_way(work)
    models, (prompt,) = naive.load(policy, work.config), step.prompts_of(work, policy)
    answers = naive.sample(models.policy, prompt, 3, 7, step.parts)
    theirs = naive.logprobs(models.policy, models.reference, prompt, answers)
    ours = completion_logprobs(policy, pack_completions(policy, [prompt], [answers.tolist()]), 1.0)
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


def test_what_is_needed_by_hand(tmp_path):
    """Blocks of the tower 4 * (4 * 256^2 + 3 * 256 * 688) weights, its embedding 1176 * 256, its merger
    1024^2 + 1024 * 256; layers 4 * (2 * 256^2 + 2 * 256 * 128 + 3 * 256 * 1024), head 2048 * 256. 36 visual
    tokens are 144 patches: two blocks see all of them, two see windows of 64, 32, 32 and 16."""
    step.write_model(tmp_path)
    with torch.device("meta"):
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(tmp_path))
    vision = 2 * ((3162112 + 301056) * 144 + 1310720 * 36)
    prompt, answers = 2 * 3932160 * 100, 2 * (3932160 + 524288) * 20
    seen = 4 * 256 * 2 * (144**2 + 64**2 + 2 * 32**2 + 16**2)
    read, written = 4 * 4 * 256 * 5050, 4 * 4 * 256 * 2 * (10 * 100 + 55)
    linear, attention = step.needed(network, 36, 100, 2, 10, frozen=False)
    assert linear == 4 * (vision + prompt) + 5 * answers - 2 * 301056 * 144 == 8317370368
    assert attention == 4 * (seen + read) + 5 * written == 348250112
