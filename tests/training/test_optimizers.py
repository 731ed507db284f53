"""Every `optim`: three steps and a resume after the second, the bytes of its state, or one line why not.

docs/optimizers.md has a table of what is tested here.
"""

import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.trainers import UNEVEN, VOCABULARY, make_trainer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.training_args import OptimizerNames

from sft_pipeline.commands.verify_resume import compare_checkpoints
from sft_pipeline.config import SFTConfig
from sft_pipeline.training.memory_estimate import count_optimizer_bytes
from sft_pipeline.training.optimizers import LOW_RANK, PACKAGES, allow_optimizer_state, check_optimizer
from sft_pipeline.utils.errors import SFTError

PAGE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")
SIZE, STEPS, SAVED = 256, 3, 2
# Warnings of the packages: a paged optimizer on a CPU, an AdamW and an autocast that are old.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
    pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*CUDA is not available.*autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
]


def read_table(title: str) -> dict[str, list[str]]:
    """Return the other cells of each row of the table under a title, by the names in the first cell."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]  # without head and rule
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: row[1:] for row in rows for name in re.findall(r"`(\w+)`", row[0])}


RUN, REFUSED = read_table("Run here"), read_table("Refused")


def test_every_optimizer_is_in_one_of_the_tables():
    assert not RUN.keys() & REFUSED.keys()
    assert RUN.keys() | REFUSED.keys() == {name.value for name in OptimizerNames}


def require(name: str) -> None:
    for start, (module, package) in PACKAGES.items():
        if name.startswith(start) and importlib.util.find_spec(module) is None:
            pytest.skip(f"{package} is not installed")


def build(folder: Path, name: str, **arguments):
    """A trainer of one layer whose matrices are all SIZE x SIZE, but for embeddings and head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": SIZE, "intermediate_size": SIZE, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **ids))
    options = {"optim": name, "learning_rate": 1e-3, "max_grad_norm": 1.0, "max_steps": STEPS, "logging_steps": STEPS}
    options |= {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4, "seed": 1}
    if name.startswith(LOW_RANK):
        options |= {"optim_target_modules": "all-linear", "optim_args": f"rank={SIZE // 4},update_proj_gap=2"}
    allow_optimizer_state(name)
    return make_trainer(folder, "packed", rows=UNEVEN, model=model, **options | arguments)


def iterate_tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        yield from (getattr(value, part) for part in parts)
        if not parts:
            yield value
    elif hasattr(value, "ortho_matrix"):
        yield from iterate_tensors(value.ortho_matrix)
    elif isinstance(value, (list, tuple)):
        yield from (tensor for member in value for tensor in iterate_tensors(member))


def count_state_bytes(trainer) -> float:
    """Bytes of the optimizer's state per weight of a matrix."""
    optimizer = trainer.optimizer.optimizer
    weight = trainer.model.model.layers[0].self_attn.q_proj.weight
    state = optimizer.state[weight] or next((g["state"][weight] for g in optimizer.param_groups if "state" in g), {})
    tensors = list(iterate_tensors(list(state.values())))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / weight.numel()


@pytest.fixture
def uncompiled(monkeypatch) -> Iterator[None]:
    """torchao compiles its step, which takes a minute; GrokAdamW configures the root logger when it is imported."""
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("name", RUN)
def test_an_optimizer_runs_and_resumes_as_the_page_says(name, tmp_path, uncompiled):
    require(name)
    _, size, resumes = RUN[name]
    whole = build(tmp_path / "whole", name)
    before = whole.model.model.layers[0].self_attn.q_proj.weight.clone()
    whole.train()
    assert whole.state.global_step == STEPS
    moved = not torch.equal(before, whole.model.model.layers[0].self_attn.q_proj.weight)
    assert moved or name == "schedule_free_radam"  # its first steps are of size 0
    measured = count_state_bytes(whole)
    assert f"{measured:.1f}" == size, measured
    if estimated := count_optimizer_bytes(name, 4):
        assert estimated == pytest.approx(measured, rel=0.1)

    resumed = build(tmp_path / "resumed", name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    ends = (tmp_path / folder / f"checkpoint-{STEPS}" for folder in ("whole", "resumed"))
    count, differences = compare_checkpoints(*ends)
    assert count > 20 and (differences == []) == (resumes == "bit by bit"), differences[:5]


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_cannot_run_is_one_line(name):
    with pytest.raises(SFTError) as error:
        targets = "all-linear" if name.startswith(LOW_RANK) else None
        check_optimizer(SFTConfig(use_cpu=True, optim=name, optim_target_modules=targets))
    message = str(error.value)
    assert message.startswith(f"optim: {name} ") and "\n" not in message
    assert REFUSED[name][0] in message


@pytest.mark.parametrize("name", [name for name in RUN if any(name.startswith(start) for start in PACKAGES)])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    package = RUN[name][0].strip("`")
    with pytest.raises(SFTError, match=rf"^optim: {name} needs \w+; install it with `pip install {package}`$"):
        check_optimizer(SFTConfig(use_cpu=True, optim=name))


def test_keys_that_low_rank_optimizers_need_or_do_not_read():
    for name in ("galore_adamw", "galore_adafactor", "apollo_adamw"):
        require(name)
        with pytest.raises(SFTError, match=f"optim: {name} needs optim_target_modules, the linear layers whose"):
            check_optimizer(SFTConfig(use_cpu=True, optim=name))
        with pytest.raises(SFTError, match=f"^weight_decay is not read by optim: {name}; remove it$"):
            check_optimizer(SFTConfig(use_cpu=True, optim=name, optim_target_modules="mlp", weight_decay=0.1))


def test_an_optimizer_that_does_not_resume_exactly_says_so(caplog, uncompiled):
    require("grokadamw")
    check_optimizer(SFTConfig(use_cpu=True, optim="grokadamw"))
    assert caplog.messages == [
        "optim: grokadamw does not resume exactly: its averages, which no checkpoint holds, start again"
    ]


def test_optim_args_reach_an_optimizer_that_reads_them(tmp_path):
    args = SFTConfig(use_cpu=True, optim="sgd", optim_args="momentum=0.9")
    trainer = build(tmp_path, "sgd", optim_args=args.optim_args)
    trainer.create_optimizer()
    assert trainer.optimizer.defaults["momentum"] == 0.9


def test_a_schedule_free_optimizer_saves_the_weights_that_it_evaluates(tmp_path):
    """Between steps the model has other weights than those that an evaluation sees."""
    require("schedule_free_adamw")
    trainer = build(tmp_path, "schedule_free_adamw", save_strategy="no")
    trainer.train()
    stepped = trainer.model.lm_head.weight.clone()
    trainer.save_model(str(tmp_path / "saved"))
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved").lm_head.weight
    trainer.optimizer.eval()
    assert torch.equal(saved, trainer.model.lm_head.weight) and not torch.equal(saved, stepped)
