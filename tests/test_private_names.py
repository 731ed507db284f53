"""Private names of other libraries: each is in the table with its reason, and has the signature recorded there."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from support.private_names import PRIVATE_NAMES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sft_pipeline"
TREES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
TABLE = "tests/support/private_names.py"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def find_definitions(tree: ast.AST) -> set[str]:
    """Return the names of functions, classes and variables that are defined, and of attributes set on `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(ast.unparse(node).removeprefix("self."))
    return names


def find_uses(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (name, line) of the private names that are read or set as attributes, or imported from other packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            names = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        else:
            continue
        yield from ((name, node.lineno) for name in names if is_private(name))


def find_overrides(file: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (name, line) of the private methods and class attributes that override those of another library."""
    module = importlib.import_module(".".join(("sft_pipeline", *Path(file).with_suffix("").parts)))
    for definition in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:
        names = {name for node in definition.body for name in find_definitions(node) if is_private(name)}
        bases = inspect.getmro(getattr(module, definition.name)) if names else ()
        foreign = {name for base in bases if not base.__module__.startswith("sft_pipeline") for name in vars(base)}
        yield from ((name, definition.lineno) for name in sorted(names & foreign))


def find_private_names() -> dict[tuple[str, str], int]:
    """Return the line of each (file, name) of the package that is private to another library."""
    own = {name for tree in TREES.values() for name in find_definitions(tree)}
    lines = {}
    for file, tree in TREES.items():
        uses = [(name, line) for name, line in find_uses(tree) if name not in own]
        lines |= {(file, name): line for name, line in [*uses, *find_overrides(file, tree)]}
    return lines


def test_every_private_name_of_another_library_is_in_the_table():
    rows = {(row.file, row.name) for row in PRIVATE_NAMES}
    lines = find_private_names()
    problems = [
        f"sft_pipeline/{file}:{line} uses {name}, which is private to another library: use a public name, or add a row "
        f"with the reason to {TABLE}"
        for (file, name), line in sorted(lines.items())
        if (file, name) not in rows
    ]
    problems += [
        f"{TABLE} lists {name} of sft_pipeline/{file}, which does not use it: remove the row"
        for file, name in sorted(rows - lines.keys())
    ]
    assert not problems, "\n".join(problems)


def describe(value: Any) -> str:
    """Return the parameters of a function, the schemas of an operator's overloads, or the type of any other object."""
    if hasattr(value, "overloads"):
        return "; ".join(str(getattr(value, overload)._schema) for overload in value.overloads())
    if not callable(value):
        return type(value).__name__
    parameters = inspect.signature(value).parameters.values()
    return str(inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in parameters]))


@pytest.mark.parametrize("row", PRIVATE_NAMES, ids=lambda row: row.name)
def test_a_private_name_is_what_it_was_in_the_pinned_release(row):
    if row.library == "torch" and "mkldnn::" in row.signature and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    [pinned] = re.findall(
        rf"^{row.library}==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    try:
        signature = describe(row.get())
    except AttributeError:
        signature = "missing"
    assert signature == row.signature, (
        f"{row.library} {version(row.library)}: {row.name} is {signature}, and was {row.signature} in {pinned}: "
        f"compare its source in both releases with sft_pipeline/{row.file}, then record the new signature in {TABLE}"
    )


def test_private_names_are_found():
    """The checks above would pass on anything if they saw no names."""
    source = """
import torch._dynamo
from transformers.trainer import _is_peft_model
from transformers._typing import X

def use(model, parser):
    parser._actions
    model.config._attn_implementation = hasattr(model, "_hooks")
    model.__dict__, model.config, model._own
    self._own = 1
"""
    tree = ast.parse(source)
    own = {"_own"}
    assert find_definitions(tree) >= own
    names = {name for name, _ in find_uses(tree)} - own
    assert names == {"_dynamo", "_is_peft_model", "_typing", "_actions", "_attn_implementation", "_hooks"}
    overrides = dict(find_overrides("training/checkpointing.py", TREES["training/checkpointing.py"]))
    assert set(overrides) == {"_get_output_dir", "_save_checkpoint"}
