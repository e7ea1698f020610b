"""Prompts and answers in the real vocabulary of Qwen: what they cost, and that nothing of them is lost."""

import json
import random
import unicodedata
from itertools import pairwise

import pytest
import regex
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from vocabulary import ADDED, PIECES, QWEN2_TEMPLATE, SPECIAL, byte_pair_merges, qwen_ranks, qwen_tokenizer

from prompts import Answer, TextFormat, build_prompt, format_answer, parse_answer

SENTENCES = (  # of VidSTG's validation set, and of the kinds of HC-STVG's
    "an adult in yellow clothes holds a bat.",
    "who is beneath the gray backpack?",
    "The man in the black suit walks to the table, turns around and hands the woman's bag to the other man.",
)
ANSWER = (  # STVG-o1, Fig. 2
    "<time> 5 - 7 </time>"
    " <think_bbox> 5. [271, 30, 395, 212], 6. [267, 24, 393, 216], 7. [270, 18, 395, 221] </think_bbox>"
    " <pred_bbox> 5. [278, 35, 399, 234], 6. [289, 34, 403, 236], 7. [300, 28, 405, 237] </pred_bbox>"
)
OTHERS = (
    "it's WE'LL don't  two spaces\n\n a\ttab \r\n and\u00a0more   ",
    "Ünïcödé ①②③ 中文字符\uff0c日本語のテキスト 한국어 العربية עברית हिन्दी ไทย",
    "🎬🏳️‍🌈 emoji, \U0001f468‍\U0001f469‍\U0001f467 and \x00\x7f control \ufffd",
    "decomposed cafe\u0301 and A\u030angstro\u0308m",  # NFC makes one letter of each pair
    "x1=271.5e-3, 3.14159; {'a': [1,2]} <tag/> ~~~ ///// ______ 0123456789",
    "<pred_bbox>5.[271,30,395,212],6.[0,0,1000,1000]</pred_bbox>",
)


@pytest.fixture(scope="session")
def ranks():
    return qwen_ranks()


@pytest.fixture(scope="session")
def tokenizer():
    return qwen_tokenizer()


