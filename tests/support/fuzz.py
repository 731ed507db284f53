"""The fuzzer: whatever stands in a file, a conversation or a config, the outcome is a right result or one line of ours.

    python tests/support/fuzz.py --inputs 100000 --seed 1            # spread over all targets, as SHARES says
    python tests/support/fuzz.py --only templates --seed 1 --at 1234 # one input again, as a finding names it

Each target is a property of one random input, which seed, target and number decide. tests/test_fuzz.py runs some with
every run of the suite. Inputs are drawn by Python's generator: hypothesis spends several times what the checks take.
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
from support.conversations import QWEN3
from support.tiny import CHATML, CONTROL, build_tokenizer
from transformers import AutoTokenizer, TrainingArguments
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sft_pipeline.commands.resumable_jsonl import AnswerFile
from sft_pipeline.config import SFTArguments, parse_config
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import IGNORED, Encoder
from sft_pipeline.data.formats import FORMATS, convert_to_messages, detect_format
from sft_pipeline.data.messages import add_system_prompt
from sft_pipeline.data.prompts import load_prompts
from sft_pipeline.data.readers import read_rows
from sft_pipeline.data.sources import load_source, read_raw_rows
from sft_pipeline.data.text_encoder import encode_as_text
from sft_pipeline.utils.errors import SFTError

WORK = Path(tempfile.mkdtemp(prefix="sft_pipeline_fuzz_"))
NAMES = ["messages", "conversations", "system", "instruction", "input", "output", "history", "prompt", "completion"]
SPEAKERS = ["system", "user", "assistant", "human", "gpt", "tool", "", "\x1b[2J"]

# ---- values: functions of a Random

# Control characters, halves of characters, spellings of control tokens and of what stands in for them, line ends of
# every kind, marks of the templates, jinja, markup.
ODD = ["\x1b[31m", "\x00", "\x9b2J", "\r", "\ud800", "\ufeff", "\u2028", "\ue000sft0\ue001", "\ue000", "\U0010ffff"]
SPELLED = [*CONTROL, "<|im_", "end|>", "\n#USER:", "\n#ASSISTANT:", "assistant\n", "{{ 7*7 }}", "{% raw %}", "<script>"]
PLAIN = ["", " ", "\n", "the answer", "冬瓜", "🙂", "é", "e\u0301", "null", "1e5", "2020-13-45", "=1+1", '"', ",", "'"]
NUMBERS = [0, 1, -1, 0.5, 1e-5, 10**30, float("inf"), float("nan"), True, False]
PLANES = [0x80, 0x250, 0x3000, 0xA000, 0x10000, 0x110000]  # a character is drawn below one of these


def text(random: Random) -> str:
    drawn = [lambda: random.choice(ODD), lambda: random.choice(SPELLED), lambda: random.choice(PLAIN)]
    drawn += [lambda: chr(random.randrange(random.choice(PLANES)))]
    return "".join(random.choice(drawn)() for _ in range(random.randrange(5)))


def good_text(random: Random) -> str:
    """That `convert_to_messages` takes."""
    return text(random).encode("utf-8", "ignore").decode() + random.choice("x.瓜")


def boolean(random: Random) -> bool:
    return random.random() < 0.5


def anything(random: Random, depth: int = 3) -> Any:
    kind = random.randrange(6 if depth else 4)
    if kind < 2:
        return text(random)
    if kind == 2:
        return random.choice([None, *NUMBERS])
    if kind == 3:
        return random.getrandbits(random.choice([1, 40, 200]))
    inner = [anything(random, depth - 1) for _ in range(random.randrange(4))]
    return inner if kind == 4 else {text(random): one for one in inner}


def mostly(random: Random, make: Callable[[Random], Any]) -> Any:
    return make(random) if random.random() < 0.85 else anything(random)


def turns(random: Random, role: str = "role", content: str = "content") -> list[Any]:
    """A conversation in a shape's own words, good or in some way bad."""
    speakers = ("human", "gpt") if role == "from" else ("user", "assistant")
    said = [{role: speakers[at % 2], content: good_text(random)} for at in range(random.choice([2, 2, 4, 1, 0]))]
    while random.random() < 0.3:
        turn = {role: mostly(random, lambda r: r.choice(SPEAKERS)), content: mostly(random, text)}
        said.insert(random.randint(0, len(said)), turn if boolean(random) else anything(random))
    return said


