"""Commands in the documents parse, links resolve, named files exist, and the README's tree and table are complete."""

import dataclasses
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
# Commands of launch.sh itself: ruff, pytest and others parse their arguments.
LAUNCHER_COMMANDS = set(re.findall(r"\$verb == ([\w-]+)", (ROOT / "launch.sh").read_text(encoding="utf-8")))
COMMANDS = set(cli.COMMANDS)
CONFIG_COMMANDS = {"train", "preview", "prepare", "study", "verify-resume"}
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*")  # CONFIG, OUTPUT_DIR
RUN_FOLDER = "outputs/"
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
FILE_NAME = re.compile(r"[\w.-]+/|[\w-]+\.\w+")


def iterate_code(text: str) -> Iterator[str]:
    """Yield the lines of fenced and indented code without the prompt `$ `, joined where they end in a backslash, and
    the code spans in sentences."""
    in_fence, joined, is_blank = False, "", True
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            in_fence = not in_fence
        elif in_fence or (line.startswith("    ") and (is_blank or joined)):
            joined += line.strip().removeprefix("$ ").removesuffix("\\")
            if not line.endswith("\\"):
                yield joined
                joined = ""
            continue
        is_blank = not line.strip() or (is_blank and line.startswith("    "))
    for span in re.findall(r"`([^`]+)`", remove_fences(text)):
        yield " ".join(span.split())


