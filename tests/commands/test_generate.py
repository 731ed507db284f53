"""The command `generate`: what it writes, that it continues to the same file after any interruption, its errors."""

import itertools
import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.agent import (
    CALL,
    OSLO,
    PLAIN,
    REPLY,
    TOOLS,
    assistant,
    save_agent,
    script_answers,
    write_call,
    write_rows,
)
from support.answer_files import DRAWN, LINES, are_same, errors_of, partial_of, rows_of
from support.processes import Command
from transformers import AutoTokenizer

from sft_pipeline import cli
from sft_pipeline.commands import generate as generate_module
from sft_pipeline.commands.generate import GenerateOptions, compute_row_seed, generate_file
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.messages import split_answer
from sft_pipeline.data.prompts import Prompt
from sft_pipeline.data.sources import load_conversations
from sft_pipeline.inference.answers import Answer, answer_prompts
from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.model.loading import load_model
from sft_pipeline.runs.output_dir import TEMPLATE_FILE
from sft_pipeline.utils.errors import SFTError


def test_greedy_answers_are_those_of_the_evaluation(model_folder, tmp_path, tokenizer):
    (tmp_path / "prompts.txt").write_text("\n".join(LINES))
    output = tmp_path / "new" / "answers.jsonl"
    request = GenerateOptions(
        str(tmp_path / "prompts.txt"), str(model_folder), output, SamplingParams(max_new_tokens=8), batch_size=4
    )
    assert generate_file(request) == 0
    model, template = load_model(str(model_folder)), build_template("chat", tokenizer)
    conversations = [{"messages": [{"role": "user", "content": line}]} for line in LINES]
    expected = answer_prompts(model, template, conversations, 8, batch_size=1)
    rows = rows_of(output)
    assert [row["messages"] for row in rows] == [
        [*conversation["messages"], {"role": "assistant", "content": answer.text}]
        for conversation, answer in zip(conversations, expected)
    ]
    assert [row["tokens"] for row in rows] == [answer.tokens for answer in expected]
    assert [row["logprob"] for row in rows] == pytest.approx([answer.logprob for answer in expected], abs=1e-3)
    assert [row["origin"] for row in rows] == [f"prompts.txt line {n}" for n in range(1, 10)]
    assert [row["finish_reason"] for row in rows] == ["stop" if answer.stopped else "length" for answer in expected]
    assert not partial_of(output).exists() and not errors_of(output).exists()


def test_the_output_is_training_data_and_prompts(options, cache):
    assert generate_file(options) == 2
    rows = rows_of(options.output)
    read = load_conversations(str(options.output))
    assert read == [{"messages": row["messages"]} for row in rows] and len(read) == 16
    again = replace(options, prompts=str(options.output), output=options.output.with_name("again.jsonl"), samples=1)
    assert generate_file(again) == 0
    assert [row["reference"] for row in rows_of(again.output)] == [row["messages"][-1] for row in rows]
    assert [row["messages"][:-1] for row in rows_of(again.output)] == [row["messages"][:-1] for row in rows]


def test_answers_with_tools_are_training_data(model_folder, tokenizer, tmp_path, monkeypatch):
    """Tools, template arguments, calls and reasoning are carried over; a call is no empty answer."""
    folder = save_agent(model_folder, tmp_path / "agent")
    kwargs = {"enable_thinking": True}
    rows = [CALL, REPLY | {"chat_template_kwargs": kwargs}, PLAIN, PLAIN]
    call = write_call("get_weather", '{"city": "Oslo"}')
    texts = [f"<think>\nHm.\n</think>\n\n{call}", "4 degrees.", "<think>\nHm.\n</think>", ""]
    prompts = script_answers(monkeypatch, tokenizer, *texts)
    output = tmp_path / "answers.jsonl"
    request = GenerateOptions(write_rows(tmp_path / "rows.jsonl", rows), str(folder), output, SamplingParams())
    assert generate_file(request) == 2
    called, replied = rows_of(output)
    messages, called_message = CALL["messages"][:-1], assistant("", OSLO, reasoning="Hm.")
    assert (called["messages"], called["tools"], called["reference"]) == (
        [*messages, called_message],
        TOOLS,
        CALL["messages"][-1],
    )
    assert replied["messages"] == [*REPLY["messages"][:-1], assistant("4 degrees.")]
    assert (replied["tools"], replied["chat_template_kwargs"]) == (
        TOOLS,
        kwargs,
    ) and "chat_template_kwargs" not in called
    template = build_template("chat", AutoTokenizer.from_pretrained(folder))
    assert prompts[:2] == [template.encode_prompt(split_answer(row)[0]) for row in rows[:2]]
    errors = [row["error"] for row in rows_of(errors_of(output))]
    assert errors == [
        f"the answer is empty: the model {what}" for what in ("wrote its reasoning alone", "stopped at once")
    ]
    # They are read as they were written, and their answers trained.
    conversations = load_conversations(str(output))
    assert conversations[0] == CALL | {"messages": [*messages, called_message]}
    for [sequence], text in zip(template.render(conversations, "last"), texts):
        ids = [token for span in sequence.spans if span.supervised for token in span.ids]
        assert tokenizer.decode(ids) == f"{text}<|im_end|>"


