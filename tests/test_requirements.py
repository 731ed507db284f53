"""setup.cfg requires every package that is imported, allows the pinned releases, and its Python runs them."""

import ast
import configparser
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
REQUIRED = [Requirement(line) for line in CONFIG["options"]["install_requires"].split("\n") if line]
EXTRAS = [
    Requirement(line) for lines in CONFIG["options.extras_require"].values() for line in lines.split("\n") if line
]
LOWEST_PYTHON = CONFIG["options"]["python_requires"].removeprefix(">=")


def read_pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def list_imports(path: Path) -> set[str]:
    """Return the packages that a file imports at any place, without those of Python itself and of this project."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"sft_pipeline"}


def test_every_imported_package_is_required():
    distributions = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in REQUIRED + EXTRAS}
    imported = set().union(*map(list_imports, (ROOT / "sft_pipeline").rglob("*.py")))
    assert {"torch", "yaml", "wandb", "peft"} <= imported
    missing = {name for name in imported if not declared & {*map(canonicalize_name, distributions.get(name, []))}}
    assert not missing, f"setup.cfg does not require {sorted(missing)}"


@pytest.mark.parametrize("requirement", REQUIRED + EXTRAS, ids=str)
def test_the_pinned_release_is_allowed(requirement):
    assert read_pins()[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("name", [requirement.name for requirement in REQUIRED])
def test_the_installed_release_runs_on_the_lowest_python(name):
    python_versions = importlib.metadata.metadata(name)["Requires-Python"]
    assert LOWEST_PYTHON in SpecifierSet(python_versions), f"{name} needs Python {python_versions}"


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("launch.sh", r"version_info < \((\d+, \d+)\)"),
        ("launch.sh", r"needs Python ([\d.]+) or newer"),
        ("pyproject.toml", r'target-version = "py(\d+)"'),
        ("README.md", r"Python ([\d.]+) or newer"),
        ("README.zh.md", r"Python ([\d.]+) 以上"),
        ("docs/quickstart.md", r"Python ([\d.]+) or newer"),
    ],
)
def test_every_place_names_the_lowest_python(file, pattern):
    [named] = re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"))
    assert re.sub(r"\D", "", named) == LOWEST_PYTHON.replace(".", "")
