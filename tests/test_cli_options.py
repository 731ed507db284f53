"""The parser of the command line: its errors, and the texts of --help."""

import pytest
from support.command_line import python, refusal

from sft_pipeline import cli
from sft_pipeline.cli import main
from sft_pipeline.cli_options import build_parser


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


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_fits_a_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_help_imports_nothing_heavy():
    code = "import sys; from sft_pipeline.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy'"
    for command in ([], ["train"], ["preview"], ["chat"], ["generate"]):
        run = python("-c", code, *command, "--help")
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith("usage: sft-pipeline")


def test_help_lists_exit_statuses(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    assert all(f"\n  {status} " in output for status in (0, 1, 2, 75, 130)) and "--json" in output
