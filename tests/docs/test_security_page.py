"""The promises of docs/security.md, which names the test of each; some are in the files of other folders."""

import ast
import io
import json
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from jinja2.exceptions import SecurityError
from rich.console import Console
from support.conversations import build_conversation, cut_conversation, render_row
from support.fuzz import find_tokenizers
from support.hostile import ESCAPES, SEEN, Malice, refusal, set_trap
from support.tiny import CHATML
from support.trainers import make_trainer
from transformers import AutoTokenizer

from sft_pipeline import cli
from sft_pipeline.arguments import SFTArguments, SourceEntry
from sft_pipeline.commands.chat import AnswerStreamer, ChatSession, chat
from sft_pipeline.commands.generate import _encode_prompt
from sft_pipeline.commands.resumable_jsonl import AnswerFile
from sft_pipeline.config import build_config_record, parse_config
from sft_pipeline.data import preview
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.messages import add_system_prompt
from sft_pipeline.data.preview import format_row_json
from sft_pipeline.data.prompts import Prompt, load_prompts
from sft_pipeline.data.sources import load_conversations
from sft_pipeline.data.streamed_sources import open_stream
from sft_pipeline.data.tokenizer_export import build_saved_chat_template
from sft_pipeline.evaluation.judge import Judge
from sft_pipeline.evaluation.prompt_set import add_examples
from sft_pipeline.model.loading import load_model, load_tokenizer
from sft_pipeline.model.lora import add_adapters
from sft_pipeline.model.peft_config import build_peft_config
from sft_pipeline.reports.console_summary import print_results
from sft_pipeline.runs.output_dir import TEMPLATE_FILE
from sft_pipeline.runs.trained_model import load_template
from sft_pipeline.utils.errors import SFTError

PACKAGE = Path(__file__).parents[2] / "sft_pipeline"
SECRET = "s3cret-7f81d0"


@pytest.fixture
def trap(tmp_path) -> Malice:
    """Goes off where it is unpickled; the test asserts at its end that it did not."""
    with set_trap(tmp_path / "it-ran") as trap:
        yield trap


# ---- no code from a model


def calls(name: str) -> list[tuple[str, ast.Call]]:
    """All calls of a function or method of this name in the package, each with its file."""
    return [pair for pair in all_calls() if getattr(pair[1].func, "attr", getattr(pair[1].func, "id", None)) == name]


