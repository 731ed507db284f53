"""Each key is honoured, refused or without effect here, as the table of support/arguments.py says.

`python tests/test_arguments.py` writes docs/arguments.md.
"""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
from support.arguments import (
    ARGUMENTS,
    CHANGES,
    CONTEXT,
    HONOURED,
    NEEDED,
    NO_EFFECT,
    READ,
    REFUSED,
    SAME,
    write_table,
)
from support.training_runs import run_train

from sft_pipeline.config import REFUSED_KEYS, SFTConfig
from sft_pipeline.utils.errors import SFTError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "arguments.md"
DEBUG = (
    "debug: its hooks are on modules that fused layers do not call; remove it, a diverging loss stops the run anyway"
)
WITH_VALUE = [name for name, argument in ARGUMENTS.items() if argument.on is not None]


def test_the_table_has_every_key_of_the_pinned_release():
    keys = {key.name for key in dataclasses.fields(SFTConfig)}
    added, removed = sorted(keys - set(ARGUMENTS)), sorted(set(ARGUMENTS) - keys)
    assert not added, f"new keys: {added}; say in tests/support/arguments.py what they do here"
    assert not removed, f"keys that are gone: {removed}; remove them from tests/support/arguments.py"


def test_every_named_test_exists_and_no_cell_is_empty():
    for name, argument in ARGUMENTS.items():
        assert argument.status in (HONOURED, REFUSED, NO_EFFECT) and argument.check, name
        if argument.status == HONOURED and argument.check != READ:
            file, _, test = argument.check.partition("::")
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name


def test_the_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == write_table(), "python tests/test_arguments.py writes it"


@pytest.fixture(scope="module")
def run(write_config, tmp_path_factory):
    """run(key=value, ...) trains two steps; returns the sums of the weights' absolute values, the log and the files."""
    from safetensors.torch import load_file

    def train(**keys):
        folder = tmp_path_factory.mktemp("run")
        own = {"max_steps": 2, "logging_steps": 1, "held_out": 2, "num_answers": 0, "num_instructions": 0}
        config = write_config(folder, rows=8, **(own | {"output_dir": str(folder / "out")} | keys))
        run_train(config)
        log = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
        measured = ("_runtime", "per_second", "memory", "seconds")
        log = [{k: v for k, v in entry.items() if not any(word in k for word in measured)} for entry in log]
        weights = load_file(next((folder / "out").glob("*model.safetensors")))
        files = {str(path.relative_to(folder / "out")) for path in folder.glob("out/**/*")}
        return {name: weight.double().abs().sum().item() for name, weight in weights.items()}, log, files

    return train


@pytest.fixture(scope="module")
def plain_run(run):
    return run()


def test_the_same_keys_give_the_same_run(run, plain_run):
    assert run() == plain_run


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_changes_the_run(key, run, plain_run):
    context = CONTEXT.get(key, {})
    assert run(**(context | {key: CHANGES[key]})) != (run(**context) if context else plain_run)


@pytest.mark.parametrize("key", SAME)
def test_a_key_changes_no_result(key, run, plain_run):
    """It changes memory, speed or messages."""
    needed = NEEDED.get(key, {})
    assert run(**needed, **{key: SAME[key]}) == (run(**needed) if needed else plain_run)


@pytest.mark.parametrize("key", [name for name in REFUSED_KEYS if ARGUMENTS[name].on is not None])
def test_a_refused_key_is_one_line(key):
    with pytest.raises(SFTError) as error:
        SFTConfig(use_cpu=True, **{key: ARGUMENTS[key].on})
    assert str(error.value) == f"{key} {REFUSED_KEYS[key]}"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr_scheduler_kwargs": {"speed": 1}}, "lr_scheduler_kwargs: speed is not one of linear's: none"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"speed": 1}},
            "lr_scheduler_kwargs: speed is not one of cosine's: num_cycles",
        ),
        ({"optim_args": "eps=1"}, "optim_args is not read by optim: adamw_torch_fused; remove it"),
        ({"optim_target_modules": "mlp"}, "optim_target_modules is not read by optim: adamw_torch_fused; remove it"),
        (
            {"dataloader_persistent_workers": True},
            "dataloader_persistent_workers needs dataloader_num_workers: 1 or more",
        ),
        ({"debug": "underflow_overflow"}, DEBUG),
        (
            {"metric_for_best_model": "eval_bleu"},
            "metric_for_best_model is bleu; choose loss, perplexity or token_accuracy",
        ),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it has to be 1 or more"),
        (
            {"accelerator_config": {"split_batches": True}},
            "accelerator_config: split_batches, dispatch_batches and even_batches would change the rows of an "
            "evaluation; remove them",
        ),
    ],
)
def test_values_that_the_library_would_fail_on_or_ignore(keys, message):
    with pytest.raises(SFTError) as error:
        SFTConfig(use_cpu=True, **keys)
    assert str(error.value) == message


@pytest.mark.parametrize("key", sorted(random.Random(14).sample(WITH_VALUE, 30)))
def test_a_key_on_trains_two_steps_or_ends_in_one_line(key, run):
    """Thirty keys at random; every other key has its default, as in `plain_run`, which is the same run with it off."""
    try:
        run(**(NEEDED.get(key, {}) | {key: ARGUMENTS[key].on}))
    except SFTError as error:
        assert "\n" not in str(error)


if __name__ == "__main__":
    PAGE.write_text(write_table(), encoding="utf-8")
