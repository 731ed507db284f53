"""What the tests share: caches in a folder of the session's own, no hub, a tiny tokenizer and a tiny model."""

import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports datasets, transformers or trackio: all of them read these once.
CACHE = tempfile.mkdtemp(prefix="sft_pipeline_tests_")
os.environ["SFT_PIPELINE_CACHE"] = str(Path(CACHE) / "sft_pipeline")
os.environ["HF_DATASETS_CACHE"] = str(Path(CACHE) / "datasets")
os.environ["TRACKIO_DIR"] = str(Path(CACHE) / "trackio")
os.environ["HF_HUB_OFFLINE"] = "1"
# The tokenizer's threads would warn where datasets forks.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import yaml
from hypothesis import HealthCheck, settings
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

pytest.register_assert_rewrite("support")

from support.conversations import QWEN3
from support.tiny import build_model, build_tokenizer

from sft_pipeline.reports import svg

# The files that take longest start first, so that the processes of `./launch.sh test` end together.
SLOW_FILES = (
    "test_api_page test_slurm test_launch "  # of the tests marked `real`
    "test_arguments test_new_tokens test_sharded_loading test_lora test_fsdp test_optimizers test_quantization "
    "test_engine test_compiled_layers test_moved_base test_streaming test_precision test_gpu_benchmark "
    "test_fault_tolerance test_memory test_final_tasks test_checkpointing test_held_out_sets test_console test_export "
    "test_train test_hf_metrics"
)
can_draw = svg.can_draw

# Speed is not tested, and a machine that does other work is slow.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(SLOW_FILES.split())}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def pytest_collection_finish() -> None:
    """Take the libraries out of garbage collection: every run calls it, and would look through millions of objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def restore_log_level() -> Iterator[None]:
    """A Trainer gives transformers the level of its `log_level`, for the whole process."""
    level = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(level)


@pytest.fixture(scope="session", autouse=True)
def leave_out_charts() -> Iterator[None]:
    """The charts of a run's report take longer than its steps: they are drawn where a test takes `draw_charts`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svg, "can_draw", lambda: False)
        yield


@pytest.fixture(scope="module")
def draw_charts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svg, "can_draw", can_draw)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Shared: a test that changes its tokenizer takes `make_tokenizer`."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """make_tokenizer(chat_template=...) is a tokenizer of the test's own."""
    return build_tokenizer


@pytest.fixture
def tiny_model(tokenizer) -> LlamaForCausalLM:
    return build_model(len(tokenizer))


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    """The tiny model and its tokenizer as save_pretrained writes them; read only."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_config(model_folder) -> Callable[..., Path]:
    """write_config(folder, rows=8, key=value, ...) writes so many rows of growing length and a config that trains the
    tiny model on them on the CPU, without bars, trackers and checkable instructions; returns the config's path."""

    def write(folder: Path, rows: int, **keys: object) -> Path:
        texts = [{"instruction": f"Say {n}.", "output": "text " * n} for n in range(1, rows + 1)]
        (folder / "rows.json").write_text(json.dumps(texts))
        own: dict[str, object] = {"model_name_or_path": str(model_folder), "train_data": str(folder / "rows.json")}
        own |= {"template": "role", "per_device_train_batch_size": 2, "num_proc": 1}
        own |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "num_instructions": 0}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(own | keys))
        return folder / "tiny.yaml"

    return write


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of encoded rows, for the test alone."""
    monkeypatch.setenv("SFT_PIPELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def few_instructions() -> Iterator[None]:
    """Models are asked six of the checkable instructions, for the sake of time."""
    from sft_pipeline.commands import evaluate
    from sft_pipeline.evaluation import comparison, model_results
    from sft_pipeline.evaluation.metrics import instruction_following

    few = instruction_following.load_instructions()[:6]
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluate, comparison, model_results):
            patch.setattr(module, "load_instructions", lambda: few)
        yield


@pytest.fixture(scope="session")
def qwen3():
    if not (QWEN3 / "tokenizer.json").is_file():
        pytest.skip(f"no Qwen3 tokenizer in {QWEN3}; set QWEN3_TOKENIZER to its folder")
    return AutoTokenizer.from_pretrained(QWEN3)
