"""benchmarks/gpu.py and its parts on a CPU with small shapes: the first run on a GPU is not their first run."""

import json
import statistics
import sys
import time
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import gpu
import numpy as np
import pytest
import torch
from gpu_parts import attention, decode, exact, fsdp, head, memory, recompile, speed, trainers
from gpu_parts.inputs import (
    ROW_SIZES,
    SHAPES,
    SMALL_SHAPES,
    build_conversations,
    build_model,
    build_rows,
    build_tokenizer,
    count_work,
    iterate_sequences,
)
from gpu_parts.measuring import Setting, count_compilations, record_errors
from scaling import count_flops

from sft_pipeline.utils.constants import IGNORED

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def build_setting(tmp_path: Path, shape: str = "qwen3", **keys) -> Setting:
    return Setting(CPU, shape, small=True, file=tmp_path / "results.json", **keys)


@pytest.mark.parametrize("part", [exact, head, attention, decode, recompile, memory], ids=lambda part: part.__name__)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # by peft
def test_a_part_measures_all_and_saves_it(part, tmp_path):
    results = part.measure(build_setting(tmp_path))
    assert results["measurements"] and not [run for run in results["measurements"] if "error" in run]
    assert json.loads((tmp_path / "results.json").read_text())["measurements"] == results["measurements"]
    for table in part.build_tables(results):
        assert table.rows and all(len(row) == len(table.header) for row in table.rows)
        assert table.format_markdown()


def test_the_values_that_a_cpu_has(tmp_path):
    setting = build_setting(tmp_path, "smollm2")
    assert all(run["is_exact"] for run in exact.measure(setting)["measurements"])
    for run in head.measure(setting)["measurements"]:
        assert max(run["loss_error"], run["states_error"], run["weight_error"]) < 1e-5
    packed = [run for run in attention.measure(setting)["measurements"] if run["name"] != "padded"]
    assert max(run["max_error"] for run in packed) < 1e-5
    assert any(run["computed_tokens"] < run["tokens"] for run in packed if run["name"] == "tree")
    equality = decode.measure(setting)["equality"]
    assert [run["differ_elsewhere"] for run in equality] == [0]