def row(random: Random) -> Any:
    shape = random.randrange(7)
    if shape == 0:
        return {"messages": mostly(random, turns)}
    if shape == 1:
        spoken = mostly(random, partial(turns, role="from", content="value"))
        return {"conversations": spoken, **({"system": mostly(random, text)} if boolean(random) else {})}
    if shape < 4:
        return {"instruction": mostly(random, good_text), "output": mostly(random, good_text)} | more(random)
    if shape == 4:
        make = random.choice([text, good_text, turns])
        return {"prompt": mostly(random, make), "completion": mostly(random, make)}
    names = random.choices(NAMES, k=random.randrange(4))
    return {name: anything(random) for name in names} if shape == 5 else anything(random)


def more(random: Random) -> dict[str, Any]:
    """Alpaca's other columns."""
    history = [[text(random) for _ in range(random.choice([2, 2, 2, 1]))] for _ in range(random.randrange(3))]
    found = {
        "input": mostly(random, text),
        "system": mostly(random, text),
        "history": mostly(random, lambda _: history),
    }
    return {name: value for name, value in found.items() if random.random() < 0.3}


def rows(random: Random) -> list[Any]:
    """Mostly of one shape, as files are."""
    if boolean(random):
        return [row(random) for _ in range(random.randrange(6))]
    return [{"instruction": good_text(random), "output": mostly(random, text)} for _ in range(random.randint(1, 6))]


def binary(random: Random, most: int) -> bytes:
    return random.randbytes(random.randint(0, most))


# ---- files


def as_json(rows: list[Any]) -> bytes:
    return json.dumps(rows).encode()


def as_jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[Any]) -> bytes:
    file = io.StringIO(newline="")
    columns = list(dict.fromkeys(str(key) for row in rows if isinstance(row, dict) for key in row)) or ["prompt"]
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows([str(row.get(key, "")) for key in columns] for row in rows if isinstance(row, dict))
    return file.getvalue().encode("utf-8", "surrogatepass")


def as_table(rows: list[Any]) -> pa.Table:
    """What Arrow can hold of the rows: those that are alike enough, else their texts."""
    found = [row for row in rows if isinstance(row, dict) and row]
    try:
        return pa.Table.from_pylist(found)
    except (pa.ArrowException, TypeError, OverflowError, ValueError, AttributeError):
        texts = [{"instruction": ascii(row), "output": "x"} for row in found]
        return pa.Table.from_pylist(texts)


def as_parquet(rows: list[Any]) -> bytes:
    sink, table = io.BytesIO(), as_table(rows)
    try:
        pq.write_table(table, sink)
    except (pa.ArrowException, TypeError):  # a struct without fields has no form in Parquet
        sink = io.BytesIO()
        pq.write_table(pa.table({"prompt": ["x"]}), sink)
    return sink.getvalue()


def as_arrow(rows: list[Any], stream: bool = True) -> bytes:
    sink, table = io.BytesIO(), as_table(rows)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


WRITERS = {".json": as_json, ".jsonl": as_jsonl, ".csv": as_csv, ".parquet": as_parquet, ".arrow": as_arrow}


def damaged(random: Random, content: bytes) -> bytes:
    """The content, cut off, with bytes replaced, taken out, put in or doubled."""
    for _ in range(random.choice([0, 0, 1, 1, 2, 3])):
        at = random.randint(0, len(content))
        end = at + random.randrange(9)
        content = content[:at] + random.choice([binary(random, 8), content[at:end] * 2, b""]) + content[end:]
        content = content[: random.choice([len(content), len(content), random.randint(0, len(content))])]
    return content


def files(random: Random) -> tuple[str, bytes, list[Any] | None]:
    """(suffix, content, rows): the rows where the file is whole JSON or JSONL."""
    suffix = random.choice([".json", ".jsonl", ".csv", *WRITERS])
    if random.random() < 0.1:
        return suffix, binary(random, 80), None
    written = rows(random)
    content = WRITERS[suffix](written)
    broken = damaged(random, content)
    return suffix, broken, written if broken == content and suffix in (".json", ".jsonl") else None


def put(name: str, content: bytes) -> Path:
    file = WORK / name
    file.write_bytes(content)
    return file