def slow_ids(text, ranks):
    """Byte pair encoding by its definition: join the pair of lowest rank until no pair has one."""
    ids = []
    for piece in regex.findall(PIECES, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = [(ranks[a + b], k) for k, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not pairs:
                break
            k = min(pairs)[1]
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_it_is_the_published_vocabulary(tokenizer, ranks):
    """Figures of the hub's files: 151,643 tokens from 151,387 merges, then the special ones."""
    assert len(ranks) == 151643 and sorted(ranks.values()) == list(range(151643))
    merges = byte_pair_merges(ranks)
    assert len(merges) == 151387 and len({a + b for a, b in merges}) == 151387
    assert all(max(ranks[a], ranks[b]) < ranks[a + b] for a, b in merges if len(a + b) > 2)
    assert tokenizer.convert_tokens_to_ids([*SPECIAL, *ADDED]) == list(range(151643, 151665))
    ids = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652}
    ids |= {"<|vision_end|>": 151653, "<|vision_pad|>": 151654, "<|image_pad|>": 151655}
    ids |= {"<|video_pad|>": 151656, "<tool_call>": 151657, "<|file_sep|>": 151664}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert PIECES == PRETOKENIZE_REGEX  # of transformers' Qwen2Tokenizer
    assert ids_of(tokenizer, "Hello, world!") == [9707, 11, 1879, 0]  # as published examples have it


def test_ids_against_slow_encoding(tokenizer, ranks):
    generator = random.Random(0)
    letters = "ab Zé中\n\t 019.,-[]<>/_'\"🎬"
    noise = ("".join(generator.choices(letters, k=generator.randint(1, 60))) for _ in range(300))
    for text in (*SENTENCES, ANSWER, *OTHERS, *noise):
        ids = ids_of(tokenizer, text)
        assert ids == slow_ids(text, ranks), text
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_every_digit_is_a_token(tokenizer):
    for number in ("0", "7", "42", "271", "1000", "99999"):
        assert tokenizer.convert_ids_to_tokens(ids_of(tokenizer, number)) == list(number)
    assert len({tuple(ids_of(tokenizer, digit)) for digit in "0123456789"}) == 10


@pytest.mark.parametrize(
    ("spelling", "marks"),
    [
        ("{}. [{}, {}, {}, {}], ", 10),  # the paper's, and format_answer's
        ("{}. [{},{},{},{}], ", 7),
        ("{}.[{},{},{},{}],", 5),  # the shortest that the grammar reads
    ],
)
def test_cost_of_a_box(tokenizer, spelling, marks):
    """A token for each digit, and so many for what is between: 22, 19 or 17 for 5. [271, 30, 395, 212]."""
    for numbers in (
        (5, 271, 30, 395, 212),
        (39, 0, 0, 1000, 1000),
        (0, 1, 2, 3, 4),
        (112, 45, 307, 516, 998),
    ):
        digits = sum(len(str(number)) for number in numbers)
        assert len(ids_of(tokenizer, spelling.format(*numbers))) == digits + marks
        one, two = (spelling.format(*numbers) * n for n in (1, 2))
        assert len(ids_of(tokenizer, f"<pred_bbox> {two}")) - len(
            ids_of(tokenizer, f"<pred_bbox> {one}")
        ) == (digits + marks)


def test_cost_of_an_answer(tokenizer):
    """The paper's example: six boxes of 22 tokens, but 21 at the end of a list, and 29 around them. Answers
    of n steps from 0, with boxes of such numbers."""
    assert len(ids_of(tokenizer, ANSWER)) == 4 * 22 + 2 * 21 + 29
    for n in (5, 10, 40, 180):
        items = tuple((i, (271, 30, 395, 212)) for i in range(n))
        step_digits = sum(len(str(i)) for i in range(n))
        text = format_answer(Answer(0, n - 1, items, items))
        # The last box of a list lacks the ", " after it; "]" is one token, as "]," is.
        assert len(ids_of(tokenizer, text)) == 2 * (21 * n + step_digits - 1) + 28 + len(str(n - 1))


def test_answers_survive_the_tokens(tokenizer):
    generator = random.Random(1)
    for _ in range(200):
        start = generator.randint(0, 300)
        boxes = [
            tuple(
                (i, tuple(generator.choice((0, 7, 99, 512, 1000, 99999)) for _ in range(4)))
                for i in range(start, start + generator.randint(1, 9))
            )
            for _ in range(2)
        ]
        for think in (boxes[0], None):
            answer = Answer(start, start + 4, think, boxes[1])
            text = tokenizer.decode(ids_of(tokenizer, format_answer(answer)))
            assert text == format_answer(answer) and parse_answer(text, think is not None) == answer
    assert format_answer(parse_answer(tokenizer.decode(ids_of(tokenizer, ANSWER)))) == ANSWER


def test_tags_and_special_tokens_survive(tokenizer):
    for tag in ("time", "think_bbox", "pred_bbox"):
        for text in (f"<{tag}>", f"</{tag}>", f" <{tag}> ", f"1 </{tag}> <{tag}>"):
            ids = ids_of(tokenizer, text)
            assert tokenizer.decode(ids) == text and max(ids) < 151643  # ordinary text, no special token
    for token in (*SPECIAL, *ADDED):
        (k,) = ids_of(tokenizer, token)
        assert tokenizer.decode([k]) == token
        assert tokenizer.decode(ids_of(tokenizer, f"a{token} 5")) == f"a{token} 5"
    assert tokenizer.decode(ids_of(tokenizer, "a<|im_end|> 5"), skip_special_tokens=True) == "a 5"


@pytest.mark.parametrize("sentence", SENTENCES)
def test_prompts_survive_the_tokens(tokenizer, ranks, sentence):
    text = build_prompt(sentence, 40, (1000, 1000), TextFormat())
    assert tokenizer.decode(ids_of(tokenizer, text)) == text
    content = [{"type": "video"}, {"type": "text", "text": text}]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids = ids_of(tokenizer, chat)
    assert tokenizer.decode(ids) == chat
    start, end, newline = 151644, 151645, 198
    helpful = slow_ids("system\nYou are a helpful assistant.", ranks)
    assert ids == [
        *(start, *helpful, end, newline, start, *slow_ids("user\n", ranks), 151652, 151656, 151653),
        *(*slow_ids(text, ranks), end, newline, start, *slow_ids("assistant\n", ranks)),
    ]


def test_files_as_on_the_hub(tokenizer, tmp_path):
    """vocab.json, merges.txt and tokenizer_config.json, read by the class that the published files name."""
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = inner["model"]["vocab"], inner["model"]["merges"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    added = {
        str(151643 + k): {"content": token, "special": k < len(SPECIAL), "normalized": False, "lstrip": False}
        for k, token in enumerate([*SPECIAL, *ADDED])
    }
    settings = {
        "added_tokens_decoder": added,
        "chat_template": QWEN2_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.get_vocab() == tokenizer.get_vocab() and theirs.chat_template == QWEN2_TEMPLATE
    for text in (*SENTENCES, ANSWER, *OTHERS, "".join((*SPECIAL, *ADDED))):
        assert ids_of(theirs, text) == ids_of(tokenizer, text)
        assert theirs.decode(ids_of(theirs, text)) == tokenizer.decode(ids_of(tokenizer, text))
