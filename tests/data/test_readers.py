"""JSON lists are read piece by piece: the same rows, the same errors in the same places, and never the whole text."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sft_pipeline.data import readers
from sft_pipeline.data.readers import read_rows
from sft_pipeline.utils.errors import SFTError

MIN_CHUNK = 16  # characters: what a word, the end of a number or an escape may have
QUICK = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
SPACES = st.text(" \n\t", max_size=20)


def read(path: Path, chunk: int) -> list | str:
    """The rows, or the error that says why there are none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK", chunk)
        try:
            return list(read_rows(path, "a.json"))
        except SFTError as error:
            return str(error)


@QUICK
@given(values=st.lists(VALUES, max_size=8), space=SPACES, ascii=st.booleans(), chunk=st.integers(MIN_CHUNK, 60))
def test_the_rows_are_those_of_json(values, space, ascii, chunk, tmp_path):
    path = tmp_path / "a.json"
    parts = [json.dumps(value, ensure_ascii=ascii, indent=len(space) % 3 or None) for value in values]
    path.write_bytes((space + "[" + f"{space},{space}".join(parts) + space + "]" + space).encode())
    rows = read(path, chunk)
    assert rows == [(f"a.json row {index}", value) for index, value in enumerate(json.loads(path.read_bytes()))]


@QUICK
@given(values=st.lists(VALUES, max_size=5), data=st.data(), chunk=st.integers(MIN_CHUNK, 60))
def test_errors_are_those_of_the_whole_text(values, data, chunk, tmp_path):
    """Wherever the text is cut, or something is put into it or taken out."""
    text = "[" + ",\n ".join(json.dumps(value, indent=1) for value in values) + "]"
    index = data.draw(st.integers(0, len(text)))
    broken = (
        text[:index] + data.draw(st.sampled_from(["", "x", '"', "]", ",", "\n", "1", "\\", "\t"])) + text[index + 1 :]
    )
    broken = data.draw(st.sampled_from([broken, broken[:index]]))
    path = tmp_path / "a.json"
    path.write_text(broken)
    assert read(path, chunk) == read(path, 1 << 20)


@QUICK
@given(text=st.text("ab\n冬", max_size=300), chunk=st.integers(MIN_CHUNK, 60))
@example(text="a" * 59 + "冬", chunk=60)
def test_bytes_that_are_not_utf8_are_found_where_they_stand(text, chunk, tmp_path):
    path = tmp_path / "a.json"
    start = ("[" + json.dumps(text, ensure_ascii=False)).encode()
    for broken in (b"\xff]", "冬".encode()[:2]):
        path.write_bytes(start + broken)
        assert read(path, chunk) == f"a.json: not UTF-8 at byte {len(start)}; {readers.SAVE_AS_UTF8}"


def test_a_large_list_is_never_held(tmp_path, monkeypatch):
    """Nor is it read to its end for an error at its start."""
    monkeypatch.setattr(readers, "CHUNK", 1000)
    path = tmp_path / "a.json"
    path.write_text("[" + ",".join(json.dumps({"text": "x" * 90, "at": index}) for index in range(5000)) + "]")
    sizes = []
    read_chunk = readers._JSONStream._read_chunk

    def watched(stream):
        more = read_chunk(stream)
        sizes.append(len(stream.text))
        return more

    monkeypatch.setattr(readers._JSONStream, "_read_chunk", watched)
    assert [row["at"] for _, row in read_rows(path, "a.json")] == list(range(5000))
    assert max(sizes) < 2500 and len(sizes) > 400
    sizes.clear()
    path.write_text(path.read_text().replace('"at": 30}', '"at" 30}', 1))
    with pytest.raises(SFTError, match="^a.json: invalid JSON: Expecting ':' delimiter at line 1 column 3"):
        list(read_rows(path, "a.json"))
    assert len(sizes) < 10
