"""What prompts and answers cost in Qwen's vocabulary: counts made once by benchmarks/vocabulary.py."""

import json

import pytest
import regex
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from benchmarks.vocabulary import GOLDEN, PIECES, texts

COUNTS = {name: count["tokens"] for name, count in json.loads(GOLDEN.read_text())["counts"].items()}


def test_the_texts_are_still_what_is_written():
    """If not: python benchmarks/vocabulary.py"""
    golden = json.loads(GOLDEN.read_text())
    assert {name: count["text"] for name, count in golden["counts"].items()} == texts(), golden["made_by"]


def test_every_digit_is_a_piece():
    assert PIECES == PRETOKENIZE_REGEX  # of transformers' Qwen2Tokenizer
    for number in ("0", "42", "271", "99999"):
        assert regex.findall(PRETOKENIZE_REGEX, number) == list(number)


@pytest.mark.parametrize(
    ("spelling", "marks"),
    [
        ("{}. [{}, {}, {}, {}], ", 10),  # the paper's, and format_answer's
        ("{}. [{},{},{},{}], ", 7),
        ("{}.[{},{},{},{}],", 5),  # the shortest that the grammar reads
    ],
)
def test_cost_of_a_box(spelling, marks):
    """A token for each digit, and so many for what is between: 22, 19 or 17 for 5. [271, 30, 395, 212]."""
    for numbers in ((5, 271, 30, 395, 212), (112, 0, 7, 1000, 998)):
        digits = sum(len(str(number)) for number in numbers)
        assert COUNTS[f"box {spelling.format(*numbers)}"] == 5 + digits + marks  # 5: "<pred_bbox> "


@pytest.mark.parametrize("n", [1, 5, 10, 40, 180])
def test_cost_of_an_answer(n):
    """n steps from 0: 21 tokens a box, and the digits of its step; the last box of a list lacks its comma."""
    digits = sum(len(str(i)) for i in range(n))
    assert COUNTS[f"answer of {n} steps, think True"] == 2 * (21 * n + digits - 1) + 28 + len(str(n - 1))
    assert COUNTS["prompt"] < COUNTS["chat of Qwen3-VL"] < COUNTS["chat of Qwen2.5-VL"] <= 230
