"""Studies on a tiny model: one held-out set, finished parts are not repeated, and every error before any args."""

import itertools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file

from sft_pipeline import train as train_module
from sft_pipeline.commands import evaluate as evaluate_module
from sft_pipeline.commands import study as module
from sft_pipeline.commands.evaluate import EvaluateOptions, run_model
from sft_pipeline.commands.study import read_plan, run_study
from sft_pipeline.config import parse_config
from sft_pipeline.data.messages import format_conversation, parse_conversation
from sft_pipeline.data.pipeline import load_splits
from sft_pipeline.data.splits import select_rows
from sft_pipeline.evaluation.comparison import compare_models
from sft_pipeline.evaluation.prompt_set import select_prompts
from sft_pipeline.model.freezing import freeze_except
from sft_pipeline.train import train
from sft_pipeline.utils.errors import SFTError

ROOT = Path(__file__).parents[2]
VARIANTS = [
    {"name": "untrained", "train": False},
    {"name": "4 rows", "max_train_rows": 4},
    {"name": "attention", "trainable_modules": ["self_attn"]},
]

pytestmark = pytest.mark.usefixtures("few_instructions")


@pytest.fixture(scope="module")
def keys(model_folder, tmp_path_factory) -> dict:
    """A study's keys, less its folder and its variants."""
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"the answer is {n}"} for n in range(16)]
    file = tmp_path_factory.mktemp("data") / "rows.json"
    file.write_text(json.dumps(rows))
    return {
        "model_name_or_path": str(model_folder),
        "train_data": str(file),
        "held_out": 6,
        "template": "role",
        "num_answers": 3,
        "max_new_tokens": 4,
        "max_steps": 1,
        "learning_rate": 0.01,
        "eval_on_start": False,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }


