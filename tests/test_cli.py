"""The command line: bad input is one line on standard error and exit status 2, and changes no file."""

import io
import json
import logging
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from support.command_line import python, refusal

from sft_pipeline import cli
from sft_pipeline.cli import main
from sft_pipeline.data.chat_templates import build_template

GOOD = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(8)]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """main() quietens the libraries for the whole process."""
    level = logging.getLogger("sft_pipeline").level
    yield
    logging.getLogger("sft_pipeline").setLevel(level)
    datasets.enable_progress_bars()


@pytest.fixture
def make_config(model_folder, tmp_path, monkeypatch):
    """make_config(rows, **keys) writes rows.jsonl and config.yaml, and makes their folder the current one."""
    monkeypatch.chdir(tmp_path)

    def make(rows: list | str = GOOD, **keys) -> str:
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        Path("rows.jsonl").write_text(text)
        defaults = {
            "model_name_or_path": str(model_folder),
            "train_data": "rows.jsonl",
            "output_dir": "out",
            "max_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        Path("config.yaml").write_text(yaml.safe_dump({**defaults, **keys}))
        return "config.yaml"

    return make


BAD_ROWS = {
    "does not parse": (json.dumps(GOOD[0]) + '\n\n{"instruction": "a", \n', "rows.jsonl line 3: invalid JSON"),
    "no answer": ([*GOOD, {"instruction": "Hi", "input": "", "output": ""}], "rows.jsonl line 9: no answer"),
    "unknown role": (
        [{"messages": [{"role": "robot", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}],
        "rows.jsonl line 1: messages[0]: unknown role 'robot'; use one of: system, developer, user",
    ),
    "mixed columns": ([*GOOD, {"prompt": "Hi", "completion": "Yes"}], "rows.jsonl line 9: missing 'instruction'"),
    "unknown columns": ([{"question": "Hi"}], "rows.jsonl: its columns (question) match no row format; rename"),
    "empty": ("", "rows.jsonl: no rows"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case, make_config, capsys):
    rows, message = BAD_ROWS[case]
    assert refusal(capsys, "train", make_config(rows)).startswith(message)
    assert not Path("out").exists()


BAD_KEYS = {
    "missing data file": ({"train_data": "nowhere.jsonl"}, "nowhere.jsonl: no such file or folder"),
    "all rows masked": ({"max_length": 5}, "no row is left to train on: 8 rows, 0 kept"),
    "unknown key": ({"learning_rat": 1.0}, "config.yaml: unknown key learning_rat; did you mean "),
    "missing model": ({"model_name_or_path": "./nowhere"}, "./nowhere: no such model folder"),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_bad_keys_are_named(case, make_config, capsys):
    keys, message = BAD_KEYS[case]
    assert refusal(capsys, "train", make_config(**keys)).startswith(message)
    assert not Path("out").exists()


def test_a_learning_rate_in_quotes(make_config, capsys):
    config = make_config()
    plain = Path(config).read_text()
    Path(config).write_text(f'{plain}learning_rate: "1e-5"\n')
    message = "learning_rate is the text '1e-5' where a number is needed; write it without quotes"
    assert refusal(capsys, "train", config) == f"config.yaml: {message}"
    assert not Path("out").exists()
    Path(config).write_text(f"{plain}learning_rate: 1e-5\n")
    main(["train", config])
    assert json.loads(Path("out/results.json").read_text())["config"]["learning_rate"] == 1e-5


def test_folders_of_mixed_shapes(make_config, capsys, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_text(json.dumps(GOOD[0]))
    (tmp_path / "folder" / "b.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": "Yes"}))
    message = refusal(capsys, "train", make_config(train_data="folder"))
    assert message.startswith("folder: mixed row formats: a.jsonl is alpaca, b.jsonl is prompt-completion")


def test_a_template_without_a_stop_token(make_config, make_tokenizer, model_folder, capsys, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    make_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}").save_pretrained(folder)
    message = refusal(capsys, "train", make_config(model_name_or_path=str(folder)))
    assert message.startswith("the chat template writes no stop token after an answer")


def test_a_model_folder_without_weights_previews_but_does_not_train(make_config, model_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    config = make_config(model_name_or_path=str(folder))
    assert refusal(capsys, "train", config).startswith(f"{folder}: a model folder without weights")
    assert not Path("out").exists()
    main(["preview", config, "--row", "3", "--json"])
    assert json.loads(capsys.readouterr().out)["input_ids"]


def test_a_folder_that_holds_a_run_is_refused_and_replaced_when_asked(make_config, capsys):
    config = make_config()
    main(["train", config])
    results = Path("out/results.json").read_text()
    message = refusal(capsys, "train", config)
    assert message.startswith("output_dir out: already holds a run; add --overwrite_output_dir")
    assert Path("out/results.json").read_text() == results
    main(["train", config, "--overwrite_output_dir", "--seed", "3"])
    assert json.loads(Path("out/results.json").read_text())["seed"] == 3
    assert "saved in out; talk to it: ./launch.sh chat out" in capsys.readouterr().out


def test_every_key_can_be_given_without_a_config(make_config, model_folder):
    make_config()
    keys = ["--model_name_or_path", str(model_folder), "--train_data", "rows.jsonl", "--max_steps", "1"]
    main(["train", *keys, "--output_dir", "other", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no"])
    assert json.loads(Path("other/results.json").read_text())["steps"] == 1


def test_the_command_line_wins(make_config):
    main(["train", make_config(seed=1), "--seed", "5"])
    assert json.loads(Path("out/results.json").read_text())["seed"] == 5


def test_a_missing_config(capsys):
    message = refusal(capsys, "train", "nowhere.yaml")
    assert message == "nowhere.yaml: no such file; give a YAML config file, such as one of those in configs/"
    assert refusal(capsys, "preview").startswith("missing: model_name_or_path, train_data; add it to the config file")


def test_a_config_that_is_not_the_first_argument_is_no_config(make_config, capsys):
    """Nor is the value of the first key."""
    assert refusal(capsys, "train", "--seed", "5", make_config()) == (
        "the command line: config.yaml belongs to no key; a config file comes first"
    )


# Preview.


def test_preview_as_json_is_one_line_of_what_is_trained(make_config, tokenizer, capsys):
    main(["preview", make_config(template="role", system_prompt="You are 冬瓜."), "--row", "3", "--json"])
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    row = json.loads(output)
    assert row.keys() == {"input_ids", "labels", "text", "sequences"}
    assert row["sequences"] == [{key: row[key] for key in ("input_ids", "labels", "text")}]
    text = "<|im_start|>\n#SYSTEM:You are 冬瓜.\n#USER:Say 3.\n#ASSISTANT:It is 3.<|im_end|>"
    assert row["text"] == text == tokenizer.decode(row["input_ids"])
    prompt = build_template("role", tokenizer).encode_prompt(
        {"messages": [{"role": "system", "content": "You are 冬瓜."}, {"role": "user", "content": "Say 3."}]}
    )
    size = len(prompt)
    assert row["input_ids"][:size] == prompt
    assert row["labels"] == [-100] * (size - 1) + row["input_ids"][size:] + [-100]


def test_preview_shows_each_position(make_config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["preview", make_config(), "--row", "2"])
    output = capsys.readouterr().out
    assert "rows.jsonl line 3" in output and "It is 2." in output
    assert "(the stop token)" in output
    header, *lines = output[output.index("position") :].splitlines()
    assert header.split() == ["position", "id", "token", "target", "trained"]
    assert {line.split()[-1] for line in lines} == {"yes", "no"}


@pytest.mark.parametrize("row", ["8", "-1"])
def test_preview_of_a_row_that_is_not_there(row, make_config, capsys):
    assert (
        refusal(capsys, "preview", make_config(), f"--row={row}")
        == f"row {row}: out of range; train_data has rows 0 to 7"
    )


def test_preview_of_a_row_that_is_dropped(make_config, capsys):
    message = refusal(capsys, "preview", make_config(max_length=5), "--row", "2")
    remedy = "raise max_length or change overlong"
    assert message == f"rows.jsonl line 3: dropped (longer than max_length); {remedy}"


# Chat and the rest.


def test_chat_answers_a_pipe(model_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    main(["chat", str(model_folder), "--max_new_tokens", "3"])
    assert capsys.readouterr().out.strip()


def test_chat_takes_no_other_option(model_folder, capsys):
    message = refusal(capsys, "chat", str(model_folder), "--temperature", "1")
    assert message == "chat: unknown option --temperature; `chat --help` lists them"


def test_doctor_takes_no_other_option(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--yaml"])
    assert capsys.readouterr().err == "sft-pipeline: doctor: unknown option --yaml; `doctor --help` lists them\n"


def test_an_interrupted_run_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(args, extra_args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", interrupted)
    with pytest.raises(SystemExit) as exit:
        main(["train"])
    assert exit.value.code == 130
    assert capsys.readouterr().err == "sft-pipeline: interrupted; everything saved so far is intact\n"


def test_an_error_of_the_program_is_one_line(make_config):
    config = make_config([GOOD[0], {"instruction": "Hi", "output": ""}])
    ended = python("-m", "sft_pipeline", "train", config)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("sft-pipeline: rows.jsonl line 2: no answer") and ended.stderr.count("\n") == 1
