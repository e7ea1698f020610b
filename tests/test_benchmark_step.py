"""benchmarks/step.py: what a step does and what it must do, the formula of that, the lines, the baseline."""

import json

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks import naive, step
from model import completion_logprobs, pack_completions
from train import questions

ENOUGH = 1.05  # times the linear operations needed


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small model of the benchmark."""
    folder = tmp_path_factory.mktemp("small")
    step.write_model(folder)
    return str(folder)


@pytest.fixture
def work_of(tmp_path):
    """work_of(model, visual tokens, option, ...) -> the work"""

    def work(model, visual, *words):
        return step.work_of(step.parse([f"--model={model}", *words]), visual, tmp_path)

    return work


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def family(request):
    return request.param


def linear_share(work, run, policy):
    """Operations in linear layers that a step does, over those that it needs."""
    config = work.config
    ((*_, prompt),) = questions(policy, [work.sample], work.clips, config)
    visual = int((prompt.ids == policy.video_id).sum())
    sizes = (config.num_generations, config.max_new_tokens, config.freeze_vision)
    linear, _ = step.needed(policy.model, visual, len(prompt.ids), *sizes)
    return step.counted(lambda: run(0))[0] / linear


@pytest.mark.parametrize("words", [("--group=4", "--completion=12"), ("--group=8", "--completion=3")])
@pytest.mark.parametrize("frozen", [(), ("--freeze-vision",)], ids=["trained", "frozen"])
def test_a_step_does_no_more_than_it_needs(checkpoints, family, work_of, words, frozen):
    """Nothing twice, and nothing for each answer that is the same for all: in linear layers, which is what
    counters see alike in every way of doing attention."""
    work = work_of(checkpoints[family], 108, "--no-checkpointing", *words, *frozen)
    way, policy = step.our_way(work)
    assert 0.95 < linear_share(work, way.step, policy) <= ENOUGH


def test_nor_with_the_small_model(small, work_of):
    work = work_of(small, 720, "--no-checkpointing", "--completion=32")
    way, policy = step.our_way(work)
    assert 0.95 < linear_share(work, way.step, policy) <= ENOUGH


@pytest.mark.parametrize("word", ["--checkpointing", "--no-keep"])
def test_the_count_sees_what_is_computed_again(checkpoints, work_of, word):
    work = work_of(checkpoints["qwen2_5_vl"], 108, "--no-checkpointing", "--completion=12", word)
    way, policy = step.our_way(work)
    assert linear_share(work, way.step, policy) > ENOUGH


def test_the_padded_batch_does_more_for_each_answer(checkpoints, work_of):
    """Nearly as many times as there are answers, for next to these prompts the answers are short."""
    work = work_of(checkpoints["qwen2_5_vl"], 108, "--no-checkpointing", "--group=6", "--completion=3")
    _, policy = step.our_way(work)
    run = naive.step_of(naive.load(policy, work.config), work, 3, step.parts)
    assert 5 < linear_share(work, run, policy) < 8


def test_the_padded_batch_is_the_same_step(checkpoints, work_of):
    """Its log-probs of its own answers are ours, so it is a fair measure."""
    work = work_of(checkpoints["qwen2_5_vl"], 72)
    _, policy = step.our_way(work)
    models = naive.load(policy, work.config)
    ((*_, prompt),) = questions(policy, [work.sample], work.clips, work.config)
    answers = naive.sample(models.policy, prompt, 3, 7, step.parts)
    assert answers.shape == (3, 7)
    theirs = naive.logprobs(models.policy, models.reference, prompt, answers)
    ours = completion_logprobs(policy, pack_completions(policy, [prompt], [answers.tolist()]), 1.0)
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


def test_what_is_needed_by_hand(small):
    """Blocks of the tower 4 * (4 * 256^2 + 3 * 256 * 688) weights, its embedding 1176 * 256, its merger
    1024^2 + 1024 * 256; layers 4 * (2 * 256^2 + 2 * 256 * 128 + 3 * 256 * 1024), head 2048 * 256. 36 visual
    tokens are 144 patches: two blocks see all of them, two see windows of 64, 32, 32 and 16."""
    config = Qwen2_5_VLConfig.from_pretrained(small)
    with torch.device("meta"):
        network = Qwen2_5_VLForConditionalGeneration._from_config(config)
    vision = 2 * ((3162112 + 301056) * 144 + 1310720 * 36)
    prompt, answers = 2 * 3932160 * 100, 2 * (3932160 + 524288) * 20
    seen = 4 * 256 * 2 * (144**2 + 64**2 + 2 * 32**2 + 16**2)
    read, written = 4 * 4 * 256 * 5050, 4 * 4 * 256 * 2 * (10 * 100 + 55)
    linear, attention = step.needed(network, 36, 100, 2, 10, frozen=False)
    assert linear == 4 * (vision + prompt) + 5 * answers - 2 * 301056 * 144 == 8317370368
    assert attention == 4 * (seen + read) + 5 * written == 348250112
    # A padded batch: the answers themselves cost the same, the prompt comes with each of them.
    each = 2 * sum(step.needed(network, 36, 100, 1, 10, frozen=False))
    assert each - linear - attention == 4 * (vision + prompt + seen + read) - 2 * 301056 * 144
    frozen = step.needed(network, 36, 100, 2, 10, frozen=True)
    assert (linear - frozen[0], attention - frozen[1]) == (3 * vision - 2 * 301056 * 144, 3 * seen)
    # Figures worked out by another program, whose prompts were longer and whose pixels had gradients.
    for visual, P, gflop in ((720, 823, 225), (1512, 1659, 397), (2880, 3103, 720)):
        pixels = 2 * 301056 * 4 * visual
        counted = sum(step.needed(network, visual, P, 8, 200, False)) + pixels
        assert counted / 1e9 == pytest.approx(gflop, rel=2e-3)


def test_the_lines(checkpoints):
    words = ["--steps=2", "--group=2", "--completion=6", "--against=naive", "--profile"]
    options = step.parse([f"--model={checkpoints['qwen2_5_vl']}", *words])
    ours, padded, single, ratios, profile = (
        json.loads(json.dumps(line)) for line in step.measure(options, 40)
    )
    assert json.dumps(ours).startswith('{"impl"') and (ours["impl"], padded["impl"]) == ("ours", "naive")
    assert (padded["micro"], single["micro"]) == (2, 1)
    for line in (ours, padded, single):
        assert line["visual_tokens"] == 72 and line["prompt_tokens"] > 72 and line["dtype"] == "fp32"
        assert len(line["others_cpu"]) in (0, 2)
        assert len(line["rounds_cpu_s"]) == 2 and min(line["rounds_cpu_s"]) == line["step_cpu_s"] > 0
        assert line["step_s"] > 0 and line["peak_gflops"] > 0
        assert set(line["cpu_s"]) == set(step.PARTS) and all(line["cpu_s"].values())
        assert sum(line["cpu_s"].values()) == pytest.approx(line["step_cpu_s"], rel=0.1, abs=0.02)
        assert line["base_rss_mb"] <= line["peak_rss_mb"] and line["above_mb"] >= 0
        assert line["gflop_needed"] <= min(line["gflop_done"], line["gflop_padded"])
        needed = line["gflop_needed"] / line["peak_gflops"]
        assert line["roofline"] == pytest.approx(line["step_cpu_s"] / needed, rel=0.3)  # of rounded numbers
    assert ours["linear_needed"] == padded["linear_needed"] and ours["linear_done"] < padded["linear_done"]
    assert list(ratios["ratios"]) == ["naive, 2 at a time", "naive, 1 at a time"]
    assert set(ratios["ratios"]["naive, 1 at a time"]) == {"cpu", "median", "memory"}
    assert 50 < sum(profile["profile"].values()) <= 100.1
