"""Fuzz files, conversations and configs: the outcome is a correct result or an SFTError of one line.

    python tests/support/fuzz.py --inputs 100000 --seed 1             # divided among all targets (SHARES)
    python tests/support/fuzz.py --only templates --seed 1 --at 1234  # repeat the input of a finding

Each target checks a property of one random input, which depends on seed, target and number. tests/test_fuzz.py runs
some inputs with the suite. Inputs are drawn with Python's generator, because hypothesis takes several times as long as
the checks.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import logging
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from support.conversations import QWEN3, build_conversation, cut_conversation, render_sequences
from support.templates import AGENT_TEMPLATE
from support.tiny import CHATML, CONTROL, build_tokenizer
from transformers import AutoTokenizer, TrainingArguments
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.commands.resumable_jsonl import AnswerFile
from sft_pipeline.config import parse_config
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import IGNORED, Encoder
from sft_pipeline.data.formats import FORMATS, convert_row, detect_format, drop_ambiguous_nulls
from sft_pipeline.data.messages import Conversation, add_system_prompt, format_conversation, parse_conversation
from sft_pipeline.data.prompts import load_prompts
from sft_pipeline.data.readers import read_rows
from sft_pipeline.data.sources import load_source, read_raw_rows
from sft_pipeline.data.text_encoder import encode_as_text
from sft_pipeline.utils.errors import SFTError

WORK = Path(tempfile.mkdtemp(prefix="sft_pipeline_fuzz_"))
NAMES = ["messages", "conversations", "system", "instruction", "input", "output", "history", "prompt", "completion"]
NAMES += ["text", "tools", "chat_template_kwargs"]
SPEAKERS = ["system", "user", "assistant", "human", "gpt", "tool", "", "\x1b[2J"]
SPEAKERS += ["developer", "function_call", "observation"]
TURN_KEYS = ["tool_calls", "reasoning_content", "thinking", "train", "weight", "name", "tool_call_id", "other"]

# ---- values, drawn with a Random

# Control characters, lone surrogates, control tokens and their placeholders, newlines of every kind, role headers,
# jinja, markup.
ODD = ["\x1b[31m", "\x00", "\x9b2J", "\r", "\ud800", "\ufeff", "\u2028", "\ue000sft0\ue001", "\ue000", "\U0010ffff"]
SPELLED = [*CONTROL, "<|im_", "end|>", "\n#USER:", "\n#ASSISTANT:", "assistant\n", "{{ 7*7 }}", "{% raw %}", "<script>"]
PLAIN = ["", " ", "\n", "the answer", "冬瓜", "🙂", "é", "e\u0301", "null", "1e5", "2020-13-45", "=1+1", '"', ",", "'"]
NUMBERS = [0, 1, -1, 0.5, 1e-5, 10**30, float("inf"), float("nan"), True, False]
PLANES = [0x80, 0x250, 0x3000, 0xA000, 0x10000, 0x110000]  # a character is drawn below one of these


def draw_text(random: Random) -> str:
    parts = [lambda: random.choice(ODD), lambda: random.choice(SPELLED), lambda: random.choice(PLAIN)]
    parts += [lambda: chr(random.randrange(random.choice(PLANES)))]
    return "".join(random.choice(parts)() for _ in range(random.randrange(5)))


def draw_valid_text(random: Random) -> str:
    """Draw a text that `convert_row` accepts."""
    return draw_text(random).encode("utf-8", "ignore").decode() + random.choice("x.瓜")


def draw_bool(random: Random) -> bool:
    return random.random() < 0.5


def draw_value(random: Random, depth: int = 3) -> Any:
    kind = random.randrange(6 if depth else 4)
    if kind < 2:
        return draw_text(random)
    if kind == 2:
        return random.choice([None, *NUMBERS])
    if kind == 3:
        return random.getrandbits(random.choice([1, 40, 200]))
    values = [draw_value(random, depth - 1) for _ in range(random.randrange(4))]
    return values if kind == 4 else {draw_text(random): value for value in values}


def draw_mostly(random: Random, draw: Callable[[Random], Any]) -> Any:
    """Draw with `draw` mostly, and any value otherwise."""
    return draw(random) if random.random() < 0.85 else draw_value(random)


def draw_turns(random: Random, role: str = "role", content: str = "content") -> list[Any]:
    """Draw a valid or broken conversation with these keys."""
    speakers = ("human", "gpt") if role == "from" else ("user", "assistant")
    count = random.choice([2, 2, 4, 1, 0])
    turns = [{role: speakers[index % 2], content: draw_valid_text(random)} for index in range(count)]
    while random.random() < 0.3:
        turn = {role: draw_mostly(random, lambda r: r.choice(SPEAKERS)), content: draw_mostly(random, draw_content)}
        turn |= {key: draw_mostly(random, draw_turn_value) for key in TURN_KEYS if random.random() < 0.15}
        turns.insert(random.randint(0, len(turns)), turn if draw_bool(random) else draw_value(random))
    return turns


def draw_content(random: Random) -> Any:
    """Draw text, text parts, or JSON text of a call."""
    parts = [{"type": random.choice(["text", "text", "image"]), "text": draw_text(random)}]
    return random.choice([draw_text(random), draw_text(random), parts, json.dumps(draw_call(random)), None])


def draw_turn_value(random: Random) -> Any:
    return random.choice([draw_text, lambda r: [draw_call(r)], lambda r: r.choice([0, 1, True, False, 0.5])])(random)


def draw_call(random: Random) -> Any:
    """Draw a call or a tool, whole or as JSON text, some of them broken."""
    arguments = {draw_text(random): draw_value(random, 2) for _ in range(random.randrange(3))}
    function = {
        "name": draw_mostly(random, draw_valid_text),
        "arguments": draw_mostly(random, lambda r: json.dumps(arguments) if draw_bool(r) else arguments),
    }
    call = {"type": "function", "function": function} if draw_bool(random) else function
    return json.dumps(call) if random.random() < 0.2 else call


def draw_tool_columns(random: Random) -> dict[str, Any]:
    """Draw none or both of the columns of objects."""
    if random.random() < 0.6:
        return {}
    tools = draw_mostly(random, lambda r: [draw_call(r) for _ in range(r.randrange(3))])
    return {"tools": tools, "chat_template_kwargs": draw_mostly(random, lambda r: {"x": draw_value(r)})}


def draw_row(random: Random) -> Any:
    shape = random.randrange(8)
    if shape == 7:
        return {"text": draw_mostly(random, draw_text)}
    if shape == 0:
        return {"messages": draw_mostly(random, draw_turns), **draw_tool_columns(random)}
    if shape == 1:
        turns = draw_mostly(random, partial(draw_turns, role="from", content="value"))
        return {
            "conversations": turns,
            **draw_tool_columns(random),
            **({"system": draw_mostly(random, draw_text)} if draw_bool(random) else {}),
        }
    if shape < 4:
        required = {name: draw_mostly(random, draw_valid_text) for name in ("instruction", "output")}
        return required | draw_alpaca_columns(random)
    if shape == 4:
        draw = random.choice([draw_text, draw_valid_text, draw_turns])
        return {"prompt": draw_mostly(random, draw), "completion": draw_mostly(random, draw)}
    names = random.choices(NAMES, k=random.randrange(4))
    return {name: draw_value(random) for name in names} if shape == 5 else draw_value(random)


def draw_alpaca_columns(random: Random) -> dict[str, Any]:
    """Draw some of alpaca's optional columns."""
    history = [[draw_text(random) for _ in range(random.choice([2, 2, 2, 1]))] for _ in range(random.randrange(3))]
    columns = {
        "input": draw_mostly(random, draw_text),
        "system": draw_mostly(random, draw_text),
        "history": draw_mostly(random, lambda _: history),
    }
    return {name: value for name, value in columns.items() if random.random() < 0.3}