def remove_fences(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def iterate_commands(line: str) -> Iterator[list[str]]:
    """Yield the arguments of this project's command, from the command's name on, in each part of a shell line."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    words: list[str] = []
    try:
        for word in [*reader, ";"]:
            if not set(word) <= set("();<>|&"):
                words.append(word)
                continue
            if arguments := remove_launcher(words):
                yield arguments
            words = []
    except ValueError:
        return  # not a shell line: an apostrophe in printed output


def remove_launcher(words: list[str]) -> list[str]:
    """Return what follows ./launch.sh or `-m sft_pipeline`, whichever launcher precedes it."""
    words = words[next((index for index, word in enumerate(words) if "=" not in word), len(words)) :]
    if words[:2] == ["./launch.sh", "--config_file"]:
        return words[3:]
    if words[:1] in (["./launch.sh"], ["sft-pipeline"]):
        return words[1:]
    is_launched = words[:1] and words[0] in ("python", "accelerate", "torchrun", "srun")
    module = [index for index in range(1, len(words)) if words[index - 1 : index + 1] == ["-m", "sft_pipeline"]]
    return words[module[0] + 1 :] if is_launched and module else []


DOCUMENTED_COMMANDS = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)[:60]}")
    for path in DOCUMENTS
    for line in iterate_code(path.read_text(encoding="utf-8"))
    for words in iterate_commands(line)
]


def find_problem(words: list[str]) -> str | None:
    """Return why the command would not start, or None."""
    is_launcher_command = words[0] in LAUNCHER_COMMANDS and words[0] not in COMMANDS
    if "--help" in words or words[0] == "COMMAND" or is_launcher_command:
        return None
    try:
        _, extra_words = build_parser().parse_known_args(words)
    except SystemExit:
        return f"does not parse: {words}"
    if words[0] not in CONFIG_COMMANDS:
        return f"unknown: {extra_words}" if extra_words else None
    file, keys = cli._split_config_path(extra_words)
    if file and not (PLACEHOLDER.fullmatch(file) or file.startswith(RUN_FOLDER) or (ROOT / file).is_file()):
        return f"no config file {file}"
    try:
        config._Parser().parse_args(keys)
    except (SFTError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("words", DOCUMENTED_COMMANDS)
def test_documented_commands_parse(words):
    assert find_problem(words) is None


def test_commands_are_found_and_wrong_ones_reported():
    text = "Text\n\n    A=1 ./launch.sh train \\\n        configs/no.yaml\n\n"
    text += "```\n$ echo 'a b' | ./launch.sh chat out\n```\n"
    text += "```bash\nNUM=2 torchrun --nproc_per_node 2 -m sft_pipeline train CONFIG --lorra true  # why\nit's\n```\n"
    text += "- a point\n    ./launch.sh nothing\n- `accelerate launch -m\n  sft_pipeline preview CONFIG`"
    text += " and `./launch.sh --config_file FILE train CONFIG --lora`"
    first, chat, third, fourth, fifth = [words for line in iterate_code(text) for words in iterate_commands(line)]
    assert first == ["train", "configs/no.yaml"] and find_problem(first) == "no config file configs/no.yaml"
    assert chat == ["chat", "out"] and find_problem(chat) is None
    assert third == ["train", "CONFIG", "--lorra", "true"] and "--lorra" in find_problem(third)
    assert find_problem(["study", "configs/study_rows.yaml", "--max_length", "x"]).startswith("max_length: invalid int")
    assert find_problem(["chat", "out", "--top_x", "1"]) == "unknown: ['--top_x', '1']"
    assert find_problem(["tain", "CONFIG"]) == "does not parse: ['tain', 'CONFIG']"
    assert fourth == ["preview", "CONFIG"] and find_problem(fourth) is None
    assert fifth == ["train", "CONFIG", "--lora"] and find_problem(fifth) is None
    assert len(DOCUMENTED_COMMANDS) > 10 and {"test", "lint"} <= LAUNCHER_COMMANDS and COMMANDS >= CONFIG_COMMANDS


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_table_of_commands_is_complete(name):
    cells = re.findall(r"^\| `([a-z][^`]*)` \|", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    rows = [cell.split() for cell in cells]
    assert [words[0] for words in rows if find_problem(words)] == []
    assert sorted(words[0] for words in rows) == sorted(COMMANDS)


def list_link_targets(path: Path) -> list[str]:
    """List the targets of links and pictures that are not addresses; code has none."""
    text = re.sub(r"`[^`]*`", "", remove_fences(path.read_text(encoding="utf-8")))
    targets = [markdown or html for markdown, html in LINK.findall(text)]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def list_anchors(path: Path) -> set[str]:
    """List the headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_resolve(path):
    for target in list_link_targets(path):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name}: {target} does not exist"
        assert not anchor or anchor in list_anchors(file), f"{path.name}: {target} names no heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(path):
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"\b(?:benchmarks|tests)/[\w/]+\.py\b|\bconfigs/accelerate/\w+\.yaml\b", text))
    assert [name for name in sorted(names) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_written_pages_are_linked(path):
    """A page without a link is not found; tables that a benchmark wrote have their JSON beside them."""
    linked = {
        (document.parent / target.partition("#")[0]).resolve()
        for document in DOCUMENTS
        for target in list_link_targets(document)
    }
    assert path.with_suffix(".json").exists() or path.resolve() in linked, f"link docs/{path.name} in the README"


def iterate_tree(text: str) -> Iterator[Path]:
    """Yield the files and folders that the README's tree names, relative to the root."""
    [block] = re.findall(r"^```\n(sft_pipeline/\n.*?)^```", text, re.DOTALL | re.MULTILINE)
    folders: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names: list[str] = []
        for word in line.split():
            if not FILE_NAME.fullmatch(word):
                break
            names.append(word)
        yield from (Path(*folders[:depth], name) for name in names)
        if len(names) == 1 and names[0].endswith("/"):
            folders = [*folders[:depth], names[0]]


def test_the_tree_of_the_readme_is_complete():
    listed = set(iterate_tree((ROOT / "README.md").read_text(encoding="utf-8")))
    assert [str(path) for path in sorted(listed) if not (ROOT / path).exists()] == []
    modules = {path.relative_to(ROOT) for path in (ROOT / "sft_pipeline").rglob("*.py") if "__" not in path.name}
    # A folder has one line for all that it contains.
    assert sorted(str(path) for path in modules if not listed & {path, *path.parents[:-2]}) == []


def test_the_configs_in_the_documents_have_known_keys():
    known_keys = {key.name for key in dataclasses.fields(config.SFTConfig)}
    for path in DOCUMENTS:
        for block in re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            keys = set(re.findall(r"^(\w+):", block, re.MULTILINE))
            if keys & {"model_name_or_path", "train_data"}:
                assert keys <= known_keys | {"variants", "few_shot"}, f"{path.name}: {sorted(keys - known_keys)}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
