"""The published chat templates, for tests of checkpoints."""

from benchmarks.vocabulary import QWEN2_TEMPLATE, QWEN3_TEMPLATE

__all__ = ["QWEN2_TEMPLATE", "QWEN3_TEMPLATE"]