def one_line(call: Callable[[], Any]) -> Any:
    """What the call returns, or its SFTError, whose message is one line that a terminal prints and nothing more."""
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
    """Registers a property of these inputs under its name."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        TARGETS[check.__name__] = check, inputs
        return check

    return register


@target(files)
def readers(file: tuple[str, bytes, list[Any] | None]) -> None:
    """Every row of a file comes out, equal and in order, and each is messages or refused; a broken file is one line."""
    suffix, content, expected = file
    path = put(f"rows{suffix}", content)
    placed = one_line(lambda: list(read_rows(path, path.name)))
    if expected is not None and not isinstance(placed, SFTError):
        assert json.dumps([row for _, row in placed]) == json.dumps(expected)
    if isinstance(placed, SFTError):
        assert expected is None or (suffix == ".jsonl" and not expected), placed
        return
    shape = one_line(lambda: detect_format(placed[0][1]) if placed and isinstance(placed[0][1], dict) else None)
    for _, row in placed:
        if shape and not isinstance(shape, SFTError):
            check_messages(one_line(lambda row=row: convert_to_messages(row, shape)))


@target(row, lambda random: random.choice(list(FORMATS)))
def formats(row: Any, shape: str) -> None:
    """A row is well-formed messages whose every text stood in the row, or is refused."""
    messages = one_line(lambda: convert_to_messages(row, FORMATS[shape]))
    check_messages(messages)
    if not isinstance(messages, SFTError):
        texts = list(leaves(row))
        for message in messages:
            assert message["content"] in texts or (
                shape == "alpaca" and any(t and t in message["content"] for t in texts)
            )


def leaves(value: Any) -> Any:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    yield from [value] if parts is None else itertools.chain.from_iterable(map(leaves, parts)) if parts else []


def check_messages(messages: list[dict[str, str]] | SFTError) -> None:
    if isinstance(messages, SFTError):
        return
    start = messages[0]["role"] == "system"
    assert [message["role"] for message in messages[start:]] == ["user", "assistant"] * ((len(messages) - start) // 2)
    assert all(message.keys() == {"role", "content"} and message["content"].strip() for message in messages)
    json.dumps(messages, ensure_ascii=False).encode()


@target(files, boolean)
def sources(file: tuple[str, bytes, list[Any] | None], skip: bool) -> None:
    """rows kept + rows skipped = rows in the file, in order; without skipping, one bad row refuses the file."""
    suffix, content, _ = file
    path = put(f"source{suffix}", content)
    loaded = one_line(lambda: load_source(str(path), skip_bad_rows=skip))
    placed = one_line(lambda: list(read_raw_rows(str(path))))
    if isinstance(placed, SFTError) or not placed or not isinstance(placed[0][1], dict):
        assert isinstance(loaded, SFTError)
        return
    shape = one_line(lambda: detect_format(placed[0][1]))
    if isinstance(shape, SFTError):
        assert isinstance(loaded, SFTError)
        return
    examined = [(place, one_line(lambda row=row: convert_to_messages(row, shape))) for place, row in placed]
    good = [(place, messages) for place, messages in examined if not isinstance(messages, SFTError)]
    if not good or (len(good) < len(placed) and not skip):
        assert isinstance(loaded, SFTError) and any(place in str(loaded) for place, _ in examined)
        return
    assert list(zip(loaded["origin"], loaded["messages"])) == good


@target(files, boolean)
def prompts(file: tuple[str, bytes, list[Any] | None], text: bool) -> None:
    """A prompt a row, good or with its problem; a prompt a line that is not empty."""
    suffix, content, _ = file
    path = put(f"prompts{'.txt' if text else suffix}", content)
    found = one_line(lambda: load_prompts(str(path)))
    if isinstance(found, SFTError):
        return
    for one in found:
        assert bool(one.problem) != bool(one.messages)
        check_messages([*one.messages, {"role": "assistant", "content": "x"}] if one.messages else SFTError("bad"))
    if text:
        lines = re.split("\r\n|\r|\n", content.decode("utf-8-sig"))
        assert len(found) == sum(bool(line.strip()) for line in lines)
    else:
        assert [one.origin for one in found] == [place for place, _ in read_raw_rows(str(path))]


def conversations(random: Random) -> list[dict[str, str]]:
    """As `convert_to_messages` lets them through: every text has something that is no white space."""
    said = [good_text(random) for _ in range(random.choice([2, 2, 4, 6]))]
    start = [{"role": "system", "content": good_text(random)}] if random.random() < 0.4 else []
    return start + [{"role": ("user", "assistant")[at % 2], "content": one} for at, one in enumerate(said)]


@target(
    conversations,
    lambda random: random.choice(["role", "chat"]),
    lambda random: random.choice([None, good_text(random)]),
    lambda random: random.choice(["all", "last"]),
    lambda random: random.choice(["drop", "truncate_answer", "truncate_turns"]),
    Random.random,
    Random.random,
)
def templates(
    messages: list[dict[str, str]],
    name: str,
    system: str | None,
    train_on: str,
    overlong: str,
    which: float,
    limit: float,
) -> None:
    """The prompt is a prefix, the text comes back, the answer and its stop token are supervised and nothing else, no
    control token comes from a text, and every row has an outcome."""
    known = tokenizers()[name]
    tokenizer, template = known[int(which * len(known))]
    told = add_system_prompt(messages, system)
    [runs] = template.render([told], train_on)
    ids = [i for run in runs for i in run.ids]
    supervised = [run.supervised for run in runs for _ in run.ids]
    answered = [False] * len(ids)
    for at, message in enumerate(told):
        if message["role"] == "assistant" and (train_on == "all" or at == len(told) - 1):
            prompt = template.encode_prompt(told[:at])
            assert ids[: len(prompt)] == prompt
            answer = encode_as_text(tokenizer, [message["content"]])[0]
            end = len(prompt) + len(answer) + 1
            assert ids[len(prompt) : end] == [*answer, template.stop_token_id]
            answered[len(prompt) : end] = [True] * (len(answer) + 1)
    assert supervised == answered
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    [plain] = template.render([[{**message, "content": "x"} for message in told]], train_on)
    assert [i for i in ids if i in control] == [i for run in plain for i in run.ids if i in control]
    pieces = [
        piece.text or tokenizer.convert_ids_to_tokens(piece.token_id)
        for piece in template.split_conversation(told, train_on)
    ]
    if can_spell(tokenizer, "".join(pieces)):
        assert tokenizer.decode(ids) == "".join(normal(tokenizer, text) for text in pieces)
    assert all(message["content"] in "".join(pieces) for message in told)
    encoder = Encoder(template, system, 1 + int(limit * 1.4 * len(ids)), overlong, train_on)
    check_encoded(encoder, messages, ids, supervised)


def can_spell(tokenizer: Any, text: str) -> bool:
    """Whether the vocabulary has a token for every byte; SmolLM2's lacks some for control characters."""
    return set(normal(tokenizer, text).encode()) <= spelled_bytes(tokenizer)