@cache
def all_calls() -> list[tuple[str, ast.Call]]:
    trees = [(path.name, ast.parse(path.read_text(encoding="utf-8"))) for path in PACKAGE.rglob("*.py")]
    return [(name, node) for name, tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keywords(call: ast.Call) -> dict[str, str]:
    return {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg}


def test_every_call_that_loads_is_a_safe_one():
    """The behaviour is tested below; this finds a call that is added later."""
    for file, call in calls("from_pretrained"):
        arguments = keywords(call)
        assert arguments.get("trust_remote_code", "False") in ("False", "trust_remote_code"), file
        if ast.unparse(call.func).startswith("AutoModel"):
            assert arguments.get("use_safetensors") == "True" or "gguf_file" in arguments, file
    for file, call in calls("load_dataset"):
        assert keywords(call).keys() <= {"split", "revision", "data_files"}, file
    for file, call in [*calls("load"), *calls("safe_load")]:
        source = ast.unparse(call)
        # docs/security.md says what torch's own reader of sharded checkpoints unpickles.
        # Tasks of the harness (its TaskManager is `manager`) may run code, as the page says.
        safe = source.startswith(("yaml.safe_load(", "_MetadataUnpickler(", "dcp.load(", "manager.load("))
        assert safe or "weights_only=True" in source or "_Loader" in source, file
    for forbidden in ("eval", "exec", "compile_restricted", "system", "popen", "read_pickle", "load_from_disk"):
        hits = [hit for hit in calls(forbidden) if not ast.unparse(hit[1].func).endswith((".eval", "re.compile"))]
        assert not hits, forbidden
    assert len(calls("from_pretrained")) >= 4 and len(calls("load_dataset")) == 1


def brings_code(folder: Path, trap: Path, name: str) -> None:
    """The folder's config says that a class of its own is to be imported."""
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    config = json.loads((folder / name).read_text())
    kind = "AutoTokenizer" if "token" in name else "AutoModelForCausalLM"
    config["auto_map"] = {"AutoConfig": "mine.Mine", kind: ["mine.Mine", None] if "token" in name else "mine.Mine"}
    config["tokenizer_class" if "token" in name else "model_type"] = "Mine"
    (folder / name).write_text(json.dumps(config))


@pytest.mark.parametrize(("load", "name"), [(load_model, "config.json"), (load_tokenizer, "tokenizer_config.json")])
def test_code_that_a_model_brings_is_not_run_unless_asked_for(load, name, model_folder, tmp_path, trap, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(model_folder, tmp_path / "copied"))
    brings_code(folder, trap.file, name)
    try:
        load(str(folder))
    except SFTError as error:
        assert len(str(error).splitlines()) == 1 and "trust_remote_code" in str(error)
    assert parse_config(None, ["--model_name_or_path=m", "--train_data=x", "--use_cpu=true"]).trust_remote_code is False


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("adapters", [False, True])
def test_weights_that_are_pickles_are_refused_with_the_way_to_convert_them(adapters, model_folder, tmp_path, trap):
    folder = Path(shutil.copytree(model_folder, tmp_path / "copied"))
    if adapters:
        pytest.importorskip("peft")
        model = add_adapters(load_model(str(folder)), build_peft_config(SFTArguments(lora_rank=2, lora_alpha=4)))
        folder = tmp_path / "adapters"
        model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    torch.save(trap, folder / ("adapter_model.bin" if adapters else "pytorch_model.bin"))
    library = "AutoPeftModelForCausalLM as M" if adapters else "AutoModelForCausalLM as M"
    refusal(lambda: load_model(str(folder)), str(folder), "pickles", "convert them: python -c", library)


# ---- secrets


def test_nothing_that_a_run_leaves_is_a_pickle_of_its_arguments_or_holds_a_secret(tmp_path, monkeypatch, caplog, capfd):
    """Not in a checkpoint, the saved model, logs or the data sent to trackers; nor any environment variable."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "ANYTHING_ELSE"):
        monkeypatch.setenv(name, SECRET)
    logs = []
    monkeypatch.setattr("transformers.Trainer.log", lambda self, entry, *args: logs.append(entry))
    keys = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "hub_token": SECRET}
    trainer = make_trainer(tmp_path, **keys)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) > 10 and not any(path.name == "training_args.bin" for path in left)
    assert not [path.name for path in left if SECRET.encode() in path.read_bytes()]
    trackers = [
        trainer.args.to_sanitized_dict(),
        trainer.args.to_dict(),
        str(trainer.args),
        trainer.model.config.to_dict(),
    ]
    assert SECRET not in repr([logs, trackers, caplog.text, *capfd.readouterr()])


def test_a_config_and_its_record_hold_no_token(tmp_path):
    needed = ["--model_name_or_path=m", "--train_data=x", "--use_cpu=true"]
    message = refusal(
        lambda: parse_config(None, [*needed, f"--hub_token={SECRET}"]), "set HF_TOKEN or call `hf auth login`"
    )
    (tmp_path / "mine.yaml").write_text(f"hub_token: {SECRET}\n")
    assert SECRET not in message + refusal(lambda: parse_config(str(tmp_path / "mine.yaml"), needed), "hub_token")
    args = parse_config(None, needed)
    args.hub_token = SECRET
    assert "hub_token" not in build_config_record(args) and SECRET not in repr(build_config_record(args))


def test_the_library_pushes_no_pickle_on_the_way():
    needed = ["--model_name_or_path=m", "--train_data=x", "--use_cpu=true", "--push_to_hub=true"]
    refusal(lambda: parse_config(None, needed), "push_to_hub needs hub_strategy: end, it is every_save")
    assert parse_config(None, [*needed, "--hub_strategy=end"]).push_to_hub


def test_a_password_in_a_url_is_not_repeated():
    judge = Judge(f"https://me:{SECRET}@host.test/v1", "m", key="k3y")
    message = str(SFTError(judge._format_problem("HTTP 401 k3y")))
    assert "https://***@host.test/v1" in message and "k3y" not in message + repr(judge)
    assert SECRET not in refusal(
        lambda: load_conversations(f"https://me:{SECRET}@host.test/rows.json"), "https://***@host.test/rows"
    )


# ---- paths


def test_a_link_out_of_a_data_folder_is_refused(tmp_path):
    rows = [{"prompt": "Hi", "completion": "Yes?"}]
    private = tmp_path / "private.jsonl"
    private.write_text(json.dumps({"prompt": "my", "completion": SECRET}))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "good.jsonl").write_text(json.dumps(rows[0]))
    (folder / "again.jsonl").symlink_to("good.jsonl")
    assert len(load_conversations(str(folder))) == 2  # within the folder
    (tmp_path / "link").symlink_to(folder)
    assert len(load_conversations(str(tmp_path / "link"))) == 2  # the user's own
    for target in (private, "../private.jsonl", "/nowhere/at/all.jsonl"):
        (folder / "zz.jsonl").unlink(missing_ok=True)
        (folder / "zz.jsonl").symlink_to(target)
        for load in (load_conversations, load_prompts, open_source):
            refusal(
                lambda load=load: load(str(folder)),
                "zz.jsonl is a symbolic link that leaves the folder",
                "name it in train_data",
            )
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    [data] = (tmp_path / "saved").glob("*.arrow")
    data.rename(tmp_path / "elsewhere.arrow")
    data.symlink_to(tmp_path / "elsewhere.arrow")
    for load in (load_conversations, open_source):
        refusal(
            lambda load=load: load(str(tmp_path / "saved")), f"{data.name} is a symbolic link that leaves the folder"
        )


def open_source(name: str) -> list:
    """Read a source as `streaming: true` does."""
    return list(open_stream(SourceEntry(name)))


def test_an_arrow_file_that_points_out_of_itself_is_refused(tmp_path):
    """pyarrow would read whatever lies at the place in memory."""
    table = pa.table({"prompt": ["Hi there"], "completion": ["Yes?"]})
    file = tmp_path / "rows.arrow"
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)
    assert len(load_conversations(str(file))) == 1
    offsets = (0).to_bytes(4, "little") + (8).to_bytes(4, "little")
    content = file.read_bytes()
    at = content.rindex(offsets, 0, content.index(b"Hi there"))
    file.write_bytes(content[: at + 4] + (1 << 30).to_bytes(4, "little") + content[at + 8 :])
    for load in (load_conversations, open_source):
        refusal(lambda load=load: load(str(file)), "rows.arrow: not a readable Arrow file")


# ---- templates, YAML


ESCAPING = ["().__class__.__mro__[1].__subclasses__()", "messages.append(1)", "messages.__init__.__globals__"]


@pytest.mark.parametrize("attempt", ESCAPING)
def test_a_chat_template_is_sandboxed(attempt, make_tokenizer):
    own = make_tokenizer(CHATML + "{{ " + attempt + " }}")
    with pytest.raises(SFTError, match="the chat template cannot render the conversation") as caught:
        build_template("chat", own)
    assert isinstance(caught.value.__cause__, SecurityError) or "undefined" in str(caught.value).lower()


@pytest.mark.parametrize(
    "text", ["{{ 1 / 0 }}", "{{ messages[7].content }}", "{{ raise_exception('no system') }}", "{% if %}"]
)
def test_a_chat_template_that_fails_is_one_line(text, make_tokenizer):
    tokenizer = make_tokenizer(CHATML + text)
    refusal(lambda: build_template("chat", tokenizer), "the chat template cannot render the conversation")


@pytest.mark.parametrize("system", ["{{ 7*7 }} {% raw %} %} \" ' \\ \n", "\\u007b\\x7b{#", "冬瓜🙂\u2028"])
def test_a_system_prompt_is_text_in_the_saved_template(system, tokenizer):
    conversation = build_conversation(["Hi"])
    saved = build_saved_chat_template(build_template("chat", tokenizer), system)
    messages, expected = (row["messages"] for row in (conversation, add_system_prompt(conversation, system)))
    render = tokenizer.apply_chat_template
    assert render(messages, chat_template=saved, tokenize=False) == render(expected, tokenize=False)


@pytest.mark.parametrize("value", ["{{ 7*7 }} {% raw %} %} \" ' \\ \n", {"%}": ["{{ 1 }}"]}, "\\u007b\\x7b{#"])
def test_a_template_argument_is_a_value_in_the_saved_template(value, make_tokenizer):
    template = build_template("chat", make_tokenizer("{{ x | tojson }}" + CHATML), None, {"x": value})
    saved = build_saved_chat_template(template, None)
    text = template.tokenizer.apply_chat_template(
        build_conversation(["q"])["messages"], chat_template=saved, tokenize=False
    )
    assert json.loads(text.partition("<|im_start|>")[0]) == value


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"]
)
def test_yaml_makes_no_objects(tag, tmp_path, trap):
    (tmp_path / "mine.yaml").write_text(f"model_name_or_path: {tag} [{trap.file}]\n")
    refusal(lambda: parse_config(str(tmp_path / "mine.yaml"), []), "mine.yaml: not readable as YAML", "python/")


# ---- control tokens


@pytest.fixture(scope="module", params=["tiny", *(path.name for path in find_tokenizers())])
def real_tokenizer(request, tokenizer):
    return next((AutoTokenizer.from_pretrained(p) for p in find_tokenizers() if p.name == request.param), tokenizer)


@pytest.mark.parametrize("name", ["role", "chat"])
def test_no_text_becomes_a_control_token(name, real_tokenizer, monkeypatch):
    """Every special token of the tokenizer, in every role, by every way to a prompt: training, `generate`, `chat` and
    its /system, few-shot examples, held-out rows. The ids hold as many control tokens as those of harmless text."""
    template = build_template(name, real_tokenizer)
    control = {i: token.content for i, token in real_tokenizer.added_tokens_decoder.items() if token.special}
    assert len(control) >= 3
    for spelled in (*control.values(), "".join(control.values())):
        hostile, harmless = (ways(template, text) for text in (f"a{spelled}b", "a b"))
        for way, ids in hostile.items():
            expected = [i for i in harmless[way] if i in control]
            assert [i for i in ids if i in control] == expected, (way, spelled)
            assert spelled in real_tokenizer.decode(ids), (way, spelled)


def ways(template, text: str) -> dict[str, list[int]]:
    """All the ways from a text to the input ids of a model."""
    row = build_conversation([text, text], text)
    prompt, line = cut_conversation(row, 2), build_conversation([text])
    session = ChatSession(SimpleNamespace(config=NoLimit), template, None, 4, [])
    session.handle_line(f"/system {text}")
    session.messages = build_conversation([text] * 3)["messages"]
    return {
        "train": render_row(template, row, "last")[0],
        "held out": template.encode_prompt(prompt),
        "few-shot": template.encode_prompt(add_examples(prompt, [row["messages"][1:]])),
        "generate": _encode_prompt(Prompt("a line", line), template, text).ids,
        "chat": session._encode_prompt(),
    }


class NoLimit:
    @staticmethod
    def get_text_config():
        return object()


# ---- the terminal


def shown(print_it) -> str:
    file = io.StringIO()
    print_it(Console(file=file, force_terminal=True, color_system=None, width=200))
    return file.getvalue()


def test_rows_and_answers_steer_no_terminal(tokenizer, capsys):
    ids = tokenizer(f"say {ESCAPES} now").input_ids
    row = {"input_ids": ids, "labels": [*ids[1:], -100]}
    assert json.loads(format_row_json(row, tokenizer))["text"] == f"say {ESCAPES} now"
    assert not set(format_row_json(row, tokenizer)) & set(ESCAPES[0] + "\x9b\x07\r")
    outputs = [shown(lambda console: preview.print_row(row, tokenizer, f"a{ESCAPES}.jsonl row 0", console))]
    outputs += [shown(lambda console: preview.print_positions(row, tokenizer, console))]
    answer = {
        "prompt": ESCAPES,
        "before": ESCAPES,
        "after": ESCAPES,
        "stopped": True,
        "stopped_before": False,
        "error": None,
    }
    results = {"answers": [answer, {**answer, "error": ESCAPES}], "before_and_after": {}, "steps": 1, "seconds": 1.0}
    results |= {"seconds_by_part": {}, "tasks": {}, "tokens_per_second": 1.0, "peak_memory_gib": 1.0}
    outputs += [shown(lambda console: print_results(results, "out[/x]", console))]
    assert "saved in out[/x]" in outputs[2] and outputs[2].count(SEEN) == 6 and SEEN in outputs[0]
    streamer = AnswerStreamer(tokenizer)
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    outputs += [capsys.readouterr().out]
    assert f"say {SEEN} now" in outputs[3]
    for text in outputs:
        assert not set(text) & {"\x1b", "\x9b", "\x07", "\r"}


def test_the_commands_errors_are_one_visible_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path / "no\x1b[2J\nrun")])
    error_output = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and error_output.count("\n") == 1
        and "no\u241b[2J\u240arun: no such folder" in error_output
    )


# ---- other findings


def test_text_that_no_tokenizer_takes_is_refused(tokenizer):
    for name in ("role", "chat"):
        template = build_template(name, tokenizer)
        refusal(lambda t=template: t.encode_prompt(build_conversation(["a\udcff"])), "lone surrogate")


def test_standard_input_that_is_not_utf8_is_one_line(model_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    refusal(lambda: chat(str(model_folder), 2), "standard input is not UTF-8")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"template": "x", "system_prompt": null}', '{"template": []}'])
def test_a_template_record_that_is_no_runs_is_one_line(text, model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "copied"))
    (folder / TEMPLATE_FILE).write_text(text)
    refusal(lambda: load_template(str(folder)), TEMPLATE_FILE, "not as a run writes it")


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow"])
def test_columns_of_one_name_are_refused_not_lost(kind, tmp_path):
    file, twins = (
        tmp_path / f"rows.{kind}",
        pa.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "completion"]),
    )
    if kind == "csv":
        file.write_text("prompt,completion,completion\na,b,c\n")
    elif kind == "parquet":
        pa.parquet.write_table(twins, file)
    else:
        with pa.ipc.new_file(str(file), twins.schema) as writer:
            writer.write_table(twins)
    refusal(lambda: load_conversations(str(file)), f"rows.{kind}: duplicate column 'completion'")


def test_a_row_that_spells_a_stand_in_keeps_its_text(tokenizer):
    template = build_template("chat", tokenizer)
    text = "\ue000sft0\ue001 \ue000 <|im_end|> \ue000sft3\ue001"
    assert text in tokenizer.decode(template.encode_prompt(build_conversation([text])))


@pytest.mark.parametrize(
    "text", ["a: 2020-13-45", "a: !!timestamp x", "a: !!int ''", "a: !!bool maybe", "a: " + "[" * 400]
)
def test_yaml_that_is_no_value_is_one_line(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    refusal(lambda: parse_config(str(tmp_path / "mine.yaml"), []), "not readable as YAML")


def test_a_role_of_any_depth_is_one_short_line():
    deep: list = []
    for _ in range(900):
        deep = [deep]
    refusal(lambda: load_prompts_row({"messages": [{"role": deep, "content": "x"}]}), "unknown role")


def load_prompts_row(row):
    from sft_pipeline.data.formats import FORMATS, convert_row

    return convert_row(row, FORMATS["messages"])


@pytest.mark.parametrize("line", ["[0, 0, 5]", '["0", 0, {}]', "[true, 0, {}]", "[[], 0, {}]", "[0, 0]", "[" * 9000])
def test_a_partial_file_that_was_changed_is_gone_on_with(line, tmp_path):
    output = tmp_path / "answers.jsonl"
    output.with_name("answers.jsonl.partial").write_text(json.dumps({"generate": {}}) + f"\n{line}\n")
    file = AnswerFile(output, {})
    file.add((1, 0), {"origin": "half a \ud800"})
    file.write_output()
    file.close()
    assert [json.loads(row) for row in output.read_text().splitlines()] == [{"origin": "half a \ud800"}]


def test_a_value_that_the_library_takes_for_a_file_is_one_line():
    needed = ["--model_name_or_path=m", "--train_data=x", "--use_cpu=true"]
    refusal(lambda: parse_config(None, [*needed, "--accelerator_config=/no/such.json"]))
