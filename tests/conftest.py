"""What the tests share: caches in a folder of the session's own, no hub, a tiny tokenizer and a tiny model."""

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
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Merges come from here; a Chinese character still takes two or three tokens.
CORPUS = ["the answer to the question is in the text", "user assistant system", "#SYSTEM: #USER: #ASSISTANT:"] * 4


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


def build_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens: <|endoftext|> = 0 pads, <|im_start|> = 1, <|im_end|> = 2 is the eos."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=CONTROL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=4096,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def build_model(vocab_size: int) -> LlamaForCausalLM:
    """Two random layers of width 32, the same at every call."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


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
    tiny model on them on the CPU, without bars and trackers; returns the config's path."""

    def write(folder: Path, rows: int, **keys: object) -> Path:
        texts = [{"instruction": f"Say {n}.", "output": "text " * n} for n in range(1, rows + 1)]
        (folder / "rows.json").write_text(json.dumps(texts))
        own: dict[str, object] = {"model_name_or_path": str(model_folder), "train_data": str(folder / "rows.json")}
        own |= {"template": "role", "per_device_train_batch_size": 2, "num_proc": 1}
        own |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
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
    from sft_pipeline import evaluate
    from sft_pipeline.evaluation import comparison, instructions, record

    few = instructions.load_instructions()[:6]
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluate, comparison, record):
            patch.setattr(module, "load_instructions", lambda: few)
        yield
