"""The output file of `generate`: continued after an interruption at any byte, and its errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.answer_files import DRAWN, are_same, errors_of, partial_of, rows_of

from sft_pipeline.commands import resumable_jsonl
from sft_pipeline.commands.generate import generate_file
from sft_pipeline.commands.resumable_jsonl import AnswerFile
from sft_pipeline.utils.errors import SFTError


def test_errors_of_an_earlier_run_are_deleted(options):
    generate_file(options)
    assert len(rows_of(errors_of(options.output))) == 2
    Path(options.prompts).write_text(json.dumps({"prompt": "Hi"}))
    assert generate_file(replace(options, overwrite=True)) == 0
    assert not errors_of(options.output).exists() and len(rows_of(options.output)) == 2


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_partial_file_cut_at_any_byte_continues_to_the_same_output(options, whole, data):
    """Cut twice; with zeros behind the cut, as some file systems leave them after a loss of power."""
    request = replace(options, overwrite=True, batch_size=data.draw(st.integers(1, 6)))
    assert len(whole.output) == 16 and len(whole.errors) == 2
    cut = data.draw(st.integers(0, len(whole.partial)))
    header = whole.partial.find(b"\n") + 1
    zeros = bytes(data.draw(st.integers(0, 9))) if cut >= header else b""
    partial_of(request.output).write_bytes(whole.partial[:cut] + zeros)
    generate_file(request)
    assert are_same(rows_of(request.output), whole.output)
    assert are_same(rows_of(errors_of(request.output)), whole.errors)
    assert not partial_of(request.output).exists()


def test_an_error_while_writing_loses_nothing(options, whole, monkeypatch):
    options = replace(options, overwrite=True)
    add, calls = AnswerFile.add, []

    def interrupted(file, key, row):
        calls.append(key)
        if len(calls) == 7:
            raise KeyboardInterrupt
        add(file, key, row)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate_file(options)
    assert len(partial_of(options.output).read_bytes().splitlines()) == 7
    generate_file(options)
    assert are_same(rows_of(options.output), whole.output)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"samples": 3}, "samples"),
        ({"sampling": replace(DRAWN, temperature=1.0, seed=4)}, "temperature, seed"),
        ({"system_prompt": "Sing."}, "system_prompt, prompts"),
        ({"stop_strings": ("x",), "max_length": 50}, "max_length, stop_strings"),
    ],
)
def test_a_partial_file_with_different_settings_is_an_error(options, whole, change, names):
    begun = whole.partial[: len(whole.partial) // 2]
    options.output.unlink()
    partial_of(options.output).write_bytes(begun)
    with pytest.raises(SFTError) as error:
        generate_file(replace(options, **change))
    assert str(error.value) == (
        f"{partial_of(options.output)}: was started with different settings ({names}); use those again to "
        "continue, choose another output, or add --overwrite to start again"
    )
    assert partial_of(options.output).read_bytes() == begun
    generate_file(replace(options, **change, overwrite=True))
    assert options.output.exists() and not partial_of(options.output).exists()


@pytest.mark.parametrize("content", [b"mine\n", b"mine", b"[1]\n", b'{"generate": 1}\n', b'{"a": {}}\n'])
def test_a_file_that_is_no_partial_file_is_an_error(options, content):
    partial_of(options.output).write_bytes(content)
    with pytest.raises(SFTError, match="is not a partial file of generate; move it, or add --overwrite to replace it"):
        generate_file(options)
    assert partial_of(options.output).read_bytes() == content


def test_a_full_disk_is_one_error(options, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resumable_jsonl, "SYNC_SECONDS", 0.0)
    message = r"answers.jsonl: cannot be written \(No space left on device\); fix that and run again to continue"
    file = AnswerFile(options.output, {})
    monkeypatch.setattr(resumable_jsonl.os, "fsync", full)
    with pytest.raises(SFTError, match=message):
        file.add((0, 0), {})
    with pytest.raises(SFTError, match=message):
        file.write_output()
    file.close()
