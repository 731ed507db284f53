"""Prepared shards: the same rows and run, refused by name where anything differs, whole or absent, mapped alone."""

import dataclasses
import json
import re
import resource
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
import torch.multiprocessing
import yaml
from rich.console import Console
from safetensors.torch import load_file
from support.processes import call_in_process, run_ranks
from support.tiny import CHATML, build_tokenizer
from tokenizers import normalizers

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.cli import main
from sft_pipeline.config import SFTConfig, parse_config
from sft_pipeline.data import shards
from sft_pipeline.data.batch_sampler import StepBatchSampler, count_row_tokens
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import Encoder, hash_texts
from sft_pipeline.data.pipeline import PreparedData, prepare_data
from sft_pipeline.data.shards import (
    PARTS,
    RECORD_FILE,
    _map_part,
    find_shard_mismatch,
    list_shard_inputs,
    map_shards,
    write_shards,
)
from sft_pipeline.data.splits import parse_sets
from sft_pipeline.model.loading import load_tokenizer
from sft_pipeline.train import train
from sft_pipeline.utils.errors import SFTError

PROCESSES = 2
REMEDY = "run `prepare` again, or use the config it was prepared with"


@pytest.fixture
def config(tmp_path, model_folder, cache, monkeypatch) -> Path:
    """A config whose rows are rows.jsonl beside it; their folder is the current one."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {n} times {n}.", "input": "", "output": "text " * (n % 7 + 1)} for n in range(30)]
    rows[11] |= {"output": "a row that is dropped " * 40, "id": 11}
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"model_name_or_path": str(model_folder), "train_data": "rows.jsonl", "held_out": 6, "template": "role"}
    keys |= {"system_prompt": "You are 冬瓜.", "max_length": 200, "num_answers": 2, "num_instructions": 0}
    keys |= {"max_new_tokens": 4, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    keys |= {"logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    keys |= {"prepared_data": "shards"}
    Path("config.yaml").write_text(yaml.safe_dump(keys, allow_unicode=True))
    return tmp_path / "config.yaml"


@pytest.fixture
def written(config, tokenizer) -> SFTConfig:
    """The config's keys, with its rows in shards/."""
    args = parse_config(str(config), [])
    write_shards(args, build_template("role", tokenizer), Path("shards"))
    return args


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args):
        raise AssertionError("a row is encoded")

    monkeypatch.setattr(Encoder, "__call__", refused)
    monkeypatch.setattr("sft_pipeline.data.pipeline.load_source", refused)


def same_rows(data: PreparedData, expected: PreparedData) -> bool:
    parts = [
        [getattr(prepared, name) and getattr(prepared, name).to_list() for name in PARTS]
        for prepared in (data, expected)
    ]
    return parts[0] == parts[1] and parts[0][0] != []


# What is mapped.


@pytest.mark.parametrize("shard_size", ["500MB", "3KB"])
def test_mapped_rows_are_those_that_were_encoded(shard_size, config, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "MAX_SHARD_SIZE", shard_size)
    args = parse_config(str(config), [])
    template = build_template("role", tokenizer)
    write_shards(args, template, Path("shards"))
    files = sorted(path.name for path in Path("shards/train").glob("*.arrow"))
    assert (len(files) > 2) == (shard_size == "3KB")
    expected = prepare_data(args, template)
    no_encoding(monkeypatch)
    with caplog.at_level("INFO", "sft_pipeline.data.shards"):
        data = map_shards(args, template)
    assert same_rows(data, expected)
    assert data.sources == expected.sources and data.sources
    assert data.unread == expected.unread == {"rows.jsonl": {"id": 1}}
    assert "rows.jsonl: not read: id in 1 row" in caplog.messages
    assert data.train_stats == expected.train_stats and data.held_out_stats == expected.held_out_stats
    assert data.train_stats.dropped == {"longer than max_length": 1} and data.train_stats.cached
    # As files, of which nothing is in memory before it is read.
    assert [Path(file["filename"]).name for file in data.train.cache_files] == files


def write_long_rows(folder: Path) -> None:
    row = np.arange(10_000, dtype=np.int32)
    made = datasets.Dataset.from_dict({name: [row] * 20 for name in ("input_ids", "labels")})
    datasets.concatenate_datasets([made] * 40).save_to_disk(folder)


def count_tokens_read(folder: Path, limit: int, is_mapped: bool) -> int:
    """How many there are, read in the order of training by a process that may take `limit` bytes more."""
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # Arrow's own has set some aside before it is limited
    taken = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (taken + limit, taken + limit))
    rows = _map_part(folder) if is_mapped else datasets.load_from_disk(folder, keep_in_memory=True)
    rows = rows.with_format("numpy")
    batches = StepBatchSampler(count_row_tokens(rows), seed=1, rows=10, packed=True)
    return sum(len(rows[row]["input_ids"]) for batch in batches for row in batch)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts there what a process has taken")
