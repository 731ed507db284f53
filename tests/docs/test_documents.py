"""What the documents say can be typed and followed: commands parse, links resolve, the tree is complete."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_pipeline import cli, config
from sft_pipeline.cli_options import build_parser
from sft_pipeline.utils.errors import SFTError

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("configs/**/*.md"))]
# Verbs of launch.sh itself: ruff, pytest and the like read what follows them.
LAUNCHERS = set(re.findall(r"\$verb == ([\w-]+)", (ROOT / "launch.sh").read_text(encoding="utf-8")))
VERBS = set(cli.COMMANDS)
CONFIG_VERBS = {"train", "preview", "prepare", "study", "verify-resume"}
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*")  # CONFIG, OUTPUT_DIR
MADE_BY_RUNS = "outputs/"
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
NAME = re.compile(r"[\w.-]+/|[\w-]+\.\w+")


def code_lines(text: str) -> Iterator[str]:
    """Lines of fenced and indented code, those that end in a backslash joined with the next, without the prompt; and
    code within a sentence."""
    fenced, before, blank = False, "", True
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (blank or before)):
            before += line.strip().removeprefix("$ ").removesuffix("\\")
            if not line.endswith("\\"):
                yield before
                before = ""
            continue
        blank = not line.strip() or (blank and line.startswith("    "))
    for span in re.findall(r"`([^`]+)`", without_fences(text)):
        yield " ".join(span.split())


def without_fences(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def commands(line: str) -> Iterator[list[str]]:
    """The arguments of this project's command in each part of a shell line: from the verb on."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    words: list[str] = []
    try:
        for word in [*reader, ";"]:
            if not set(word) <= set("();<>|&"):
                words.append(word)
                continue
            if found := of_ours(words):
                yield found
            words = []
    except ValueError:
        return  # no shell: an apostrophe in what a command printed


def of_ours(words: list[str]) -> list[str]:
    """What follows ./launch.sh or `-m sft_pipeline`, whichever launcher stands before it."""
    words = words[next((at for at, word in enumerate(words) if "=" not in word), len(words)) :]
    if words[:1] in (["./launch.sh"], ["sft-pipeline"]):
        return words[1:]
    started = words[:1] and words[0] in ("python", "accelerate", "torchrun", "srun")
    module = [at for at in range(1, len(words)) if words[at - 1 : at + 1] == ["-m", "sft_pipeline"]]
    return words[module[0] + 1 :] if started and module else []


FOUND = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)[:60]}")
    for path in DOCUMENTS
    for line in code_lines(path.read_text(encoding="utf-8"))
    for words in commands(line)
]


def problem(words: list[str]) -> str | None:
    """Why the command would not even begin, or None."""
    if "--help" in words or words[0] == "COMMAND" or (words[0] in LAUNCHERS and words[0] not in VERBS):
        return None
    try:
        _, rest = build_parser().parse_known_args(words)
    except SystemExit:
        return f"does not parse: {words}"
    if words[0] not in CONFIG_VERBS:
        return f"unknown: {rest}" if rest else None
    file, keys = cli._split_config_path(rest)
    if file and not (PLACEHOLDER.fullmatch(file) or file.startswith(MADE_BY_RUNS) or (ROOT / file).is_file()):
        return f"no config file {file}"
    try:
        config._build_parser().parse_args(["--model_name_or_path=m", "--train_data=d", *keys])
    except (SFTError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("words", FOUND)
def test_a_command_of_the_documents_parses(words):
    assert problem(words) is None


def test_commands_are_found_and_wrong_ones_told():
    text = "Text\n\n    A=1 ./launch.sh train \\\n        configs/no.yaml\n\n"
    text += "```\n$ echo 'a b' | ./launch.sh chat out\n```\n"
    text += "```bash\nNUM=2 torchrun --nproc_per_node 2 -m sft_pipeline train CONFIG --lorra true  # why\nit's\n```\n"
    text += "- a point\n    ./launch.sh nothing\n- `accelerate launch -m\n  sft_pipeline preview CONFIG`"
    first, chat, third, fourth = [words for line in code_lines(text) for words in commands(line)]
    assert first == ["train", "configs/no.yaml"] and problem(first) == "no config file configs/no.yaml"
    assert chat == ["chat", "out"] and problem(chat) is None
    assert third == ["train", "CONFIG", "--lorra", "true"] and "--lorra" in problem(third)
    assert problem(["study", "configs/study_rows.yaml", "--max_length", "x"]).startswith("max_length: invalid int")
    assert problem(["chat", "out", "--top_x", "1"]) == "unknown: ['--top_x', '1']"
    assert problem(["tain", "CONFIG"]) == "does not parse: ['tain', 'CONFIG']"
    assert fourth == ["preview", "CONFIG"] and problem(fourth) is None
    assert len(FOUND) > 10 and {"test", "lint"} <= LAUNCHERS and VERBS >= CONFIG_VERBS


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_table_of_commands_is_complete(name):
    cells = re.findall(r"^\| `([a-z][^`]*)` \|", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    rows = [cell.split() for cell in cells]
    assert [words[0] for words in rows if problem(words)] == []
    assert sorted(words[0] for words in rows) == sorted(VERBS)


def targets(path: Path) -> list[str]:
    """Where links and pictures lead that are not addresses; what stands in code leads nowhere."""
    text = re.sub(r"`[^`]*`", "", without_fences(path.read_text(encoding="utf-8")))
    found = [one or other for one, other in LINK.findall(text)]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_resolve(path):
    for target in targets(path):
        file, _, anchor = target.partition("#")
        place = path.parent / file if file else path
        assert place.exists(), f"{path.name}: {target} is not there"
        assert not anchor or anchor in anchors(place), f"{path.name}: {target} names no heading"


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_a_page_that_people_write_is_linked_or_generated(path):
    """A page nobody is led to is read by nobody; tables that a benchmark wrote have their JSON beside them."""
    linked = {(one.parent / target.partition("#")[0]).resolve() for one in DOCUMENTS for target in targets(one)}
    assert path.with_suffix(".json").exists() or path.resolve() in linked, f"link docs/{path.name} in the README"


def tree(text: str) -> Iterator[Path]:
    """The files and folders that the README's tree names, relative to the root."""
    [block] = re.findall(r"^```\n(sft_pipeline/\n.*?)^```", text, re.DOTALL | re.MULTILINE)
    folders: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names: list[str] = []
        for word in line.split():
            if not NAME.fullmatch(word):
                break
            names.append(word)
        yield from (Path(*folders[:depth], name) for name in names)
        if len(names) == 1 and names[0].endswith("/"):
            folders = [*folders[:depth], names[0]]


def test_the_tree_of_the_readme_is_that_of_the_files():
    named = set(tree((ROOT / "README.md").read_text(encoding="utf-8")))
    assert [str(path) for path in sorted(named) if not (ROOT / path).exists()] == []
    modules = {path.relative_to(ROOT) for path in (ROOT / "sft_pipeline").rglob("*.py") if "__" not in path.name}
    # A folder has one clause for all that lies in it.
    assert sorted(str(path) for path in modules if not named & {path, *path.parents[:-2]}) == []


def test_the_configs_in_the_documents_have_known_keys():
    known = set(config._resolve_field_types(config._build_parser()))
    for path in DOCUMENTS:
        for block in re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            keys = set(re.findall(r"^(\w+):", block, re.MULTILINE))
            if keys & {"model_name_or_path", "train_data"}:
                assert keys <= known | {"variants", "few_shot"}, f"{path.name}: {sorted(keys - known)}"