def draw_rows(random: Random) -> list[Any]:
    """Draw rows, in half of the cases of one format."""
    if draw_bool(random):
        return [draw_row(random) for _ in range(random.randrange(6))]
    return [
        {"instruction": draw_valid_text(random), "output": draw_mostly(random, draw_text)}
        for _ in range(random.randint(1, 6))
    ]


def draw_bytes(random: Random, limit: int) -> bytes:
    return random.randbytes(random.randint(0, limit))


# ---- files


def convert_to_json(rows: list[Any]) -> bytes:
    return json.dumps(rows).encode()


def convert_to_jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def convert_to_csv(rows: list[Any]) -> bytes:
    file = io.StringIO(newline="")
    columns = list(dict.fromkeys(str(key) for row in rows if isinstance(row, dict) for key in row)) or ["prompt"]
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows([str(row.get(key, "")) for key in columns] for row in rows if isinstance(row, dict))
    return file.getvalue().encode("utf-8", "surrogatepass")


def convert_to_table(rows: list[Any]) -> pa.Table:
    """Build an Arrow table of the rows, or of their texts if the rows have no common schema."""
    objects = [row for row in rows if isinstance(row, dict) and row]
    try:
        return pa.Table.from_pylist(objects)
    except (pa.ArrowException, TypeError, OverflowError, ValueError, AttributeError):
        texts = [{"instruction": ascii(row), "output": "x"} for row in objects]
        return pa.Table.from_pylist(texts)