def test_a_template_without_tools_names_the_prompts(model_folder, tmp_path):
    output = tmp_path / "answers.jsonl"
    data = write_rows(tmp_path / "rows.jsonl", [PLAIN, CALL, {"messages": REPLY["messages"]}, PLAIN])
    sampling = SamplingParams(max_new_tokens=2)
    assert generate_file(GenerateOptions(data, str(model_folder), output, sampling)) == 2
    errors = {row["origin"]: row["error"] for row in rows_of(errors_of(output))}
    assert errors["rows.jsonl line 2"].startswith("the chat template does not write tools; remove it from the row, or ")
    assert errors["rows.jsonl line 3"].startswith("messages[2]: the chat template does not write its tool calls; ")


def test_changed_tools_are_detected(options, model_folder, tmp_path, tokenizer, monkeypatch):
    folder = str(save_agent(model_folder, tmp_path / "agent"))
    request = replace(options, prompts=write_rows(tmp_path / "rows.jsonl", [CALL]), model=folder, samples=1)
    script_answers(monkeypatch, tokenizer)  # none, so that the call ends after its settings are written
    with pytest.raises(StopIteration):
        generate_file(request)
    for change in ({"tools": TOOLS[:1]}, {"chat_template_kwargs": {"enable_thinking": False}}):
        write_rows(tmp_path / "rows.jsonl", [CALL | change])
        with pytest.raises(SFTError, match=r"was started with different settings \(prompts\);"):
            generate_file(request)


def test_samples_differ_and_keep_their_seeds(options, tokenizer):
    generate_file(options)
    rows, model, template = rows_of(options.output), load_model(options.model), build_template("chat", tokenizer)
    assert [(row["origin"], row["sample"]) for row in rows[:3]] == [
        ("prompts.jsonl line 1", 0), ("prompts.jsonl line 1", 1), ("prompts.jsonl line 2", 0),
    ]  # fmt: skip
    assert len({row["messages"][-1]["content"] for row in rows}) == 16
    for index, sample in ((0, 1), (5, 0)):
        ids = template.encode_prompt({"messages": [{"role": "user", "content": LINES[index]}]})
        [alone] = generate(model, [ids], [template.stop_token_id], DRAWN, seeds=[compute_row_seed(3, (index, sample))])
        assert rows[2 * index + sample]["messages"][-1] == template.parse(alone.ids)
    more = replace(options, samples=3, batch_size=5, output=options.output.with_name("three.jsonl"))
    generate_file(more)
    assert are_same([row for row in rows_of(more.output) if row["sample"] < 2], rows)


def test_seeds_are_distinct():
    numbers = itertools.product(range(3), range(50), range(20))
    assert len({compute_row_seed(seed, (index, sample)) for seed, index, sample in numbers}) == 3000
    assert compute_row_seed(0, (1, 23)) != compute_row_seed(0, (12, 3))


def test_stop_strings_end_an_answer(options):
    generate_file(options)
    text = rows_of(options.output)[0]["messages"][-1]["content"]
    stopped = replace(options, stop_strings=(text[2:4],), output=options.output.with_name("stopped.jsonl"))
    generate_file(stopped)
    row = rows_of(stopped.output)[0]
    assert row["messages"][-1]["content"] == text.partition(text[2:4])[0].strip() and row["finish_reason"] == "stop"


