"""The examples of docs/api.md run, and so does the notebook."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def read_examples(file: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_api_run(model_folder, tmp_path, monkeypatch, capsys):
    """In their order and one namespace, on the tiny model."""
    monkeypatch.chdir(ROOT)
    code = "\n".join(read_examples(ROOT / "docs" / "api.md"))
    replacements = {
        '"smollm2-135m"': repr(str(model_folder)),
        '"max_train_rows": 100': '"max_train_rows": 8, "use_cpu": True',
    }
    replacements |= {'"held_out": 20': '"held_out": 4, "disable_tqdm": True', "outputs/api": str(tmp_path / "out")}
    for old, new in replacements.items():
        assert old in code
        code = code.replace(old, new)
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert namespace["results"]["rows"]["train"]["kept"] == 8
    assert (tmp_path / "out" / "results.json").is_file() and len(namespace["ids"]) == 2
    assert "nll_nats_per_token" in capsys.readouterr().out
    assert namespace["answer"].finish_reason in ("stop", "length") and namespace["completion"].logprobs


def test_listed_names_exist_and_have_docstrings():
    import importlib

    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(names) >= 15
    for name in names:
        module, _, attribute = f"sft_pipeline.{name}".rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name
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
    """On the real model; its files go into a folder of the test's own."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.delenv("SFT_PIPELINE_CACHE")  # the converted model is kept for the next run
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("outputs/notebook", str(tmp_path / "out"))
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    text = json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"], ensure_ascii=False)
    assert "answers that end" in text and "the same |" in text and "OTHER |" not in text