@cache
def spelled_bytes(tokenizer: Any) -> set[int]:
    vocabulary = tokenizer.get_vocab()
    return {byte for byte, letter in bytes_to_unicode().items() if letter in vocabulary}


def normal(tokenizer: Any, text: str) -> str:
    """The text as the tokenizer's normalizer leaves it."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer else text


def check_encoded(encoder: Encoder, messages: list[dict[str, str]], ids: list[int], supervised: list[bool]) -> None:
    """Labels are the next ids where those are supervised; a row is kept, cut or dropped, and says which."""
    limit = encoder.max_length
    [encoded] = zip(*encoder({"messages": [messages], "origin": ["a row"]}).values())
    found, labels, outcome = encoded
    assert len(found) == len(labels) <= limit
    if outcome == "kept":
        assert found == ids and labels == [i if s else IGNORED for i, s in zip(ids[1:], supervised[1:])] + [IGNORED]
    elif outcome == "truncated":
        assert sum(label != IGNORED for label in labels) > 0 and limit < len(ids)
        assert encoder.overlong == "truncate_turns" or found == ids[:limit]
    else:
        assert not found and limit < len(ids) and outcome in ("longer than max_length", "nothing supervised")


_TOKENIZERS: dict[str, list[tuple[Any, Any]]] = {}


def tokenizers() -> dict[str, list[tuple[Any, Any]]]:
    """{template: (tokenizer, template)}: the tests' own, and the real ones that are on this machine."""
    if not _TOKENIZERS:
        found = [build_tokenizer(CHATML), *(AutoTokenizer.from_pretrained(path) for path in real_tokenizers())]
        for name in ("role", "chat"):
            # Qwen's chat template takes the white space around an answer away.
            fitting = [one for one in found if name == "role" or "strip(" not in one.chat_template]
            _TOKENIZERS[name] = [(one, build_template(name, one)) for one in fitting]
    return _TOKENIZERS


def real_tokenizers() -> list[Path]:
    folders = [QWEN3, Path("~/.cache/sft_pipeline/models/smollm2-135m").expanduser()]
    return [folder for folder in folders if (folder / "tokenizer.json").is_file()]