def test_the_system_prompt_is_used_and_written(options, model_folder, tmp_path, tokenizer):
    """The one trained with, or the given one; a row's own comes first."""
    folder = tmp_path / "run"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).symlink_to(file)
    settings = {"template": "role", "chat_template_kwargs": {}, "system_prompt": "Be brief."}
    (folder / TEMPLATE_FILE).write_text(json.dumps(settings))
    row_with_system = {"messages": [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]}
    row_without = {"messages": row_with_system["messages"][1:]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row_with_system) + "\n" + json.dumps(row_without))
    request = replace(options, prompts=str(tmp_path / "own.jsonl"), model=str(folder), samples=1, overwrite=True)
    for given_, second in ((None, "Be brief."), ("Sing.", "Sing."), ("", None)):
        generate_file(replace(request, system_prompt=given_))
        first_messages, second_messages = (row["messages"] for row in rows_of(request.output))
        assert first_messages[0]["content"] == "Mine."
        assert [message["content"] for message in second_messages[:-1]] == ([second] if second else []) + ["Hi"]


def test_bad_prompts_have_their_errors_and_all_others_are_answered(model_folder, tmp_path, caplog):
    rows = [
        {"prompt": "Hi"},
        {"prompt": ""},
        {"prompt": "long " * 2000},
        {"prompt": 7},
        {"completion": "x"},
        {"prompt": "Hi"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "answers.jsonl"
    request = GenerateOptions(
        str(tmp_path / "prompts.jsonl"), str(model_folder), output, SamplingParams(max_new_tokens=4)
    )
    with caplog.at_level("INFO", "sft_pipeline"):
        assert generate_file(request) == 4
    assert [row["origin"] for row in rows_of(output)] == ["prompts.jsonl line 1", "prompts.jsonl line 6"]
    bad = {row["origin"]: row for row in rows_of(errors_of(output))}
    assert all(row["finish_reason"] == "error" and "messages" not in row for row in bad.values())
    errors = [bad[f"prompts.jsonl line {n}"]["error"] for n in (2, 3, 4, 5)]
    assert errors[0] == "the content of messages[0] (user) is empty"
    assert "prompt tokens and 4 new tokens exceed the limit of 4096: shorten the prompt" in errors[1]
    assert errors[2] == "'prompt' and 'completion' must both be strings or both be lists of messages"
    assert errors[3] == "missing 'prompt', which prompt-completion rows require; the row has completion"
    assert caplog.messages[-1] == (
        f"{output}: 2 answers, 2 of them cut off by max_new_tokens; 4 prompts got none, see {output}.errors"
    )
    with pytest.raises(SFTError, match="unsupported file type"):
        load_conversations(str(errors_of(output)))
    generate_file(replace(request, max_length=40, overwrite=True))
    assert len(rows_of(errors_of(output))) == 4
    assert "exceed the limit of 40: shorten the prompt" in rows_of(errors_of(output))[1]["error"]


def test_an_empty_answer_and_a_template_that_rejects_a_prompt_are_errors(options, monkeypatch, tokenizer):
    empty = generate_module._build_record(Prompt("a line 1", {"messages": []}), 0, Answer("", True, 0))
    assert empty["error"] == "the answer is empty: the model stopped at once" and "messages" not in empty
    template = build_template("chat", tokenizer)
    refused = SFTError("the chat template refuses it: no system role")
    monkeypatch.setattr(template, "encode_prompt", lambda messages: (_ for _ in ()).throw(refused))
    prompt = Prompt("a line 1", {"messages": [{"role": "user", "content": "Hi"}]})
    encoded = generate_module._encode_prompt(prompt, template, "Sing.")
    assert encoded.prompt.problem == "the chat template refuses it: no system role" and encoded.ids == []


# Cut off and begun again.


def test_only_missing_answers_are_generated(options, whole, monkeypatch, caplog):
    lines = whole.partial.splitlines(keepends=True)
    partial_of(options.output).write_bytes(b"".join(lines[:6]) + lines[6][:-9])
    seen = []
    complete = generate_module.generate_answers
    monkeypatch.setattr(
        generate_module, "generate_answers", lambda *args, **kwargs: seen.extend(args[2]) or complete(*args, **kwargs)
    )
    with caplog.at_level("INFO", "sft_pipeline"):
        generate_file(replace(options, overwrite=True))
    assert f"{partial_of(options.output)}: continuing after 5 of 18 answers" in caplog.messages
    assert len(seen) == 13 and are_same(rows_of(options.output), whole.output)


def test_a_killed_process_is_continued(options, model_folder, tmp_path):
    (tmp_path / "many.txt").write_text("\n".join(LINES * 12))
    arguments = ["generate", str(tmp_path / "many.txt"), "--model", str(model_folder), "--output", "many.jsonl"]
    arguments += ["--max_new_tokens", "24", "--temperature", "1.5", "--seed", "3", "--batch_size", "4"]
    process = Command(arguments, tmp_path, tmp_path)
    partial, deadline = tmp_path / "many.jsonl.partial", time.monotonic() + 120
    while (not partial.exists() or partial.read_bytes().count(b"\n") < 20) and time.monotonic() < deadline:
        assert process.is_running()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists() and not (tmp_path / "many.jsonl").exists()
    sampling = SamplingParams(max_new_tokens=24, do_sample=True, temperature=1.5, seed=3)
    request = GenerateOptions(
        str(tmp_path / "many.txt"), str(model_folder), tmp_path / "many.jsonl", sampling, batch_size=7
    )
    answer_count = partial.read_bytes().count(b"\n") - 1
    assert 19 <= answer_count < 108
    generate_file(request)
    generate_file(replace(request, output=tmp_path / "whole.jsonl"))
    assert are_same(rows_of(tmp_path / "many.jsonl"), rows_of(tmp_path / "whole.jsonl"))
    assert len(rows_of(tmp_path / "many.jsonl")) == 108


def test_a_changed_model_or_changed_prompts_are_detected(options, whole, monkeypatch):
    options.output.unlink()
    partial_of(options.output).write_bytes(whole.partial)
    _, *template_and_prompt = generate_module.load_trained(options.model)
    changed = load_model(options.model)
    changed.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "load_trained", lambda name, **options: (changed, *template_and_prompt))
        with pytest.raises(SFTError, match=r"was started with different settings \(model\);"):
            generate_file(options)
    Path(options.prompts).write_text(json.dumps({"prompt": "Hi"}))
    with pytest.raises(SFTError, match=r"was started with different settings \(prompts\);"):
        generate_file(options)


# The command line.


def test_the_command(options, monkeypatch, capsys):
    """Greedy unless an option of drawing is given; status 1 tells that a prompt got no answer."""
    seen = []
    monkeypatch.setattr(generate_module, "generate_file", lambda request: seen.append(request) or len(seen) - 1)
    command = ["generate", "a.txt", "--model", "m", "--output", "o.jsonl"]
    cli.main(command)
    assert seen[0] == GenerateOptions("a.txt", "m", Path("o.jsonl"), SamplingParams())
    options = "--samples 2 --top_k 5 --top_p 0.9 --min_p 0.1 --temperature 0.5 --repetition_penalty 1.1 --seed 3"
    options += " --max_new_tokens 9 --batch_size 4 --stop_strings a b --system_prompt Hi --max_length 99 --overwrite"
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, *options.split()])
    assert exit_.value.code == 1
    sampling = SamplingParams(9, True, 0.5, 5, 0.9, 0.1, 1.1, 3)
    assert seen[1] == GenerateOptions("a.txt", "m", Path("o.jsonl"), sampling, 2, 4, 99, ["a", "b"], "Hi", True)
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--beams", "2"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "sft-pipeline: generate: unknown option --beams; `generate --help` lists them\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples: 0 must be at least 1"),
        ({"max_length": 0}, "max_length: 0 must be at least 1"),
        ({"batch_size": 0}, "batch_size: 0 must be at least 1"),
        ({"stop_strings": ("",)}, "stop_strings: give a list of non-empty strings"),
        (
            {"sampling": SamplingParams()},
            "samples: 2 greedy answers would be the same; add --temperature 1 to sample",
        ),
        ({"output": Path("answers.txt")}, "output answers.txt: must end in .jsonl, as train_data requires"),
        ({"output": Path("folder")}, "output folder: is a folder; name a file in it"),
        ({"output": Path("file/a.jsonl")}, "output file/a.jsonl: cannot create its folder (File exists)"),
        (
            {"output": Path("old.jsonl")},
            "output old.jsonl: already exists; choose another name, or add --overwrite to replace it",
        ),
        (
            {"output": Path("prompts.jsonl"), "overwrite": True},
            "output prompts.jsonl: is the file of the prompts; choose another name",
        ),
        ({"prompts": "none.txt"}, "none.txt: cannot be read (No such file or directory); check the path"),
        ({"model": "./none"}, "./none: no such model folder; check the path, or give a hub name or smollm2-135m"),
    ],
)
def test_error_messages(options, change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("file", "old.jsonl"):
        (tmp_path / name).write_text("old")
    with pytest.raises(SFTError) as error:
        generate_file(replace(options, **change))
    assert str(error.value) == message
    assert (tmp_path / "old.jsonl").read_text() == "old"


def test_a_bar_counts_the_answers_and_their_tokens(options, whole, capsys):
    options.output.unlink(missing_ok=True)
    generate_file(options)
    output = capsys.readouterr().err
    assert "answers: 100%" in output and "18/18" in output and " tokens/s" in output
