"""Imports run one way, and --help is quick because it loads neither torch nor transformers."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sft_pipeline"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
# What each part may import of the project beside itself: a part stands above all those that it names.
MAY_IMPORT = {
    "visible": set(),
    "errors": {"visible"},
    "allocator": set(),
    "cache": set(),
    "labels": set(),
    "config": {"errors"},
    "data": {"errors", "cache", "config", "labels", "visible"},
    "progress": set(),
    "model": {"errors", "labels", "progress"},
    "memory": {"errors"},
    "processes": {"errors"},
    "rehearsal": {"data", "memory"},
    "checkpoints": {"errors"},
    "pickles": {"errors"},
    "saving": {"errors", "checkpoints", "processes", "progress", "sharded"},
    "output": {"errors", "config", "checkpoints"},
    "shards": {"errors", "config", "data", "checkpoints", "output"},
    "divergence": set(),
    "trackers": {"errors", "checkpoints", "output"},
    "terminal": {"visible"},
    "sharded": {"errors"},
    "launch": set(),
    "trainer": {
        *("errors", "data", "model", "checkpoints", "divergence", "memory", "pickles", "progress", "rehearsal"),
        "saving",
    },
    "evaluation": {"errors", "labels", "checkpoints", "config", "data", "model", "output", "trackers", "trainer"},
    "preview": {"errors", "data", "labels", "visible"},
    "report": {"errors", "evaluation", "output", "visible"},
    "summary": {"visible"},
    "trained": {"errors", "cache", "data", "model", "output"},
    "train": {
        *("errors", "allocator", "cache", "checkpoints", "config", "data", "memory", "model", "evaluation", "preview"),
        *("processes", "trainer", "output", "sharded", "shards", "summary", "report", "progress", "trackers"),
    },
    "chat": {"errors", "data", "model", "evaluation", "trained", "visible"},
    "answer_file": {"errors"},
    "generate": {"errors", "data", "model", "evaluation", "trained", "answer_file"},
    "evaluate": {"errors", "cache", "config", "data", "model", "evaluation", "output", "trained", "visible"},
    "doctor": {"errors", "cache"},
    "dashboard": {"errors"},
    "model_card": {"data", "model", "report", "summary"},
    "export": {"errors", "checkpoints", "data", "model", "output", "report", "trained", "model_card"},
    "study": {"errors", "checkpoints", "config", "data", "evaluation", "output", "evaluate"},
    "verify_resume": {"errors", "checkpoints", "config", "output"},
    "options": {"config"},
    "cli": {
        *("errors", "options", "cache", "config", "data", "model", "evaluation", "preview", "trainer", "train", "chat"),
        *("generate", "evaluate", "study", "report", "verify_resume", "shards", "terminal", "doctor"),
        *("dashboard", "export"),
    },
    "__main__": {"cli"},
    "__init__": set(),
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported: `from sft_pipeline import preview` gives sft_pipeline.preview."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(tree: ast.AST) -> set[str]:
    names = (name.split(".") for name in imports(tree))
    return {name[1] for name in names if name[0] == "sft_pipeline" and len(name) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"{path.name}: say in MAY_IMPORT where it stands"
    beyond = parts_imported(ast.parse(path.read_text(encoding="utf-8"))) - MAY_IMPORT[part] - {part}
    assert not beyond, f"{path.relative_to(ROOT)} imports {sorted(beyond)}"


def test_the_table_has_no_circle():
    done: set[str] = set()
    while rest := set(MAY_IMPORT) - done:
        ready = {part for part in rest if MAY_IMPORT[part] <= done}
        assert ready, f"these import each other: {sorted(rest)}"
        done |= ready


def test_the_imports_are_seen():
    """The check above would pass on anything if it saw no imports."""
    assert parts_imported(ast.parse((PACKAGE / "train.py").read_text(encoding="utf-8"))) >= {"data", "model", "trainer"}
    inside = "def f():\n    from sft_pipeline import cli\n    import sft_pipeline.data.encode"
    assert parts_imported(ast.parse(inside)) == {"cli", "data"}


def test_templates_and_collate_stand_below_the_rest_of_data():
    """Ids know nothing of files, batches nothing of ids' making."""
    below = {"sft_pipeline.errors.SFTError", "sft_pipeline.data.tokens.TextEncoder"}
    for name, allowed in {"tokens": set(), "templates": below, "collate": {"sft_pipeline.labels.IGNORED"}}.items():
        found = set(imports(ast.parse((PACKAGE / "data" / f"{name}.py").read_text(encoding="utf-8"))))
        assert {one for one in found if one.startswith("sft_pipeline")} <= allowed


def test_the_command_line_imports_inside_its_functions():
    tree = ast.parse((PACKAGE / "cli.py").read_text(encoding="utf-8"))
    outside = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
    assert parts_imported(outside) == {"errors", "options"}
    assert not {name.split(".")[0] for name in imports(outside)} & {"torch", "transformers", "datasets", "rich"}


def test_init_files_are_empty():
    assert [str(path) for path in PACKAGE.rglob("__init__.py") if path.read_text(encoding="utf-8").strip()] == []


@pytest.mark.parametrize(
    "verb",
    [
        *("", "train", "preview", "prepare", "chat", "generate", "evaluate", "study", "report", "verify-resume"),
        *("doctor", "dashboard", "export"),
    ],
)
def test_help_loads_nothing_heavy(verb):
    arguments = [*verb.split(), "--help"]
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['sft_pipeline', *{arguments!r}]\n"
        "try:\n    runpy.run_module('sft_pipeline', run_name='__main__')\n"
        "except SystemExit as stopped:\n    status = stopped.code\n"
        "print('STATUS', status, [name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: sft-pipeline")
    assert run.stdout.endswith("STATUS 0 []\n")
    assert run.stderr == ""