def test_shards_that_memory_could_not_hold_are_read(tmp_path):
    """In processes of their own: this one may have freed memory that it could take without asking for more."""
    call_in_process(write_long_rows, tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.arrow"))
    assert size > 2**26 - 2**22
    assert call_in_process(count_tokens_read, tmp_path, size // 3, True) == 8_000_000
    with pytest.raises(pyarrow.ArrowMemoryError):
        call_in_process(count_tokens_read, tmp_path, size // 3, False)


def test_held_out_sets_are_mapped_and_their_names_compared(config, tokenizer, monkeypatch):
    rows = [{"instruction": f"Ask {n}.", "output": "text " * (n % 4 + 1)} for n in range(6)]
    for name, part in (("en", rows[:4]), ("zh", rows[4:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    held_out = lambda **sets: ["--held_out", "0", "--eval_data", json.dumps(sets)]  # noqa: E731
    args = parse_config(str(config), held_out(zh="zh.jsonl", en="en.jsonl"))
    template = build_template("role", tokenizer)
    write_shards(args, template, Path("shards"))
    expected = prepare_data(args, template)
    renamed = parse_config(str(config), held_out(zh="zh.jsonl", english="en.jsonl"))
    joined = parse_config(str(config), ["--held_out", "0", "--eval_data", "zh.jsonl", "en.jsonl"])
    for other in (renamed, joined):
        assert find_shard_mismatch(other, template, Path("shards")).startswith("held_out_sets differs (prepared with {")
    no_encoding(monkeypatch)
    data = map_shards(args, template)
    assert same_rows(data, expected) and list(data.held_out_sets) == ["zh", "en"]
    assert data.held_out_sets == {
        name: dataclasses.replace(stats, cached=True) for name, stats in expected.held_out_sets.items()
    }
    assert parse_sets(data.held_out_conversations) == parse_sets(expected.held_out_conversations)


def test_without_held_out_rows(config, tokenizer):
    args = parse_config(str(config), ["--held_out", "0"])
    template = build_template("role", tokenizer)
    write_shards(args, template, Path("shards"))
    data = map_shards(args, template)
    assert data.held_out is data.held_out_stats is data.held_out_conversations is None
    assert same_rows(data, prepare_data(args, template))


def test_a_run_from_shards_is_the_run_without(config, monkeypatch, capsys):
    def run(name: str, *keys: str) -> dict:
        args = parse_config(str(config), ["--output_dir", name, *keys])
        args.prepared_data = args.prepared_data if keys else None
        return train(args, Console(quiet=True))

    expected = run("plain")
    capsys.readouterr()
    main(["prepare", str(config)])
    assert capsys.readouterr().out == "prepared in shards; to train from it add --prepared_data shards\n"
    no_encoding(monkeypatch)
    result = run("mapped", "--prepared_data", "shards")
    measured = ("tokens_per_second", "peak_memory_gib", "runtime", "per_second")
    curves = [
        [{key: value for key, value in entry.items() if not key.endswith(measured)} for entry in results["loss_curve"]]
        for results in (expected, result)
    ]
    assert curves[0] == curves[1] and len({entry["loss"] for entry in curves[0] if "loss" in entry}) == 3
    assert result["answers"] == expected["answers"] and result["answers"]
    weights = [load_file(Path(name) / "model.safetensors") for name in ("plain", "mapped")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_the_folder_that_prepare_chooses(config, capsys, monkeypatch):
    text = config.read_text().replace("prepared_data: shards\n", "output_dir: out/tiny\n")
    config.write_text(text)
    main(["prepare", str(config)])
    assert "add --prepared_data out/tiny-prepared\n" in capsys.readouterr().out
    no_encoding(monkeypatch)
    train(parse_config(str(config), ["--prepared_data", "out/tiny-prepared"]), Console(quiet=True))
    assert Path("out/tiny/results.json").is_file()


def work(process: int, config: str) -> None:
    """One of two processes, neither of which may encode or read the data: it leaves what it was given and refused."""
    args = parse_config(config, ["--ddp_backend", "gloo"])
    assert args.world_size == PROCESSES
    template = build_template("role", load_tokenizer(args.model_name_or_path))
    with pytest.MonkeyPatch.context() as patch:
        no_encoding(patch)
        data = map_shards(args, template)
        args.max_length = 150
        with pytest.raises(SFTError) as refused:
            map_shards(args, template)
    rows = [getattr(data, name).to_list() for name in PARTS]
    Path(f"found-{process}.json").write_text(json.dumps({"rows": rows, "refused": str(refused.value)}))
    torch.distributed.destroy_process_group()


def test_two_processes_map_and_neither_encodes(config):
    main(["prepare", str(config)])
    run_ranks(work, PROCESSES, str(config))
    results = [json.loads(Path(f"found-{process}.json").read_text()) for process in range(PROCESSES)]
    args = parse_config(str(config), [])
    expected = prepare_data(args, build_template("role", load_tokenizer(args.model_name_or_path)))
    assert results[0] == results[1]
    assert results[0]["rows"] == [getattr(expected, name).to_list() for name in PARTS]
    assert results[0]["refused"].startswith("prepared_data shards: max_length differs (prepared with 200, now 150); ")


# What is refused.

CHANGES = {
    "eval_data": ({"eval_data": ["other.jsonl"], "held_out": 0.0}, "prepared from 0 sources, now 1"),
    "train_data_weights": ({"train_data_weights": [2.0]}, "prepared with [], now [2.0]"),
    "held_out": ({"held_out": 0.2}, "prepared with 6.0, now 0.2"),
    "skip_bad_rows": ({"skip_bad_rows": True}, "prepared with False, now True"),
    "max_train_rows": ({"max_train_rows": 9}, "prepared with 0, now 9"),
    "template": ({"template": "chat"}, "prepared with 'role', now 'chat'"),
    "system_prompt": ({"system_prompt": None}, "prepared with 'You are 冬瓜.', now None"),
    "train_on": ({"train_on": "last"}, "prepared with 'all', now 'last'"),
    "max_length": ({"max_length": 100}, "prepared with 200, now 100"),
    "overlong": ({"overlong": "truncate_turns"}, "prepared with 'drop', now 'truncate_turns'"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_that_differs_is_named(key, written, tokenizer):
    args = written
    changes, message = CHANGES[key]
    for name, value in changes.items():
        setattr(args, name, value)
    with pytest.raises(SFTError) as refused:
        map_shards(args, build_template(args.template, tokenizer))
    assert str(refused.value) == f"prepared_data shards: {key} differs ({message}); {REMEDY}"


def test_template_arguments_that_differ_are_named(written, tokenizer):
    built = [build_template("chat", build_tokenizer(), None, kwargs) for kwargs in (None, {"x": None})]
    written.template = "chat"
    write_shards(written, built[0], Path("chat"))
    assert find_shard_mismatch(written, built[0], Path("chat")) is None
    assert find_shard_mismatch(written, built[1], Path("chat")) == (
        f"chat_template_kwargs differs (prepared with {{}}, now {{'x': None}}); {REMEDY}"
    )


FORMAT_KEYS = {"format", "rows_format", "encoding_format", "tokenizer", "chat_template", "chat_template_kwargs"}


def test_all_that_decides_the_rows_is_compared(written, tokenizer):
    """Every key of ours does, or is named here as one that does not."""
    made_from = list_shard_inputs(written, build_template("role", tokenizer))
    others = {"model_name_or_path", "prepared_data", "packing", "tokens_per_batch", "pad_to_multiple_of", "num_proc"}
    others |= {"trainable_modules", "num_answers", "num_instructions", "eval_answer_share", "max_new_tokens"}
    others |= {"early_stopping_patience", "overwrite_output_dir", "push_evaluation", "trust_remote_code", "revision"}
    others |= {"share_prefixes", "dtype", "attn_implementation", "peft", "add_tokens"}
    others |= {"load_in_4bit", "load_in_8bit", "eval_tasks", "streaming"}
    names = {key.name for key in dataclasses.fields(SFTArguments)}
    ours = {name for name in names if name not in others and not name.startswith("lora")}
    assert ours | FORMAT_KEYS == set(made_from)  # the text of `chat_template`, the arguments of the template
    assert set(CHANGES) | {"train_data", *FORMAT_KEYS} == set(made_from)


def test_rows_that_have_changed(written, tokenizer):
    args = written
    template = build_template("role", tokenizer)
    Path("rows.jsonl").touch()
    assert find_shard_mismatch(args, template, Path("shards")) is None
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace("Say 3", "Say 4", 1))
    message = f"train_data differs (the content of rows.jsonl differs); {REMEDY}"
    assert find_shard_mismatch(args, template, Path("shards")) == message


def test_rows_that_are_elsewhere(written, tokenizer):
    """Under another name they are the same rows; where they are not here, on a cluster perhaps, the name has to do."""
    args = written
    template = build_template("role", tokenizer)
    Path("rows.jsonl").rename("moved.jsonl")
    assert find_shard_mismatch(args, template, Path("shards")) is None
    args.train_data = ["moved.jsonl"]
    assert find_shard_mismatch(args, template, Path("shards")) is None
    args.train_data = ["owner/rows"]
    assert find_shard_mismatch(args, template, Path("shards")) == (
        f"train_data differs (prepared from rows.jsonl, now owner/rows); {REMEDY}"
    )
    args.train_data = ["moved.jsonl", "moved.jsonl"]
    assert find_shard_mismatch(args, template, Path("shards")).startswith(
        "train_data differs (prepared from 1 sources, now 2)"
    )


def test_a_folder_of_rows_is_known_by_its_files(config, tokenizer):
    Path("folder").mkdir()
    shutil.copy("rows.jsonl", "folder/a.jsonl")
    args = parse_config(str(config), ["--train_data", "folder"])
    template = build_template("role", tokenizer)
    write_shards(args, template, Path("shards"))
    Path("folder/notes.txt").write_text("not read")
    assert find_shard_mismatch(args, template, Path("shards")) is None
    shutil.copy("rows.jsonl", "folder/b.jsonl")
    assert find_shard_mismatch(args, template, Path("shards")).startswith(
        "train_data differs (the content of folder differs)"
    )
    shutil.rmtree("folder")
    Path("folder").mkdir()
    assert find_shard_mismatch(args, template, Path("shards")).startswith("folder: no data file in this folder")


def test_another_tokenizer(written):
    own = build_tokenizer()
    own.backend_tokenizer.enable_truncation(7)  # which encoding turns off
    own.backend_tokenizer.enable_padding()
    assert find_shard_mismatch(written, build_template("role", own), Path("shards")) is None
    own.backend_tokenizer.normalizer = normalizers.Lowercase()
    message = find_shard_mismatch(written, build_template("role", own), Path("shards"))
    assert message.startswith("tokenizer differs (prepared with '") and message.endswith(REMEDY)


def test_another_chat_template(config, make_tokenizer):
    args = parse_config(str(config), ["--template", "chat"])
    write_shards(args, build_template("chat", make_tokenizer()), Path("shards"))
    other = build_template("chat", make_tokenizer(CHATML.replace("<|im_end|>\n", "<|im_end|>")))
    assert find_shard_mismatch(args, other, Path("shards")).startswith("chat_template differs (prepared with '")


@pytest.mark.parametrize(
    ("name", "key"),
    [("SHARDS_FORMAT", "format"), ("ROWS_FORMAT", "rows_format"), ("ENCODING_FORMAT", "encoding_format")],
)
def test_another_format(name, key, written, tokenizer, monkeypatch):
    number = getattr(shards, name)
    monkeypatch.setattr(shards, name, number + 1)
    message = find_shard_mismatch(written, build_template("role", tokenizer), Path("shards"))
    assert message.startswith(f"{key} differs (prepared with {number}, now {number + 1})")


@pytest.mark.parametrize("part", [*PARTS, RECORD_FILE])
def test_damaged_shards(part, written, tokenizer):
    template = build_template("role", tokenizer)
    name = part if part == RECORD_FILE else f"{part}/data-00000-of-00001.arrow"
    file = Path("shards") / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    message = f"damaged ({name} differs from SHA256SUMS); run `prepare` again"
    assert find_shard_mismatch(written, template, Path("shards")) == message
    # Which puts it in order.
    write_shards(written, template, Path("shards"))
    assert file.read_bytes() == whole
    if part != RECORD_FILE:
        file.unlink()
        message = f"damaged ({name} is missing); run `prepare` again"
        assert find_shard_mismatch(written, template, Path("shards")) == message


def test_folders_that_are_none(written, tokenizer):
    template = build_template("role", tokenizer)
    assert find_shard_mismatch(written, template, Path("nowhere")) == "no such folder; run `prepare`"
    assert find_shard_mismatch(written, template, Path(".")) == "has no prepared rows; run `prepare`"
    (Path("shards") / "SHA256SUMS").unlink()
    assert find_shard_mismatch(written, template, Path("shards")).startswith("damaged (SHA256SUMS is missing or empty)")


def test_a_machine_without_the_folder(written, tokenizer, monkeypatch):
    """The first process, on another one, has found nothing wrong."""
    monkeypatch.setattr(shards, "run_on_main_process", lambda training, look: None)
    written.prepared_data = "elsewhere"
    with pytest.raises(SFTError, match="^prepared_data elsewhere: missing on this machine; copy it to all machines"):
        map_shards(written, build_template("role", tokenizer))


# Written whole or not at all.


def test_shards_of_the_same_config_are_kept_and_others_replaced(written, tokenizer, caplog, monkeypatch):
    args = written
    template = build_template("role", tokenizer)
    previous = contents(Path("shards"))
    with caplog.at_level("INFO", logger="sft_pipeline"), pytest.MonkeyPatch.context() as patch:
        no_encoding(patch)
        write_shards(args, template, Path("shards"))
    assert "shards: up to date, nothing to prepare" in caplog.text
    assert contents(Path("shards")) == previous
    args.max_length = 100
    write_shards(args, template, Path("shards"))
    assert same_rows(map_shards(args, template), prepare_data(args, template))
    assert sorted(path.name for path in Path().iterdir() if path.is_dir()) == ["cache", "shards"]


def test_other_files_are_left_alone(config, tokenizer):
    args = parse_config(str(config), [])
    for folder in (Path("rows.jsonl"), Path("thesis")):
        if folder.suffix == "":
            folder.mkdir()
            (folder / "chapter.tex").write_text("years of work")
        with pytest.raises(SFTError, match=f"^prepared_data {folder}: has files that `prepare` did not write; choose"):
            write_shards(args, build_template("role", tokenizer), folder)
    assert contents(Path("thesis")) == {"chapter.tex": b"years of work"}
    Path("empty").mkdir()
    write_shards(args, build_template("role", tokenizer), Path("empty"))
    assert (Path("empty") / RECORD_FILE).is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_writing_that_is_broken_off_costs_nothing(error, written, tokenizer, monkeypatch):
    args = written
    previous = contents(Path("shards"))

    def broken_off(folder):
        assert (folder / "train" / "state.json").is_file()
        raise error

    monkeypatch.setattr(shards, "write_checksums", broken_off)
    args.max_length = 100
    disk = isinstance(error, OSError)
    reason = r"\(\[Errno 28\] No space left on device\)"
    message = rf"^prepared_data (shards|new): cannot be written {reason}; check permissions and disk space$"
    for folder in (Path("shards"), Path("new")):
        with pytest.raises(SFTError if disk else KeyboardInterrupt, match=message if disk else None):
            write_shards(args, build_template("role", tokenizer), folder)
    assert contents(Path("shards")) == previous
    assert sorted(path.name for path in Path().iterdir() if path.is_dir()) == ["cache", "shards"]


def test_training_refuses_before_a_folder_is_made(config, tokenizer):
    with pytest.raises(SFTError, match="^prepared_data shards: no such folder; run `prepare`$"):
        train(parse_config(str(config), ["--output_dir", "out"]), Console(quiet=True))
    assert not Path("out").exists()


# The format.

CONVERSATIONS = [
    [{"role": "user", "content": "the question"}, {"role": "assistant", "content": "the answer <|im_end|> is"}],
    [
        *[{"role": "system", "content": "system text"}, {"role": "user", "content": "what is 冬瓜"}],
        *[{"role": "assistant", "content": "answer in the text"}, {"role": "user", "content": "and  then?\n"}],
        {"role": "assistant", "content": "the answer to the question is in the text"},
    ],
    [{"role": "user", "content": "is " * 40}, {"role": "assistant", "content": "answer " * 30}],
]


def test_the_rows_of_this_format(tmp_path, tokenizer, cache):
    """If this fails on purpose, raise SHARDS_FORMAT and update the hash, so that older shards are refused."""
    file = tmp_path / "rows.json"
    named = [
        {"messages": [*rows, *rows[-2:]][: len(rows) + 2 * (index % 2)]} for index, rows in enumerate(CONVERSATIONS * 8)
    ]
    for index, row in enumerate(named):
        row["messages"][-1] = {"role": "assistant", "content": f"{row['messages'][-1]['content']} {index}"}
    file.write_text(json.dumps(named))
    results = []
    for template in ("role", "chat"):
        for keys in (
            {"overlong": "drop"},
            {"overlong": "truncate_answer"},
            {"overlong": "truncate_turns", "train_on": "last"},
        ):
            args = SFTArguments(
                "m",
                [str(file)],
                template=template,
                system_prompt="You.",
                max_length=60,
                held_out=5.0,
                max_train_rows=9,
                **keys,
            )
            data = prepare_data(args, build_template(template, tokenizer))
            results.append([getattr(data, name).to_list() for name in ("train", "held_out")])
    assert (shards.SHARDS_FORMAT, hash_texts(json.dumps(results))[:16]) == (5, "764b48d8d2005625")
