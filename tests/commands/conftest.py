"""Fixtures of the command `generate`: its options, and a run that was not interrupted."""

import json
from types import SimpleNamespace

import pytest
from support.answer_files import DRAWN, LINES, errors_of, rows_of
from support.model_comparison import data, other_folder

from sft_pipeline.commands import generate as generate_module
from sft_pipeline.commands.generate import GenerateOptions, generate_file
from sft_pipeline.commands.resumable_jsonl import AnswerFile

__all__ = ["data", "other_folder"]


@pytest.fixture
def options(model_folder, tmp_path) -> GenerateOptions:
    """Nine prompts, the last of them bad, two drawn answers each."""
    rows = [{"prompt": line} for line in LINES[:-1]] + [{"prompt": " "}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return GenerateOptions(
        str(tmp_path / "prompts.jsonl"), str(model_folder), tmp_path / "answers.jsonl", DRAWN, samples=2, batch_size=4
    )


@pytest.fixture
def whole(options, monkeypatch) -> SimpleNamespace:
    """A run that was not cut off: its output and errors, and the partial file as it was just before the end."""
    loaded = generate_module.load_trained(options.model)
    monkeypatch.setattr(generate_module, "load_trained", lambda name, **options: loaded)
    content = {}
    write_output = AnswerFile.write_output

    def spy(file: AnswerFile) -> None:
        content["partial"] = file.partial.read_bytes()
        write_output(file)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "write_output", spy)
        generate_file(options)
    output, errors = rows_of(options.output), rows_of(errors_of(options.output))
    return SimpleNamespace(partial=content["partial"], output=output, errors=errors)