@pytest.fixture(scope="module")
def write(keys, tmp_path_factory) -> Callable[..., str]:
    """write(variants, **keys) is a study's config."""

    def write(variants: object = VARIANTS, **more: object) -> str:
        folder = tmp_path_factory.mktemp("study")
        content = {**keys, "output_dir": str(folder / "out"), "variants": variants, **more}
        (folder / "study.yaml").write_text(yaml.safe_dump(content))
        return str(folder / "study.yaml")

    return write


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of the configs that were trained; in this process and without reports, to save time."""
    names: list[str] = []
    monkeypatch.setattr(train_module, "write_report", lambda folders: folders[0])

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess:
        assert command[1:4] == ["-m", "sft_pipeline", "train"]
        train(parse_config(command[4], command[5:]), Console(quiet=True))
        names.append(Path(command[4]).stem)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", run)
    return names


def study_results(config: str, *overrides: str) -> dict:
    run_study(config, list(overrides), Console(quiet=True))
    return json.loads((Path(config).parent / "out" / "study.json").read_text())


def test_a_study_and_its_second_call(write, trained, model_folder, monkeypatch):
    config = write(few_shot=1, push_to_hub=True, hub_strategy="end")  # the variants do not push: there is no hub here
    results = study_results(config)
    out = Path(config).parent / "out"
    names = ["untrained", "untrained, 1 examples", "4 rows", "4 rows, 1 examples", "attention", "attention, 1 examples"]
    assert [entry["name"] for entry in results["entries"]] == names and results["rows"] == 3
    assert trained == ["4_rows", "attention"]

    # The same as evaluating the folders.
    _, held = load_splits(read_plan(config, []).base)
    questions = select_prompts([parse_conversation(text) for text in held["conversation"]], 3, 1)
    request = EvaluateOptions("x", 3, 4, 1, "role")
    paths = {"untrained": model_folder, "4 rows": out / "4_rows", "attention": out / "attention"}
    records = [record for name, path in paths.items() for record in run_model(str(path), name, questions, request)]
    assert json.loads(json.dumps(compare_models(records, questions).as_json()))["entries"] == results["entries"]

    runs = [run for run in results["runs"] if run]
    assert [run["training_rows"] for run in runs] == [4, 10]
    assert [bool(run) for run in results["runs"]] == [False, False, True, False, True, False]
    base, tuned = (load_file(folder / "model.safetensors") for folder in (model_folder, out / "attention"))
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == {name for name in base if "self_attn" in name}
    assert runs[1]["trainable_parameters"] == sum(base[name].numel() for name in changed)
    assert (out / "study.png").is_file() and "| training rows |  |  | 4 |  | 10 |  |" in (out / "study.md").read_text()

    # Nothing is trained or evaluated again, but an unfinished run is started again.
    monkeypatch.setattr(evaluate_module, "draw_comparison", lambda *args: None)  # drawn above
    evaluated = []
    monkeypatch.setattr(module, "run_model", lambda path, *args: evaluated.append(path) or run_model(path, *args))
    assert study_results(config) == results and len(trained) == 2 and evaluated == []
    (out / "4_rows" / "results.json").unlink()
    assert study_results(config)["entries"] == results["entries"]
    assert trained == ["4_rows", "attention", "4_rows"] and evaluated == [str(out / "4_rows")]

    with pytest.raises(SFTError, match="out/4_rows: holds a run with different settings; delete it or choose another"):
        study_results(config, "--learning_rate", "0.02")


def test_a_failed_training_is_named(write, monkeypatch):
    monkeypatch.setattr(module.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 2))
    message = "^variant a: training failed with status 2, see above; finished variants are kept$"
    with pytest.raises(SFTError, match=message):
        study_results(write([{"name": "a"}]))


REFUSED = {
    "no variants": (None, {}, "study.yaml: a study needs `variants`, a list of keys each with a `name`"),
    "empty": ([], {}, "study.yaml: a study needs `variants`"),
    "no name": ([{"max_train_rows": 3}], {}, "study.yaml: a study needs `variants`"),
    "few_shot": (VARIANTS, {"few_shot": "5"}, "study.yaml: few_shot is 5; it has to be a whole number, 0 or more"),
    "held_out": ([{"name": "a", "held_out": 3}], {}, "variant a: held_out must be the same for all variants; set it"),
    "unknown": ([{"name": "a", "lorra": 1}], {}, "variant a: unknown key lorra; did you mean lora?"),
    "wrong type": ([{"name": "a", "max_train_rows": "x"}], {}, "variant a: max_train_rows is the text 'x' where a"),
    "one folder": ([{"name": "a b"}, {"name": "a/b"}], {}, "study.yaml: two variants would share the folder"),
    "nothing held out": (VARIANTS, {"held_out": 0}, "a study needs held-out prompts: set held_out (or eval_data)"),
    "both": ([{"name": "a", "lora": True, "trainable_modules": ["q"]}], {}, "lora and trainable_modules both select"),
    "negative": ([{"name": "a", "max_train_rows": -1}], {}, "max_train_rows is -1; it has to be 0 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_raised_before_anything_is_trained(case, write):
    variants, more, message = REFUSED[case]
    config = write(variants, **more)
    with pytest.raises(SFTError, match=re.escape(message)) as raised:
        study_results(config)
    assert "\n" not in str(raised.value) and not (Path(config).parent / "out").exists()


@pytest.mark.parametrize("name", ["rows", "parts", "base"])
def test_the_projects_studies_are_read(name):
    plan = read_plan(str(ROOT / "configs" / f"study_{name}.yaml"), ["--use_cpu", "true"])
    assert plan.folder == Path("outputs") / f"study_{name}" and not plan.variants[0].trained
    assert {variant.args.system_prompt for variant in plan.variants} == {plan.base.system_prompt}
    assert {variant.args.held_out for variant in plan.variants} == {50}
    assert {variant.args.num_answers for variant in plan.variants} == {0}


# The two keys that studies vary.


def test_fewer_rows_are_among_more():
    conversations = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(20)]
    rows = Dataset.from_dict({"conversation": list(map(format_conversation, conversations))})
    sets = [
        [parse_conversation(text)["messages"][0]["content"] for text in select_rows(rows, count)["conversation"]]
        for count in (1, 5, 12, 20, 99)
    ]
    assert [len(texts) for texts in sets] == [1, 5, 12, 20, 20]
    assert all(set(few) < set(many) for few, many in itertools.pairwise(sets[:4]))
    assert all(texts == sorted(texts, key=int) for texts in sets) and sets[1] != sets[4][:5]


def test_each_held_out_set_is_asked(write, tmp_path):
    """`num_answers` prompts of each, in turn, so that a small set is not left out."""
    for name in ("one", "two"):
        rows = [{"instruction": f"Ask {name} {n}.", "output": "yes"} for n in range(5)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    sets = json.dumps({name: str(tmp_path / f"{name}.json") for name in ("one", "two")})
    plan = read_plan(write(held_out=0), ["--eval_data", sets, "--num_answers", "2"])
    assert module.load_study_prompts(plan).texts == ["Ask one 0.", "Ask two 0.", "Ask one 1.", "Ask two 1."]


def test_the_held_out_rows_do_not_depend_on_max_train_rows(keys):
    words = [f"--{key}={value}" for key, value in keys.items()]
    (all_rows, held), (few, same) = (load_splits(parse_config(None, [*words, f"--max_train_rows={n}"])) for n in (0, 3))
    assert held["conversation"][:] == same["conversation"][:] and len(all_rows) == 10 and len(few) == 3


def test_only_what_matches_is_trained(tiny_model):
    freeze_except(tiny_model, [r"layers\.1\.mlp", "lm_head"])
    trained = {name for name, weight in tiny_model.named_parameters() if weight.requires_grad}
    parts = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert trained == parts | {"lm_head.weight"}


def test_names_that_no_parameter_has(tiny_model):
    with pytest.raises(SFTError, match="^trainable_modules attn2: matches no parameter name; names are model.em"):
        freeze_except(tiny_model, ["self_attn", "attn2"])
    with pytest.raises(SFTError, match=r"^trainable_modules \(: not a regular expression"):
        freeze_except(tiny_model, ["("])
    assert all(weight.requires_grad for weight in tiny_model.parameters())


CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("study_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_projects_own_studies_are_readable(path):
    plan = read_plan(str(path), ["--train_data", "rows.jsonl"])
    assert len({variant.name for variant in plan.variants}) == len(plan.variants) >= 2