KEYS = [field for cls in (SFTArguments, TrainingArguments) for field in cls.__dataclass_fields__.values() if field.init]
# Those that reach for a device, a file or a process group when they are looked at.
LEFT_OUT = {
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
KEY = [field.name for field in KEYS if field.name not in LEFT_OUT]
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


def setting(random: Random) -> tuple[str, Any]:
    key = random.choice(KEY) if random.random() < 0.9 else text(random)
    return key, random.choice(VALUES) if boolean(random) else anything(random)


def settings(random: Random) -> list[tuple[str, Any]]:
    return [setting(random) for _ in range(random.randrange(3))]


def yaml_files(random: Random) -> bytes:
    if random.random() < 0.25:
        words = [random.choice(TAGS) if boolean(random) else text(random) for _ in range(random.randrange(7))]
        return "".join(words).encode("utf-8", "ignore")
    written = yaml.safe_dump({**BASE, **dict(settings(random))}, allow_unicode=True).encode("utf-8", "ignore")
    return damaged(random, written) if random.random() < 0.3 else written


@target(yaml_files, settings)
def config(content: bytes, overrides: list[tuple[str, Any]]) -> None:
    """A config and a command line are arguments whose checks hold, or one line."""
    path = put("config.yaml", content)
    words = [f"--{key}={value}" for key, value in overrides]
    parsed = one_line(lambda: parse_config(str(path), words))
    if not isinstance(parsed, SFTError):
        sft, training = parsed
        assert isinstance(sft.max_length, int) and sft.max_length >= 1 and sft.train_data and training.output_dir
        assert sft.template in ("role", "chat") and isinstance(sft.trust_remote_code, bool)


def partial_lines(random: Random) -> bytes:
    """Lines of answers, of anything else, and of bytes."""
    lines = []
    for _ in range(random.randrange(5)):
        answer = {"origin": text(random), **({"error": text(random)} if random.random() < 0.2 else {})}
        kept = [random.randrange(4), random.randrange(2), answer]
        said = kept if random.random() < 0.7 else anything(random)
        lines.append(binary(random, 12) if random.random() < 0.1 else json.dumps(said).encode() + b"\n")
    return damaged(random, b"".join(lines))


@target(partial_lines, boolean, boolean)
def answers(content: bytes, header: bool, overwrite: bool) -> None:
    """A partial file of any content is gone on with or refused; what is finished has every answer once, in order."""
    for file in WORK.glob("answers*"):
        file.unlink()
    begin = json.dumps({"generate": {"seed": 1}}).encode() + b"\n" if header else b""
    put("answers.jsonl.partial", begin + content)
    file = one_line(lambda: AnswerFile(WORK / "answers.jsonl", {"seed": 1}, overwrite))
    if isinstance(file, SFTError):
        assert not overwrite
        return
    kept = dict(file.records)
    for prompt, sample in itertools.product(range(4), range(2)):
        if (prompt, sample) not in kept:
            file.add((prompt, sample), {"origin": f"{prompt} {sample}"})
    file.write_output()
    file.close()
    written = [json.loads(line) for line in (WORK / "answers.jsonl").read_bytes().splitlines()]
    good = [row for _, row in sorted(file.records.items()) if "error" not in row]
    assert json.dumps(written) == json.dumps(good) and {*itertools.product(range(4), range(2))} <= file.records.keys()


# Of all inputs; `sources` goes through datasets, which takes tens of milliseconds a file.
SHARES = {
    "readers": 0.2,
    "formats": 0.44,
    "sources": 0.01,
    "prompts": 0.12,
    "templates": 0.14,
    "config": 0.06,
    "answers": 0.03,
}


def run(name: str, numbers: range, seed: int) -> None:
    """Give a target its inputs of these numbers; raises what it finds, with the input said."""
    check, inputs = TARGETS[name]
    for number in numbers:
        random = Random(f"{seed} {name} {number}")
        made = [make(random) for make in inputs]
        try:
            check(*made)
        except Exception:
            print(f"{name}: A FINDING; --only {name} --seed {seed} --at {number}: {made!a}", flush=True)
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
            run(name, numbers, args.seed)
        except Exception:  # a finding may be of any class, and the other targets go on
            failed += 1
            traceback.print_exc()
        else:
            print(f"{name}: {len(numbers):,} inputs, no finding, {time.monotonic() - started:.0f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
