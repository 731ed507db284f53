"""The examples of docs/api.md run, and so does the notebook."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import sft_pipeline

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def read_examples(file: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_api_run(model_folder, tmp_path, monkeypatch, capsys):
    """In their order and one namespace, on the tiny model."""
    monkeypatch.chdir(ROOT)
    code = "\n".join(read_examples(ROOT / "docs" / "api.md"))
    on_cpu = 'num_instructions=0, max_steps=2, max_new_tokens=4, use_cpu=True, disable_tqdm=True, report_to="none"'
    replacements = {
        '"smollm2-135m"': repr(str(model_folder)),
        "num_instructions=0)": on_cpu + ")",
        '"outputs/plain", max_steps=4': f'{str(tmp_path / "plain")!r}, max_steps=2, use_cpu=True, report_to="none"',
        "outputs/api": str(tmp_path / "out"),
        '["--max_train_rows", "100"]': f"{[*shorten(model_folder, tmp_path)]}",
        "conversations, num_answers=2, " + on_cpu: "conversations, num_answers=2, max_new_tokens=4",
    }
    for old, new in replacements.items():
        assert old in code
        code = code.replace(old, new)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert namespace["trainer"].data.train_stats.kept == 32 and namespace["plain"].state.global_step == 2
    assert namespace["results"]["rows"]["train"]["kept"] == 8 and len(namespace["ids"]) == 2
    assert (tmp_path / "plain" / "evaluation" / "step_000002.json").is_file()
    assert namespace["answer"].finish_reason in ("stop", "length") and namespace["completion"].logprobs
    assert "Count to" in capsys.readouterr().out


def shorten(model_folder: Path, tmp_path: Path) -> list[str]:
    """Return the options that make quickstart.yaml a run of a moment."""
    keys = {"model_name_or_path": model_folder, "output_dir": tmp_path / "quickstart", "held_out": 4}
    keys |= {"max_train_rows": 8, "max_steps": 1, "num_answers": 1, "num_instructions": 0, "max_new_tokens": 4}
    return [f"--{key}={value}" for key, value in keys.items()] + ["--use_cpu", "--disable_tqdm"]


def test_listed_names_are_the_public_ones():
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == sorted(sft_pipeline.__all__)
    assert (ROOT / "sft_pipeline" / "py.typed").is_file()


def read_cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_was_run_from_top_to_bottom():
    code = [cell for cell in read_cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    text = json.dumps(outputs)
    assert "answers that end" in text and "/home/" not in text and "/root" not in text and "/tmp" not in text


def test_every_text_cell_of_the_notebook_is_in_chinese_too():
    english_only = [
        cell["source"]
        for cell in read_cells()
        if cell["cell_type"] == "markdown" and not CHINESE.search("".join(cell["source"]))
    ]
    assert english_only == []


@pytest.mark.real
def test_the_notebook_runs(tmp_path, monkeypatch):
    """On the real model and a fourth of its rows; its files go into a folder of the test's own."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.delenv("SFT_PIPELINE_CACHE")  # the converted model is kept for the next run
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    replacements = {"outputs/notebook": str(tmp_path / "out"), "max_train_rows=100": "max_train_rows=24"}
    replacements |= {"held_out=20": "held_out=6", "num_answers=6": "num_answers=3"}  # three are shown
    for old, new in replacements.items():
        assert any(old in cell.source for cell in notebook.cells)
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    text = json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"], ensure_ascii=False)
    assert "answers that end" in text and "the same |" in text and "OTHER |" not in text
