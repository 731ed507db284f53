"""Runs to export: each set of keys is trained once."""

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from sft_pipeline.config import parse_keys
from sft_pipeline.train import train

SYSTEM = "You are 冬瓜.\n"


def remember_runs(model_folder: Path, runs_folder: Path) -> Callable[..., Path]:
    """Return f, where f(key=value) is the output folder of a run on 24 rows; the same keys are the same run."""
    runs = {}
    data = runs_folder / "data" / "rows.jsonl"
    data.parent.mkdir()
    rows = [
        {"prompt": f"Say text {n % 3} times, {n}.", "completion": " ".join(["text"] * (n % 3 + 1))} for n in range(24)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (data.parent / "README.md").write_text(
        "---\nlicense: cc-by-4.0\nlanguage: [en, zh]\n---\nRows.\n", encoding="utf-8"
    )

    def run(**keys) -> Path:
        folder = runs_folder / f"run-{len(runs)}"
        common = {
            "model_name_or_path": str(model_folder),
            "train_data": [str(data)],
            "held_out": 4,
            "system_prompt": SYSTEM,
        }
        common |= {"template": "role", "learning_rate": 0.03, "max_steps": 20, "num_answers": 2, "num_instructions": 2}
        common |= {
            "eval_strategy": "steps",
            "eval_steps": 20,
            "save_strategy": "no",
            "max_new_tokens": 4,
            "use_cpu": True,
            "disable_tqdm": True,
            "output_dir": str(folder),
        }
        train(parse_keys(common | keys), Console(quiet=True))
        return folder

    def remembered(**keys) -> Path:
        name = json.dumps(keys)
        if name not in runs:
            runs[name] = run(**keys)
        return runs[name]

    return remembered
