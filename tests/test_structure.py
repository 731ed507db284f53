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
# The rooms from top to bottom: each imports those that stand below it, and itself.
ROOMS = (
    *(
        "__init__",
        "__main__",
        "cli",
        "cli_options",
        "key_help",
        "commands",
        "train",
        "training",
        "reports",
        "evaluation",
        "inference",
    ),
    *("runs", "data", "model", "kernels", "config", "arguments", "utils"),
)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported: `from sft_pipeline import preview` gives sft_pipeline.data.preview."""
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
    room = part_of(path)
    below = ROOMS[ROOMS.index(room) :]
    beyond = parts_imported(ast.parse(path.read_text(encoding="utf-8"))) - {*below}
    assert not beyond, f"{path.relative_to(ROOT)} imports {sorted(beyond)}, which stand above {room}"


def test_the_root_holds_the_ways_in_alone():
    names = {path.stem for path in PACKAGE.glob("*.py")}
    assert names == {"__init__", "__main__", "arguments", "cli", "cli_options", "config", "key_help", "train"}


def test_the_imports_are_seen():
    """The check above would pass on anything if it saw no imports."""
    assert parts_imported(ast.parse((PACKAGE / "train.py").read_text(encoding="utf-8"))) >= {"data", "training"}
    inside = "def f():\n    from sft_pipeline import cli\n    import sft_pipeline.data.encode"
    assert parts_imported(ast.parse(inside)) == {"cli", "data"}


def test_templates_and_padding_stand_below_the_rest_of_data():
    """Ids know nothing of files, batches nothing of ids' making."""
    parts = ("data.messages", "data.text_encoder", "data.tool_calls", "data.template", "utils.errors")
    below = dict.fromkeys(("template", "role_template", "jinja_template"), parts) | {"text_encoder": ()}
    below |= {"chat_templates": (*parts, "data.role_template", "data.jinja_template"), "tool_calls": ("utils.errors",)}
    for name, allowed in (below | {"messages": (), "padding": ("utils.constants",)}).items():
        found = set(imports(ast.parse((PACKAGE / "data" / f"{name}.py").read_text(encoding="utf-8"))))
        modules = {one.rpartition(".")[0] for one in found if one.startswith("sft_pipeline")}
        assert modules <= {f"sft_pipeline.{part}" for part in allowed}, name


def test_the_command_line_imports_inside_its_functions():
    tree = ast.parse((PACKAGE / "cli.py").read_text(encoding="utf-8"))
    outside = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
    assert parts_imported(outside) == {"utils", "cli_options"}
    assert not {name.split(".")[0] for name in imports(outside)} & {"torch", "transformers", "datasets", "rich"}


def test_init_files_are_empty_but_the_first():
    files = [path for path in PACKAGE.glob("*/**/__init__.py") if path.read_text(encoding="utf-8").strip()]
    assert files == []


@pytest.mark.parametrize(
    "verb",
    [
        *("", "preview", "prepare", "chat", "generate", "evaluate", "study", "report", "verify-resume"),
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
