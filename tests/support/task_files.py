"""Small tasks of lm-evaluation-harness, with their rows beside them."""

import json
from pathlib import Path

import yaml

CHOICES = {"output_type": "multiple_choice", "doc_to_choice": ["the text", "is", "the answer is in the text"]}
TEXTS = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}


def write_task(folder: Path, name: str, **keys) -> str:
    """Write a task of generation over four rows, with other keys; return its file."""
    folder.mkdir(exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"Say {n}.", "text": "the text"}) + "\n" for n in range(4)))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | keys))
    return str(folder / f"{name}.yaml")


def write_tasks(folder: Path) -> str:
    """Write a task of each kind; return their folder. `likelihood` and `written` show any change of the model."""
    write_task(folder, "likelihood", **TEXTS, metric_list=[{"metric": "word_perplexity"}])
    write_task(folder, "chosen", **CHOICES, doc_to_target=0, metric_list=[{"metric": "acc"}])
    write_task(folder, "written", metric_list=[{"metric": "chrf"}])
    return str(folder)
