"""`torch_compile`: which layers are compiled, by what, and that a run is the same."""

from dataclasses import replace

import pytest
from support.training_runs import run_train

from sft_pipeline.config import SFTConfig, build_config_record, parse_config
from sft_pipeline.training import model_setup
from sft_pipeline.training.sft_trainer import SFTTrainer

pytestmark = [  # by torch
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture
def config(write_config, tmp_path):
    keys = {"max_steps": 2, "logging_steps": 1, "held_out": 2, "num_answers": 1, "num_instructions": 0}
    return write_config(tmp_path, rows=10, max_new_tokens=2, **keys)


def losses(results: dict) -> list[float]:
    return [entry[key] for entry in results["loss_curve"] for key in ("loss", "eval_loss") if key in entry]


def test_a_run_with_compiled_layers_is_the_run_without(config, tmp_path, monkeypatch):
    """By the backend that runs the traced operations as they are; benchmarks/gpu.py has inductor's."""
    models = []
    compile_layers = model_setup.compile_layers
    monkeypatch.setattr(
        model_setup,
        "compile_layers",
        lambda *args, **options: (models.append(options), compile_layers(*args, **options))[1],
    )
    plain = run_train(config, "--output_dir", str(tmp_path / "plain"))
    compiled = run_train(config, "--output_dir", str(tmp_path / "compiled"), "--torch_compile_backend", "eager")
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5) and len(losses(plain)) == 4
    assert models == [{"backend": "eager", "mode": None}]
    assert compiled["config"]["torch_compile"] is True and compiled["config"]["torch_compile_backend"] == "eager"


def test_trainer_and_accelerate_compile_nothing(config, tmp_path):
    trainer = SFTTrainer(args=parse_config(str(config), ["--torch_compile", "--output_dir", str(tmp_path)]))
    assert trainer.accelerator.state.dynamo_plugin.backend.value == "NO" and not trainer.args.torch_compile
    assert "forward" not in vars(trainer.model.model.layers[0]), "not fused"
    assert trainer.config_record["torch_compile"] is True


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ({"torch_compile": True}, {"backend": "inductor", "mode": None}),
        ({"torch_compile_backend": "aot_eager"}, {"backend": "aot_eager", "mode": None}),
        ({"torch_compile_mode": "max-autotune-no-cudagraphs"}, {"mode": "max-autotune-no-cudagraphs"}),
    ],
)
def test_the_options_are_those_of_torch_compile(keys, options, config, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(model_setup, "compile_layers", lambda model, **options: calls.append(options) or 2)
    words = [f"--{key}={value}" for key, value in keys.items()]
    SFTTrainer(args=parse_config(str(config), [*words, "--output_dir", str(tmp_path)]))
    assert calls == [{"backend": "inductor", "mode": None} | options]
    record = build_config_record(SFTConfig(str(tmp_path), use_cpu=True, **keys))
    assert record["torch_compile"] is True and record.items() >= keys.items()


def test_arguments_serve_for_a_second_trainer(config, tmp_path, monkeypatch):
    """What follows from rows and model is set in the trainer's own copy."""
    calls = []
    monkeypatch.setattr(model_setup, "compile_layers", lambda model, **options: calls.append(options) or 2)
    args = parse_config(str(config), ["--torch_compile", "--eval_strategy=steps", "--output_dir", str(tmp_path)])
    given = vars(args).copy()
    rows = [{"instruction": "Say one.", "output": "one"}] * 4
    without = SFTTrainer(args=replace(args, held_out=0.0), train_dataset=rows)
    first, second = SFTTrainer(args=args), SFTTrainer(args=args)
    assert len(calls) == 3 and vars(args) == given
    assert without.args.eval_strategy == "no" and first.args.eval_strategy == second.args.eval_strategy == "steps"
