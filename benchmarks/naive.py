"""The same GRPO step as it is commonly done, for step.py to compare with: a padded batch of whole sequences.

Stock transformers: the video's patches G times through the vision tower and the prompt G times through the
language model, in sampling (a DynamicCache, one forward pass a token), in the reference's scores and, `micro`
sequences at a time, in the policy's, forward and backward. Three favours to it: logits are computed of
the completions alone, log-probs of the sampling policy are not computed anew, and in bf16 the weights and
AdamW's moments are bf16, too. Its log-probabilities are ours
(tests/test_benchmark_step.py).
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from grpo import policy_loss
from model import Prompt
from qwen.checkpoint import Policy, compute_dtype
from train import make_prompts


@dataclass
class Models:
    policy: Policy  # around the stock model
    reference: torch.nn.Module
    optimizer: torch.optim.Optimizer


def load(policy: Policy, config) -> Models:
    """The checkpoint of a configuration as transformers loads it. policy: ours, for all but its model."""
    model = policy.family.model_class.from_pretrained(
        config.model,
        dtype=compute_dtype(config),
        attn_implementation="sdpa",
        trust_remote_code=False,
        use_safetensors=True,
    )
    model.model.visual.requires_grad_(not config.freeze_vision)
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    policy = dataclasses.replace(policy, model=model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    return Models(policy, reference, optimizer)


def repeated(policy: Policy, prompt: Prompt, count: int) -> dict:
    """The inputs of the model: a prompt and its video, `count` times."""
    patches, grid = policy.patches(prompt.frames)
    return {
        "input_ids": prompt.ids.expand(count, -1),
        "position_ids": prompt.positions[:, None].expand(3, count, -1),
        "pixel_values_videos": patches.repeat(count, 1),
        "video_grid_thw": grid.expand(count, 3),
    }


@torch.no_grad()
def sample(policy: Policy, prompt: Prompt, count: int, tokens: int, parts) -> torch.Tensor:
    """So many answers of so many tokens, (count, tokens)."""
    model, answers = policy.model.eval(), []
    with parts("prefill"):
        out = model(**repeated(policy, prompt, count), use_cache=True, logits_to_keep=1)
    for t in range(tokens):
        logits = out.logits[:, -1].float().index_fill(1, torch.tensor(policy.forbidden_ids), -torch.inf)
        answers.append(torch.multinomial(logits.softmax(-1), 1))
        if t + 1 < tokens:
            position = torch.full((3, count, 1), prompt.next_position + t)
            cache = out.past_key_values
            out = model(answers[-1], position_ids=position, past_key_values=cache, use_cache=True)
    model.train()
    return torch.cat(answers, 1)


def logprobs(policy: Policy, model: torch.nn.Module, prompt: Prompt, answers: torch.Tensor) -> torch.Tensor:
    """Of the tokens of answers, (R, C): one forward pass over R sequences of P + C."""
    count, tokens = answers.shape
    inputs = repeated(policy, prompt, count)
    positions = (prompt.next_position + torch.arange(tokens)).expand(3, count, -1)
    inputs["position_ids"] = torch.cat([inputs["position_ids"], positions], 2)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answers], 1)
    states = model.model(**inputs, use_cache=False).last_hidden_state[:, -tokens - 1 : -1]  # (R, C, H)
    logits = model.lm_head(states).float().index_fill(2, torch.tensor(policy.forbidden_ids), -torch.inf)
    return logits.gather(2, answers[..., None]).squeeze(2) - logits.logsumexp(2)


def step_of(models: Models, work, micro: int, parts) -> Callable[[int], None]:
    """The step. work, parts: step.Work, step.Parts. micro: sequences at a time in the scoring passes."""
    policy, config = models.policy, work.config
    G, C = config.num_generations, config.max_new_tokens
    advantages = torch.tensor([1.0, -1.0]).repeat(G)[:G]

    def step(n: int) -> None:
        torch.manual_seed(n)
        with parts("decode"):
            _, _, (prompt,) = make_prompts(policy, [(0, work.sample)], work.clips, config)
        with parts("sampling"):
            answers = sample(policy, prompt, G, C, parts)
        for part, advantage in zip(answers.split(micro), advantages.split(micro), strict=True):
            with parts("reference"), torch.no_grad():
                ref = logprobs(policy, models.reference, prompt, part)
            with parts("forward"):
                own = logprobs(policy, policy.model, prompt, part)
                settings = {"clip_eps": config.clip_eps, "kl_beta": config.kl_beta, "normalizer": G * C}
                loss, _ = policy_loss(own, own.detach(), ref, advantage, torch.ones_like(own), **settings)
            with parts("backward"):
                loss.backward()
        with parts("optimizer"):
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
            models.optimizer.step()
            models.optimizer.zero_grad(set_to_none=True)

    return step