def test_an_error_is_a_measurement_and_the_others_are_made(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("too little\nmemory")

    monkeypatch.setattr(memory, "measure_peak", fail)
    results = memory.measure(build_setting(tmp_path))
    assert [run["error"] for run in results["measurements"]] == ["out of memory: too little"] * len(memory.CASES)
    [table] = memory.build_tables(results)
    assert all("out of memory" in row[1] for row in table.rows)
    result = {}
    with pytest.raises(KeyboardInterrupt), record_errors(result):
        raise KeyboardInterrupt
    assert not result


# The inputs


def test_rows_have_the_lengths_of_real_ones():
    rows = build_rows(2 * len(ROW_SIZES), 500)
    lengths = [len(row["input_ids"]) for row in rows]
    assert sorted(lengths) == sorted(2 * [sum(size) for size in ROW_SIZES]) and 225 < statistics.mean(lengths) < 227
    assert rows == build_rows(2 * len(ROW_SIZES), 500) and rows != build_rows(2 * len(ROW_SIZES), 500, seed=1)
    shared = build_rows(3, 500, shared=40)
    assert len({tuple(row["input_ids"][:40]) for row in shared}) == 1
    for row in shared:
        ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
        assert (labels[:-1][labels[:-1] != IGNORED] == ids[1:][labels[:-1] != IGNORED]).all() and labels[-1] == IGNORED


def test_conversations_share_their_history_without_the_reasoning():
    [row] = build_conversations(1, 10_000, turns=3, seed=5)
    first, second, third = (ids for ids, _ in iterate_sequences([row]))
    work = count_work(SMALL_SHAPES["qwen3"], [[row]], share=True)
    assert work["tokens"] == len(first + second + third) and work["computed_tokens"] == row["computed_tokens"]
    assert row["computed_tokens"] < 0.9 * work["tokens"]
    targets = [sum(label != IGNORED for label in labels) for _, labels in iterate_sequences([row])]
    assert len(first) - targets[0] < len(second) - targets[1] < len(third) - targets[2]


def test_work_is_counted_by_the_formulas_of_scaling():
    shape, length, count = SMALL_SHAPES["smollm2"], 20, 3
    rows = [{"input_ids": [*range(i * 50, i * 50 + length)], "labels": [IGNORED] * 15 + [1] * 5} for i in range(count)]
    work = count_work(shape, [rows], share=True)
    assert work["tokens"] == work["computed_tokens"] == count * length and work["targets"] == 5 * count
    assert work["flops"] == pytest.approx(count * length * count_flops(shape, length, 5 / length))


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_are_those_of_their_names(name):
    parameters = {"smollm2": 134_515_008, "qwen3": 596_049_920, "llama8": 2_795_573_248}
    model = build_model(SHAPES[name], torch.device("meta"))
    assert model.num_parameters() == SHAPES[name].parameters == parameters[name]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # by torch
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_layers_need_as_many_compilations_as_are_allowed(tmp_path, monkeypatch):
    """With FlexAttention's two, which a CPU does not take; in 16 bits, as the check before the first step runs then."""
    build_layouts = recompile.build_layouts
    monkeypatch.setattr(recompile, "build_layouts", lambda *args: build_layouts(*args)[: 2 * recompile.BATCH_ROWS])
    result = recompile.measure_run(build_setting(tmp_path), {"torch_compile_backend": "eager", "bf16": True})
    assert result["compilations_by_step"] == [recompile.MAX_COMPILATIONS - 2] * 2


# Trainers that are compared


@pytest.mark.parametrize("data", ["rows", "conversations"])
def test_the_trainers_train_the_same_loss(data, tmp_path):
    names = ["ours", "ours-unshared", "trainer"]
    runs = {name: trainers.train(name, build_setting(tmp_path), data, 100, steps=2, warm_up=1) for name in names}
    losses = [run["loss"] for run in runs.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert all(run["steps"] == 2 and run["tokens_per_second"] > 0 for run in runs.values())
    if data == "conversations":
        assert runs["ours"]["computed_tokens"] < runs["trainer"]["computed_tokens"]


@pytest.mark.skipif(not find_spec("trl"), reason="trl is not installed")
def test_trl_trains_on_the_same_ids(tmp_path):
    ours, theirs = (trainers.train(name, build_setting(tmp_path), "rows", 100, 3, 1) for name in ("ours", "trl"))
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=0.02), "in packs of an order of its own"


def test_the_others_collate_and_log_as_this_project_does(tmp_path):
    shape, keys = SMALL_SHAPES["qwen3"], ("dataloader_num_workers", "logging_nan_inf_filter", "max_grad_norm", "optim")
    settings = []
    for name in ("ours", "trainer", *["trl"] * bool(find_spec("trl"))):
        rows, model = build_rows(4, shape.vocabulary, scale=0.05), build_model(shape, CPU)
        trainer = trainers.build_trainer(name, model, rows, 2, 40, str(tmp_path / name), "cpu")
        settings.append([getattr(trainer.args, key) for key in keys])
    assert settings == settings[:1] * len(settings)


STUB = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["tokens"] == 1:
        print("not a result\\n", end="")
    if request["tokens"] == 2:
        import os, time
        print("no memory is left", file=sys.stderr, flush=True)
        os.close(1)
        time.sleep(1)  # its standard input still takes requests
        os._exit(1)
    if request["tokens"] == 3:
        import time; time.sleep(60)
    numbers = dict.fromkeys(("flops_per_second", "step_seconds", "peak_gib", "loss"), 1.0)
    print("RESULT " + json.dumps({"tokens_per_second": 10.0 * len(sys.argv[1]), **numbers}), flush=True)
"""


def test_workers_are_asked_in_turns_and_their_ends_are_results(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(speed, "SCRIPT", tmp_path / "stub.py")
    monkeypatch.setattr(speed, "choose_names", lambda setting: (["ours", "trainer"], ["trl: not installed"]))
    monkeypatch.setattr(speed, "SMALL_CASES", (("rows", 20), ("rows", 40)))
    results = speed.measure(build_setting(tmp_path))
    names = [(run["tokens"], run["round"], run["name"]) for run in results["measurements"]]
    assert names == [(n, r, name) for n in (1, 2) for r in (1, 2) for name in ("ours", "trainer")]
    errors = {run["error"] for run in results["measurements"] if run["tokens"] == 2}
    assert errors == {"the process ended: no memory is left"}
    first, second = speed.build_tables(results)
    assert [row[-1] for row in first.rows] == ["0.57x", "1.00x"] and second.rows[0][1] in errors


def test_a_worker_that_takes_too_long_is_left(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(speed, "SCRIPT", tmp_path / "stub.py")
    monkeypatch.setattr(speed, "choose_names", lambda setting: (["ours", "trainer"], []))
    monkeypatch.setattr(speed, "SMALL_CASES", (("rows", 60),))
    monkeypatch.setattr(speed, "SHORTEST", 0.5)
    results = speed.measure(build_setting(tmp_path, seconds=1.0))
    assert [run["error"] for run in results["measurements"]] == ["not finished in time"]
    assert results["unfinished"] == "from rows, 3 tokens, round 1, trainer on"


def test_what_cannot_run_is_said(tmp_path, monkeypatch):
    names, missing = speed.choose_names(build_setting(tmp_path))
    assert names[:2] == ["ours", "trainer"] and missing[0] == "those with Liger, which needs a GPU"
    monkeypatch.setattr(speed, "find_spec", lambda name: None if name == "trl" else name)
    names, missing = speed.choose_names(Setting(torch.device("cuda")))
    assert names == ["ours", "ours-compiled", "trainer", "trainer-liger"]
    assert missing == [f"{name}: trl is not installed" for name in ("trl-liger", "trl-liger-flex")]


# Several processes


RANKS = """
import json, os, sys
request = json.loads(sys.argv[1])
rank = int(os.environ.get("RANK", 0))
if request["keys"] and rank:
    sys.exit("this process is lost")
losses = [2.0, 1.0 + 1e-5 * (request["processes"] - 1)]
assert len({"RANK", "LOCAL_RANK", "MASTER_PORT"} & set(os.environ)) == (3 if request["processes"] > 1 else 0)
print(json.dumps({"losses": losses, "step_seconds": 1.0, "peak_gib": 1.0 + rank}))
"""


def test_processes_are_compared_and_their_errors_are_results(tmp_path, monkeypatch):
    """The real ones are in `test_all_runs_whole`."""
    (tmp_path / "ranks.py").write_text(RANKS)
    monkeypatch.setattr(fsdp, "SCRIPT", tmp_path / "ranks.py")
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    results = fsdp.measure(build_setting(tmp_path))
    one, two, sharded = results["measurements"]
    assert two["peak_gib"] == [1.0, 2.0] and two["backend"] == "gloo" and one["backend"] is None
    assert two["is_equal"] and two["loss_error"] == pytest.approx(1e-5)
    assert sharded["error"] == "status 1: this process is lost"
    [table] = fsdp.build_tables(results)
    assert [row[-1] for row in table.rows[:2]] == ["", "1.0e-05"] and table.rows[2][1] == sharded["error"]


def test_one_process_trains(tmp_path):
    build_model(SMALL_SHAPES["qwen3"], CPU).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    request = {"shape": "qwen3", "small": True, "device": "cpu", "model": str(tmp_path / "model"), "keys": {}}
    run = fsdp.train(request | {"folder": str(tmp_path / "run"), "processes": 1, "backend": None})
    assert len(run["losses"]) == fsdp.STEPS and run["step_seconds"] > 0


# `all`


def build_args(**keys) -> Namespace:
    keys = {"seconds": 100.0, "rounds": 1, "peak": 989, "device": "cpu", "small": True, "output": None, **keys}
    return Namespace(**keys)


def test_all_goes_on_where_it_stopped(tmp_path, monkeypatch):
    calls = []

    def run(part, shape, seconds, args):
        calls.append((part, shape))
        if len(calls) == 2:
            return {"ended": "killed"}
        return {"shape": shape, "measurements": [{"data": "x", "precision": "bf16", "name": "y", "error": "z"}]}

    monkeypatch.setattr(gpu, "PLAN", (("exact", "smollm2", 90), ("exact", "qwen3", 60), ("exact", "llama8", 60)))
    monkeypatch.setattr(gpu, "run_in_process", run)
    args = build_args(output=tmp_path / "results" / "all")
    gpu.run_all(args)
    assert calls == [("exact", name) for name in ("smollm2", "qwen3", "llama8")]
    gpu.run_all(args)
    assert calls[3:] == [("exact", "qwen3")], "only the one without a measurement"
    text = (tmp_path / "results" / "all.md").read_text()
    assert text.count("## exact") == 3 and "y | z |" in text
    gpu.run_all(build_args(seconds=10.0))
    assert len(calls) == 4, "no part is started that could not end"


def test_a_part_that_ends_keeps_what_it_has(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    script = "import json, sys, time\nfile = sys.argv[sys.argv.index('--results') + 1]\n"
    script += "json.dump({'measurements': [1]}, open(file, 'w'))\n"
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "gpu.py").write_text(script + "sys.exit('it broke')")
    assert gpu.run_in_process("exact", "qwen3", 60, build_args()) == {"measurements": [1], "ended": "it broke"}
    (tmp_path / "benchmarks" / "gpu.py").write_text(script + "time.sleep(60)")
    start = time.monotonic()
    results = gpu.run_in_process("exact", "qwen3", 1.5, build_args())
    assert results["ended"] == "ended after 2 s" and time.monotonic() - start < 20


def test_shapes_of_a_gpu_are_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "exact", "--device", "cpu"])
    with pytest.raises(SystemExit, match="there is no CUDA device; add --small"):
        gpu.main()


@pytest.mark.real
def test_all_runs_whole(tmp_path, monkeypatch):
    """Those parts that start processes; the others are measured above."""
    monkeypatch.setattr(gpu, "PLAN", tuple((part, "smollm2", 300) for part in ("head", "speed", "fsdp")))
    results = gpu.run_all(build_args(seconds=900.0, output=tmp_path / "all"))
    assert list(results) == ["head smollm2", "speed smollm2", "fsdp smollm2"]
    for name, part in results.items():
        assert "ended" not in part and not [run for run in part["measurements"] if "error" in run], (name, part)


def test_compilations_are_counted():
    before = count_compilations()
    torch._dynamo.reset()
    double = torch.compile(lambda tensor: 2 * tensor, backend="eager")
    double(torch.ones(3))
    double(torch.ones(3))
    assert count_compilations() == before + 1
