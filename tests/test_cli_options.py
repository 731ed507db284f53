"""The parser of the command line: its errors, and the texts of --help."""

import dataclasses
import re

import pytest
from support.command_line import python, refusal

from sft_pipeline import cli
from sft_pipeline.arguments import SFTArguments
from sft_pipeline.cli import main
from sft_pipeline.cli_options import build_parser
from sft_pipeline.config import SFTConfig
from sft_pipeline.key_help import GROUPS


@pytest.mark.parametrize(
    ("arguments", "expected", "help"),
    [
        ([], "the following arguments are required: COMMAND", "--help"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'", "--help"),
        (["generate", "a.txt"], "the following arguments are required: --model, --output", "generate --help"),
        (["preview", "--row", "x"], "argument --row: invalid int value: 'x'", "preview --help"),
    ],
)
def test_an_error_of_the_parser_is_one_line_without_the_usage(arguments, expected, help, capsys):
    message = refusal(capsys, *arguments)
    assert message.startswith(expected) and message.endswith(f"; see `{help}`")


def test_every_command_has_its_function():
    [subparsers] = build_parser()._subparsers._group_actions
    assert list(subparsers.choices) == list(cli.COMMANDS)


@pytest.mark.parametrize("command", ["--help", *(f"{command} --help" for command in cli.COMMANDS), "train --help all"])
def test_help_fits_a_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(command.split())
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_help_imports_nothing_heavy():
    code = "import sys; from sft_pipeline.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy'"
    for command in ([], ["preview"], ["chat"], ["generate"]):
        run = python("-c", code, *command, "--help")
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith("usage: sft-pipeline")


def test_help_lists_exit_statuses(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    assert all(f"\n  {status} " in output for status in (0, 1, 2, 75, 130)) and "--json" in output


def read_listed_keys(capsys, *arguments):
    """Return the keys that `train --help` lists with their types and defaults, as {key: "type (default: value)"}."""
    with pytest.raises(SystemExit):
        main(["train", *arguments])
    text = " ".join(capsys.readouterr().out.split())
    return dict(re.findall(r"(?<= )(\w+): ([\w, ]+ \(default: [^)]*\))", text))


def test_help_lists_the_keys_that_people_set_of_both_kinds(capsys):
    listed = read_listed_keys(capsys, "--help")
    assert {field.name for field in dataclasses.fields(SFTArguments)} <= set(listed)
    assert listed["learning_rate"] == "float (default: 5e-05)"
    assert listed["packing"] == "bool (default: true)"
    assert listed["train_on"] == "all, last (default: all)"
    assert listed["eval_strategy"] == "str (default: epoch)"  # ours, not the library's
    assert listed["train_data"] == "list of str (default: none)"
    assert "debug" not in listed


def test_help_all_lists_every_key(capsys):
    assert set(read_listed_keys(capsys, "--help", "all")) == {key.name for key in dataclasses.fields(SFTConfig)}


def test_groups_name_each_key_once_and_no_unknown_one():
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))
    assert set(names) <= {key.name for key in dataclasses.fields(SFTConfig)}