def convert_to_parquet(rows: list[Any]) -> bytes:
    sink, table = io.BytesIO(), convert_to_table(rows)
    try:
        pq.write_table(table, sink)
    except (pa.ArrowException, TypeError):  # Parquet has no structs without fields
        sink = io.BytesIO()
        pq.write_table(pa.table({"prompt": ["x"]}), sink)
    return sink.getvalue()


def convert_to_arrow(rows: list[Any]) -> bytes:
    sink, table = io.BytesIO(), convert_to_table(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


CONVERTERS = {
    ".json": convert_to_json,
    ".jsonl": convert_to_jsonl,
    ".csv": convert_to_csv,
    ".parquet": convert_to_parquet,
    ".arrow": convert_to_arrow,
}


def damage_bytes(random: Random, content: bytes) -> bytes:
    """Replace, remove, insert or repeat bytes of the content, or cut it off, up to three times."""
    for _ in range(random.choice([0, 0, 1, 1, 2, 3])):
        start = random.randint(0, len(content))
        end = start + random.randrange(9)
        content = content[:start] + random.choice([draw_bytes(random, 8), content[start:end] * 2, b""]) + content[end:]
        content = content[: random.choice([len(content), len(content), random.randint(0, len(content))])]
    return content


def draw_file(random: Random) -> tuple[str, bytes, list[Any] | None]:
    """Draw (suffix, content, rows) of a file; rows is None unless the file is undamaged JSON or JSONL."""
    suffix = random.choice([".json", ".jsonl", ".csv", *CONVERTERS])
    if random.random() < 0.1:
        return suffix, draw_bytes(random, 80), None
    rows = draw_rows(random)
    original = CONVERTERS[suffix](rows)
    content = damage_bytes(random, original)
    return suffix, content, rows if content == original and suffix in (".json", ".jsonl") else None


def write_file(name: str, content: bytes) -> Path:
    file = WORK / name
    file.write_bytes(content)
    return file


def return_or_catch(call: Callable[[], Any]) -> Any:
    """Return the result of the call or its SFTError, whose message must be one line without control characters."""
    try:
        return call()
    except SFTError as error:
        message = str(error)
        assert (
            message and len(message.splitlines()) == 1 and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in message)
        )
        message.encode()
        return error


# ---- targets: one property each

TARGETS: dict[str, tuple[Callable[..., None], tuple[Callable[[Random], Any], ...]]] = {}


