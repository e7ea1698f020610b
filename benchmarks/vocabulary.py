"""The real vocabulary of Qwen2, 2.5 and 3 (VL or not; they share it), without the hub.

Its byte-pair ranks are in the PyPI package dashscope (resources/qwen.tiktoken). They are read as a file: the
package itself, whose dependencies are not needed, is never imported: pip install --no-deps dashscope==2.0.2.
qwen_tokenizer() makes of them what the tokenizer.json of a published checkpoint makes (in 2 s).

    python benchmarks/vocabulary.py    write tests/golden/token_counts.json, after a prompt has changed
"""

# ruff: noqa: E402 (the project is no package: its folder must be on the path first)
import base64
import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from prompts import Answer, TextFormat, build_prompt, format_answer

GOLDEN = ROOT / "tests/golden/token_counts.json"

# Of tokenizer.json; \p{N} without a quantifier makes every digit a piece of its own.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Of tokenizer_config.json, with ids from 151643 on. Those of the second line are added, but not special.
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
# The chat templates of the Instruct checkpoints; of Qwen3-VL's without what it says of tools.
QWEN2_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].content is string %}
        {{- messages[0].content }}
    {%- else %}
        {%- for content in messages[0].content %}
            {%- if 'text' in content %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set image_count = namespace(value=0) %}
{%- set video_count = namespace(value=0) %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content in message.content %}
                {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}
                    {%- set image_count.value = image_count.value + 1 %}
                    {%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}
                    <|vision_start|><|image_pad|><|vision_end|>
                {%- elif content.type == 'video' or 'video' in content %}
                    {%- set video_count.value = video_count.value + 1 %}
                    {%- if add_vision_id %}Video {{ video_count.value }}: {% endif -%}
                    <|vision_start|><|video_pad|><|vision_end|>
                {%- elif 'text' in content %}
                    {{- content.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content_item in message.content %}
                {%- if 'text' in content_item %}
                    {{- content_item.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def qwen_ranks() -> dict[bytes, int]:
    """The bytes of every token (but those of SPECIAL and ADDED) -> its id, which is also its rank."""
    try:
        package = distribution("dashscope")
    except PackageNotFoundError:
        sys.exit("Qwen's vocabulary is read from dashscope: pip install --no-deps dashscope==2.0.2")
    path = package.locate_file("dashscope/resources/qwen.tiktoken")
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def byte_pair_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each longer token is merged from, in the order of their ranks: what is left of its
    bytes when all merges of lower rank are done."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            k = pairs.index(min(pairs))
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def qwen_tokenizer(chat_template: str = QWEN2_TEMPLATE) -> PreTrainedTokenizerFast:
    """The tokenizer of the published Qwen2.5-VL checkpoints (Qwen3-VL's: with its chat_template)."""
    ranks = qwen_ranks()
    # How a byte is written in vocabulary files: itself where it can be printed, else a letter from 256 on.
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printed)
    letters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + k) for k, byte in enumerate(others)}

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(a), spell(b)) for a, b in byte_pair_merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    wrapped.chat_template = chat_template
    return wrapped


def texts() -> dict[str, str]:
    """What is counted: boxes in three spellings (the first is the paper's), answers of n steps, the prompt
    alone and in the chat template of both families."""
    question = build_prompt("an adult in yellow clothes holds a bat.", 40, (1000, 1000), TextFormat())
    found = {"prompt": question}
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    for name, template in (("Qwen2.5-VL", QWEN2_TEMPLATE), ("Qwen3-VL", QWEN3_TEMPLATE)):
        options = {"chat_template": template, "add_generation_prompt": True}
        (found[f"chat of {name}"],), _ = render_jinja_template([messages], **options)
    for spelling in ("{}. [{}, {}, {}, {}], ", "{}. [{},{},{},{}], ", "{}.[{},{},{},{}],"):
        for numbers in ((5, 271, 30, 395, 212), (112, 0, 7, 1000, 998)):
            found[f"box {spelling.format(*numbers)}"] = "<pred_bbox> " + spelling.format(*numbers)
    for n in (1, 5, 10, 40, 180):
        items = tuple((i, (271, 30, 395, 212)) for i in range(n))
        for think in (True, False):
            answer = Answer(0, n - 1, items if think else None, items)
            found[f"answer of {n} steps, think {think}"] = format_answer(answer)
    return found


def main() -> None:
    """Count with the published vocabulary."""
    tokenizer = qwen_tokenizer()
    counted = {
        name: {"text": text, "tokens": len(tokenizer(text, add_special_tokens=False)["input_ids"])}
        for name, text in texts().items()
    }
    content = {"made_by": "python benchmarks/vocabulary.py, with dashscope==2.0.2", "counts": counted}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