def target(*inputs: Callable[[Random], Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function `check_<name>` of these inputs as the target <name>."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        TARGETS[check.__name__.removeprefix("check_")] = check, inputs
        return check

    return register


@target(draw_file)
def check_readers(file: tuple[str, bytes, list[Any] | None]) -> None:
    """All rows of a file are read, equal and in order, and each is converted or refused; a broken file is an error."""
    suffix, content, expected = file
    path = write_file(f"rows{suffix}", content)
    rows = return_or_catch(lambda: list(read_rows(path, path.name)))
    if expected is not None and not isinstance(rows, SFTError):
        assert json.dumps([row for _, row in rows]) == json.dumps(expected)
    if isinstance(rows, SFTError):
        assert expected is None or (suffix == ".jsonl" and not expected), rows
        return
    shape = return_or_catch(lambda: detect_format(rows[0][1]) if rows and isinstance(rows[0][1], dict) else None)
    for _, row in rows:
        if shape and not isinstance(shape, SFTError):
            check_conversation(return_or_catch(lambda row=row: convert_row(row, shape)))


@target(draw_row, lambda random: random.choice(list(FORMATS)))
def check_formats(row: Any, shape: str) -> None:
    """A row is converted to a well-formed conversation whose texts are all in the row, or is refused."""
    conversation = return_or_catch(lambda: convert_row(row, FORMATS[shape]))
    check_conversation(conversation)
    if not isinstance(conversation, SFTError):
        written = json.dumps(row, ensure_ascii=False)
        for message in conversation.get("messages", ()):
            # Of parts, calls and alpaca's columns the texts are joined or parsed.
            for text in filter(None, message["content"].split("\n")):
                assert json.dumps(text, ensure_ascii=False)[1:-1] in written or isinstance(row.get("messages"), list)


def check_conversation(conversation: Conversation | SFTError) -> None:
    """It has an answer after other messages, no empty one, no key that templates do not know, and survives as JSON."""
    if isinstance(conversation, SFTError):
        return
    text = format_conversation(conversation)
    text.encode()
    assert parse_conversation(text) == conversation
    assert conversation.keys() <= {"messages", "tools", "chat_template_kwargs"} or conversation.keys() == {"text"}
    check_messages(conversation.get("messages"))
    for tool in conversation.get("tools", ()):
        assert isinstance(tool["function"]["name"], str)


def check_messages(messages: list[dict[str, Any]] | None) -> None:
    if messages is None:
        return
    assert len(messages) > 1 and messages[-1]["role"] == "assistant"
    for message in messages:
        keys = {"user": set(), "system": set(), "developer": set(), "tool": {"tool_call_id", "name"}}
        keys |= {"assistant": {"reasoning_content", "tool_calls", "train"}}
        assert message.keys() <= {"role", "content"} | keys[message["role"]]
        assert message["content"].strip() or message["role"] == "tool" or message["tool_calls"]
        assert message.get("train", False) is False
        for call in message.get("tool_calls", ()):
            assert call["function"]["name"].strip() and isinstance(call["function"]["arguments"], dict)


@target(draw_file, draw_bool)
def check_sources(file: tuple[str, bytes, list[Any] | None], skip: bool) -> None:
    """All good rows are loaded, in order, if bad ones are skipped; otherwise a bad row is an error."""
    suffix, content, _ = file
    path = write_file(f"source{suffix}", content)
    loaded = return_or_catch(lambda: load_source(str(path), skip_bad_rows=skip)[0])
    rows = return_or_catch(lambda: list(read_raw_rows(str(path))))
    if isinstance(rows, SFTError) or not rows or not isinstance(rows[0][1], dict):
        assert isinstance(loaded, SFTError)
        return
    shape = return_or_catch(lambda: detect_format(rows[0][1]))
    if isinstance(shape, SFTError):
        assert isinstance(loaded, SFTError)
        return
    if suffix in (".parquet", ".arrow"):
        rows = [(origin, drop_ambiguous_nulls(row)[0]) for origin, row in rows]
    results = [(origin, return_or_catch(lambda row=row: convert_row(row, shape))) for origin, row in rows]
    good = [(origin, conversation) for origin, conversation in results if not isinstance(conversation, SFTError)]
    if not good or (len(good) < len(rows) and not skip):
        assert isinstance(loaded, SFTError) and any(origin in str(loaded) for origin, _ in results)
        return
    assert list(zip(loaded["origin"], map(parse_conversation, loaded["conversation"]))) == good


@target(draw_file, draw_bool)
def check_prompts(file: tuple[str, bytes, list[Any] | None], text: bool) -> None:
    """Each row, or each line that is not empty, is one prompt, with either messages or a problem."""
    suffix, content, _ = file
    path = write_file(f"prompts{'.txt' if text else suffix}", content)
    prompts = return_or_catch(lambda: load_prompts(str(path)))
    if isinstance(prompts, SFTError):
        return
    for prompt in prompts:
        messages = prompt.conversation["messages"]
        assert bool(prompt.problem) != bool(messages)
        if messages:
            check_messages([*messages, {"role": "assistant", "content": "x"}])
    if text:
        lines = re.split("\r\n|\r|\n", content.decode("utf-8-sig"))
        assert len(prompts) == sum(bool(line.strip()) for line in lines)
    else:
        assert [prompt.origin for prompt in prompts] == [origin for origin, _ in read_raw_rows(str(path))]


def draw_conversation(random: Random) -> Conversation:
    """Draw a conversation like those of `convert_row`, where no text is empty or white space only."""
    texts = [draw_valid_text(random) for _ in range(random.choice([2, 2, 4, 6]))]
    system = draw_valid_text(random) if random.random() < 0.4 else None
    conversation = build_conversation(texts, system)
    for message in conversation["messages"]:
        if message["role"] == "assistant" and random.random() < 0.2:
            message["train"] = False
    return conversation


@target(
    draw_conversation,
    lambda random: random.choice(["role", "chat", "agent"]),
    lambda random: random.choice([None, draw_valid_text(random)]),
    lambda random: random.choice(["all", "last"]),
    lambda random: random.choice(["drop", "truncate_answer", "truncate_turns"]),
    Random.random,
    Random.random,
    draw_valid_text,
)
def check_templates(
    conversation: Conversation,
    name: str,
    system: str | None,
    train_on: str,
    overlong: str,
    tokenizer_share: float,
    limit_share: float,
    reasoning: str,
) -> None:
    """Each trained answer is in one sequence, after the ids of its prompt, with its stop token; nothing else is
    supervised, the ids decode to the text, no control token comes from a text, and every row has an outcome.

    The shares, in [0, 1), choose the tokenizer and max_length. `agent` leaves earlier reasoning out: several sequences.
    """
    templates = get_templates()[name]
    tokenizer, template = templates[int(tokenizer_share * len(templates))]
    if name == "agent":
        for message in conversation["messages"]:
            if message["role"] == "assistant":
                message["reasoning_content"] = reasoning
    whole = add_system_prompt(conversation, system)
    sequences = render_sequences(template, whole, train_on)
    answers = [index for index, message in enumerate(whole["messages"]) if message["role"] == "assistant"]
    trained = [i for i in (answers if train_on == "all" else answers[-1:]) if whole["messages"][i].get("train", True)]
    check_targets(tokenizer, template, whole, trained, sequences)
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    plain = [
        {key: "x" if key in ("content", "reasoning_content") else value for key, value in message.items()}
        for message in whole["messages"]
    ]
    harmless = render_sequences(template, {"messages": plain}, train_on)
    for (ids, _), (harmless_ids, _) in zip(sequences, harmless, strict=True):
        assert [i for i in ids if i in control] == [i for i in harmless_ids if i in control]
    longest = max((len(ids) for ids, _ in sequences), default=1)
    encoder = Encoder(template, system, 1 + int(limit_share * 1.4 * longest), overlong, train_on)
    check_encoded(encoder, conversation, sequences)


def check_targets(
    tokenizer: Any, template: Any, conversation: Conversation, trained: list[int], sequences: list[Any]
) -> None:
    """The targets of the sequences are those of the trained answers, in order, each after its prompt."""
    remaining = list(trained)
    for ids, supervised in sequences:
        expected = [False] * len(ids)
        while remaining:
            message = conversation["messages"][remaining[0]]
            prompt = template.encode_prompt(cut_conversation(conversation, remaining[0]))
            if ids[: len(prompt)] != prompt or len(prompt) >= len(ids) or not supervised[len(prompt)]:
                break
            text = message["content"]
            if reasoning := message.get("reasoning_content"):
                text = f"<think>\n{reasoning}\n</think>\n\n{text}"
            answer = encode_as_text(tokenizer, [text])[0]
            end = len(prompt) + len(answer) + 1
            assert ids[len(prompt) : end] == [*answer, template.stop_token_id]
            expected[len(prompt) : end] = [True] * (len(answer) + 1)
            remaining.pop(0)
            if can_spell(tokenizer, text):
                assert normalize_text(tokenizer, text) in tokenizer.decode(ids)
        assert supervised == expected
    assert not remaining


def can_spell(tokenizer: Any, text: str) -> bool:
    """Return whether the vocabulary has a token for every byte; SmolLM2's lacks those of some control characters."""
    return set(normalize_text(tokenizer, text).encode()) <= get_vocab_bytes(tokenizer)


@cache
def get_vocab_bytes(tokenizer: Any) -> set[int]:
    """Return the bytes for which the vocabulary has a token."""
    vocab = tokenizer.get_vocab()
    return {byte for byte, character in bytes_to_unicode().items() if character in vocab}


def normalize_text(tokenizer: Any, text: str) -> str:
    """Apply the tokenizer's normalizer, if it has one."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer else text


def check_encoded(encoder: Encoder, conversation: Conversation, sequences: list[Any]) -> None:
    """Labels are the next ids where those are supervised, and the outcome agrees with the lengths."""
    limit = encoder.max_length
    columns = encoder({"conversation": [format_conversation(conversation)], "origin": ["a row"]})
    [(ids, labels, lengths, computed, outcome, dropped)] = zip(*columns.values())
    assert len(ids) == len(labels) == sum(lengths) >= computed and max(lengths, default=0) <= limit
    expected = [
        (row, [i if s else IGNORED for i, s in zip(row[1:], supervised[1:])] + [IGNORED])
        for row, supervised in sequences
    ]
    fitting = [pair for pair in expected if len(pair[0]) <= limit]
    if outcome == "kept":
        assert ids == [i for row, _ in fitting for i in row] and labels == [i for _, row in fitting for i in row]
        assert dropped == len(expected) - len(fitting)
    elif outcome == "truncated":
        assert sum(label != IGNORED for label in labels) > 0 and len(fitting) < len(expected)
        if encoder.overlong == "truncate_answer":
            assert len(lengths) + dropped == len(expected)
    else:
        assert not ids and not fitting and outcome == ("longer than max_length" if expected else "nothing supervised")


_TEMPLATES: dict[str, list[tuple[Any, Any]]] = {}


def get_templates() -> dict[str, list[tuple[Any, Any]]]:
    """Return {name: [(tokenizer, template)]} for the tiny tokenizer and the real ones that are on this machine."""
    if not _TEMPLATES:
        tokenizers = [
            build_tokenizer(CHATML),
            *(AutoTokenizer.from_pretrained(path) for path in find_tokenizers()),
        ]
        _TEMPLATES["agent"] = [(tokenizer := build_tokenizer(AGENT_TEMPLATE), build_template("chat", tokenizer))]
        for name in ("role", "chat"):
            # Qwen's chat template strips the white space around an answer.
            usable = [t for t in tokenizers if name == "role" or "strip(" not in t.chat_template]
            _TEMPLATES[name] = [(tokenizer, build_template(name, tokenizer)) for tokenizer in usable]
    return _TEMPLATES


def find_tokenizers() -> list[Path]:
    folders = [QWEN3, Path("~/.cache/sft_pipeline/models/smollm2-135m").expanduser()]
    return [folder for folder in folders if (folder / "tokenizer.json").is_file()]


FIELDS = [
    field for cls in (SFTArguments, TrainingArguments) for field in cls.__dataclass_fields__.values() if field.init
]
# Fields that use a device, a file or a process group when they are parsed.
EXCLUDED = {
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "output_dir",
    "local_rank",
    "ddp_backend",
    "torch_compile",
    "debug",
    "tpu_num_cores",
}
KEYS = [field.name for field in FIELDS if field.name not in EXCLUDED]
VALUES = [
    0,
    1,
    -1,
    0.5,
    10**30,
    float("inf"),
    float("nan"),
    "1e-5",
    "auto",
    "no",
    "true",
    "steps",
    [],
    {},
    "{}",
    "[",
    None,
]
BASE = {"model_name_or_path": "m", "train_data": ["rows.json"], "use_cpu": True, "report_to": "none"}
TAGS = [
    "!!int ",
    "!!float ",
    "!!bool ",
    "!!timestamp ",
    "!!binary ",
    "!!set ",
    "!!omap ",
    "&a [*a]",
    "? ",
    "- ",
    "{",
    "[[",
]
TAGS += ["!!python/object/apply:os.system [exit]", "2020-13-45", "0b_", "1:99:1", ": ", "\t", "---\n", "max_length: "]


def draw_setting(random: Random) -> tuple[str, Any]:
    key = random.choice(KEYS) if random.random() < 0.9 else draw_text(random)
    return key, random.choice(VALUES) if draw_bool(random) else draw_value(random)


def draw_settings(random: Random) -> list[tuple[str, Any]]:
    return [draw_setting(random) for _ in range(random.randrange(3))]


def draw_yaml(random: Random) -> bytes:
    if random.random() < 0.25:
        words = [random.choice(TAGS) if draw_bool(random) else draw_text(random) for _ in range(random.randrange(7))]
        return "".join(words).encode("utf-8", "ignore")
    content = yaml.safe_dump({**BASE, **dict(draw_settings(random))}, allow_unicode=True).encode("utf-8", "ignore")
    return damage_bytes(random, content) if random.random() < 0.3 else content


@target(draw_yaml, draw_settings)
def check_config(content: bytes, overrides: list[tuple[str, Any]]) -> None:
    """A config and a command line give valid arguments, or an error."""
    path = write_file("config.yaml", content)
    words = [f"--{key}={value}" for key, value in overrides]
    parsed = return_or_catch(lambda: parse_config(str(path), words))
    if not isinstance(parsed, SFTError):
        args = parsed
        assert isinstance(args.max_length, int) and args.max_length >= 1 and args.train_data and args.output_dir
        assert args.template in ("role", "chat") and isinstance(args.trust_remote_code, bool)


def draw_answer_lines(random: Random) -> bytes:
    """Draw a partial answer file with lines of answers, other JSON and bytes."""
    lines = []
    for _ in range(random.randrange(5)):
        answer = {"origin": draw_text(random), **({"error": draw_text(random)} if random.random() < 0.2 else {})}
        entry = [random.randrange(4), random.randrange(2), answer]
        value = entry if random.random() < 0.7 else draw_value(random)
        lines.append(draw_bytes(random, 12) if random.random() < 0.1 else json.dumps(value).encode() + b"\n")
    return damage_bytes(random, b"".join(lines))


@target(draw_answer_lines, draw_bool, draw_bool)
def check_answers(content: bytes, header: bool, overwrite: bool) -> None:
    """A partial file of any content is continued or refused; the finished file has every answer once, in order."""
    for file in WORK.glob("answers*"):
        file.unlink()
    begin = json.dumps({"generate": {"seed": 1}}).encode() + b"\n" if header else b""
    write_file("answers.jsonl.partial", begin + content)
    file = return_or_catch(lambda: AnswerFile(WORK / "answers.jsonl", {"seed": 1}, overwrite))
    if isinstance(file, SFTError):
        assert not overwrite
        return
    previous = dict(file.records)
    for prompt, sample in itertools.product(range(4), range(2)):
        if (prompt, sample) not in previous:
            file.add((prompt, sample), {"origin": f"{prompt} {sample}"})
    file.write_output()
    file.close()
    written = [json.loads(line) for line in (WORK / "answers.jsonl").read_bytes().splitlines()]
    good = [row for _, row in sorted(file.records.items()) if "error" not in row]
    assert json.dumps(written) == json.dumps(good) and {*itertools.product(range(4), range(2))} <= file.records.keys()


# Shares of all inputs; `sources` uses datasets, which takes tens of milliseconds per file.
SHARES = {
    "readers": 0.2,
    "formats": 0.44,
    "sources": 0.01,
    "prompts": 0.12,
    "templates": 0.14,
    "config": 0.06,
    "answers": 0.03,
}


def run_target(name: str, numbers: range, seed: int) -> None:
    """Check the inputs with these numbers. Prints the input of a finding and raises its error."""
    check, inputs = TARGETS[name]
    for number in numbers:
        random = Random(f"{seed} {name} {number}")
        arguments = [draw(random) for draw in inputs]
        try:
            check(*arguments)
        except Exception:
            print(f"{name}: A FINDING; --only {name} --seed {seed} --at {number}: {arguments!a}", flush=True)
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one target instead of all")
    parser.add_argument("--at", type=int, help="one input instead of all")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = WORK / "datasets"
    logging.disable(logging.WARNING)
    failed = 0
    for name in [args.only] if args.only else TARGETS:
        count, started = args.inputs if args.only else round(args.inputs * SHARES[name]), time.monotonic()
        numbers = range(count) if args.at is None else range(args.at, args.at + 1)
        try:
            run_target(name, numbers, args.seed)
        except Exception:  # a finding may be of any class, and the other targets still run
            failed += 1
            traceback.print_exc()
        else:
            print(f"{name}: {len(numbers):,} inputs, no finding, {time.monotonic() - started:.0f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
