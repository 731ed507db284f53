"""Tasks of lm-evaluation-harness: log-likelihoods equal the held-out loss, answers those of `chat`, scores HFLM's."""

from itertools import chain
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from support.agent import save_agent
from support.model_comparison import row
from support.task_files import TEXTS, write_task
from support.templates import AGENT_TEMPLATE

from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.messages import add_system_prompt, split_answer
from sft_pipeline.data.tokenizer_export import build_saved_tokenizer
from sft_pipeline.evaluation import harness, harness_model
from sft_pipeline.evaluation.eval_loss import compute_reference_losses
from sft_pipeline.evaluation.harness import TaskOptions, load_tasks, run_tasks
from sft_pipeline.evaluation.harness_model import HarnessLM, batch_rows, read_generation_kwargs
from sft_pipeline.inference.answers import answer_prompts
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.runs.trained_model import load_trained
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError

SYSTEM = "You are 冬瓜."
EARLIER = row("Say it.", " the text\n")["messages"]
ROWS = [
    row("Is it in the text?", "the answer"),
    row("Is it in the text?", "is in the text, 冬瓜\n"),
    row("Name <|im_end|> it.", "<|im_start|>", *EARLIER),
    row("Name it.\n", "A", *EARLIER),
]
FACTS = Path("configs/tasks")


def request(*args) -> Instance:
    return Instance("loglikelihood", {}, args, 0)


@pytest.fixture(params=["role", "chat", "agent"])
def lm(request, model_folder, tiny_model, make_tokenizer) -> HarnessLM:
    """Counts no stop token. The prompts of the templates end with text, with a line end, and so with tools."""
    tokenizer = make_tokenizer(AGENT_TEMPLATE) if request.param == "agent" else make_tokenizer()
    template = build_template("role" if request.param == "role" else "chat", tokenizer)
    patch_loss_forward(tiny_model)
    return HarnessLM(tiny_model, template, SYSTEM, batch_size=3)


def render(lm: HarnessLM, conversation) -> tuple[str, str]:
    """The request that the harness makes of a row: its rendered prompt, and its answer."""
    prompt, answer = split_answer(conversation)
    return lm.apply_chat_template(prompt["messages"]), answer["content"]


def compute_plain_logprobs(model, ids: list[int]) -> torch.Tensor:
    """Log-probability of each id but the first, from all logits of one row."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_log_likelihoods_equal_the_held_out_loss(lm):
    """With the stop token they are the loss of each row; without it, that loss less the stop token's part."""
    rows = [add_system_prompt(conversation, SYSTEM) for conversation in ROWS]
    losses = compute_reference_losses(lm.model, lm.template, rows)
    requests = [request(*render(lm, conversation)) for conversation in ROWS]
    lm.count_stop_token = True
    counted = lm.loglikelihood(requests)
    assert [-loglikelihood for loglikelihood, _ in counted] == pytest.approx([loss.nll_nats for loss in losses], 1e-4)
    assert [greedy for _, greedy in counted] == [loss.correct == loss.tokens for loss in losses]
    lm.count_stop_token = False
    uncounted = lm.loglikelihood(requests)
    for (loglikelihood, _), loss, [sequence] in zip(uncounted, losses, lm.template.render(rows, "last")):
        ids = list(chain.from_iterable(span.ids for span in sequence.spans))
        assert ids[-1] == lm.template.stop_token_id
        stop = compute_plain_logprobs(lm.model, ids)[-1].item()
        assert loglikelihood == pytest.approx(-loss.nll_nats - stop, 1e-4)


def test_answers_that_the_task_begins(lm):
    """Only what follows the given beginning counts, and generation goes on from it."""
    messages = ROWS[0]["messages"][:1]
    [begun, whole] = [
        lm.apply_chat_template([*messages, {"role": "assistant", "content": "the"}], add_generation_prompt=False),
        lm.apply_chat_template(messages),
    ]
    assert begun == whole + "the"
    [(after, _), (both, _), (beginning, _)] = lm.loglikelihood(
        [request(begun, " answer"), request(whole, "the answer"), request(whole, "the")]
    )
    assert after == pytest.approx(both - beginning, 1e-4)
    conversation = add_system_prompt({"messages": messages}, SYSTEM)
    ids = lm.template.encode_prompt(conversation) + lm.template.tokenizer("the")["input_ids"]
    expected = lm.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    [text] = lm.generate_until([request(begun, {"until": [], "max_gen_toks": 5})])
    assert text == lm.template.tokenizer.decode(expected, skip_special_tokens=True)


def test_generated_answers_are_those_of_the_evaluation(lm):
    prompts = [split_answer(add_system_prompt(conversation, SYSTEM))[0] for conversation in ROWS]
    expected = [answer.text for answer in answer_prompts(lm.model, lm.template, prompts, 9, disable_tqdm=True)]
    requests = [request(render(lm, conversation)[0], {"until": ["\0"], "max_gen_toks": 9}) for conversation in ROWS]
    assert [text.strip() for text in lm.generate_until(requests)] == expected
    stop = expected[0][3]
    requests[1] = request(requests[0].args[0], {"until": [stop], "max_gen_toks": 9})  # other settings than the others'
    texts = lm.generate_until(requests)
    assert texts[1] == texts[0].partition(stop)[0] and texts[2].strip() == expected[2]


def test_a_control_token_stops_an_answer_by_its_id(lm, monkeypatch):
    """It is no part of the decoded text."""
    stop_ids = []
    monkeypatch.setattr(harness_model, "generate", lambda model, prompts, ids, *_, **__: stop_ids.append(ids) or [])
    lm.generate_until([request("the text", {"until": ["<|im_start|>", "text"]})])
    assert stop_ids == [{*lm.template.stop_token_ids, 1}]


def test_texts_without_a_template(lm):
    """A context that was not rendered is plain text, after the eos token, as this tokenizer has no bos token."""
    encode = lm.template.tokenizer
    context, answer, text = "The answer\n", " is in the text", "the text " * 20
    ids = [2, *encode(context)["input_ids"], *encode(answer)["input_ids"]]
    expected = compute_plain_logprobs(lm.model, ids)[-len(encode(answer)["input_ids"]) :].sum().item()
    assert lm.loglikelihood([request(context, answer), request(context, "")]) == [
        (pytest.approx(expected, 1e-4), False),
        (0, True),
    ]
    ids = [2, *encode(text)["input_ids"]]
    logprobs = compute_plain_logprobs(lm.model, ids)
    assert lm.loglikelihood_rolling([request(""), request(text)]) == [0, pytest.approx(logprobs.sum().item(), 1e-4)]


def test_texts_and_prompts_beyond_the_positions(lm, caplog):
    """As in the harness: a text in windows, a prompt without its beginning; an answer too long is refused."""
    encode, text = lm.template.tokenizer, "the answer is in the text " * 3
    ids = encode(text)["input_ids"]
    lm._max_length = limit = len(ids) // 2 + 1
    expected = compute_plain_logprobs(lm.model, [2, *ids[:limit]]).sum()
    expected += compute_plain_logprobs(lm.model, ids[-limit - 1 :])[limit - len(ids) :].sum()
    assert lm.loglikelihood_rolling([request(text)]) == [pytest.approx(expected.item(), 1e-4)]
    assert "lose their beginning" not in caplog.text
    [(loglikelihood, _)] = lm.loglikelihood([request(text, " text")])
    tail = compute_plain_logprobs(lm.model, [*ids, *encode(" text")["input_ids"]][-limit - 1 :])
    assert loglikelihood == pytest.approx(tail[-len(encode(" text")["input_ids"]) :].sum().item(), 1e-4)
    assert f"1 of 1 prompts of a task exceed {limit} tokens and lose their beginning" in caplog.text
    with pytest.raises(SFTError, match=f"^an answer of a task exceeds the {limit} positions of the model"):
        lm.loglikelihood([request("", text)])
    [answer] = lm.generate_until([request(text, {"max_gen_toks": 3})])
    expected_ids = lm.model.generate(torch.tensor([ids[3 - limit :]]), max_new_tokens=3, do_sample=False)
    assert answer == encode.decode(expected_ids[0, limit - 3 :], skip_special_tokens=True)
    with pytest.raises(SFTError, match="^a task's max_gen_toks of 256 leaves no room for a prompt in the "):
        lm.generate_until([request(text, {})])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=40), st.booleans())
def test_batches_have_every_row_once_and_few_tokens(shapes, packed):
    rows = [harness_model.build_row([kind] * 5 + list(range(length)), [7]) for kind, length in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness_model, "TOKENS_PER_BATCH", 30)
        batches = list(batch_rows([*rows, {"input_ids": [1], "labels": [IGNORED]}], packed))
    assert sorted(chain.from_iterable(batches)) == list(range(len(rows)))
    for batch in batches:
        sequences = [tuple(rows[index]["input_ids"]) for index in batch]
        computed = len({ids[:end] for ids in sequences for end in range(1, len(ids) + 1)})
        assert (computed if packed else max(map(len, sequences)) * len(batch)) <= 30


def test_scores_equal_those_of_hflm(model_folder, tiny_model, make_tokenizer):
    """The role template's prompt ends without white space, so both mean the same tokens."""
    template = build_template("role", make_tokenizer())
    tokenizer = build_saved_tokenizer(template, SYSTEM)
    ours, theirs = [], []
    tasks = load_tasks(TaskOptions((str(FACTS),), limit=6, num_fewshot=2))
    hflm = HFLM(pretrained=tiny_model, tokenizer=tokenizer, batch_size=4)
    for task in tasks.tasks["tasks"].values():
        task.set_fewshot_seed(seed=harness.FEWSHOT_SEED)
    results = lm_eval.evaluate(hflm, tasks.tasks, limit=6, apply_chat_template=True, fewshot_as_multiturn=True)
    theirs = [sample for name in results["samples"] for sample in results["samples"][name]]
    patch_loss_forward(tiny_model)
    scores, ours = run_tasks(tasks, tiny_model, template, SYSTEM, disable_tqdm=True)
    assert [sample["arguments"] for sample in ours] == [sample["arguments"] for sample in theirs]
    assert len(ours) == 12 and ours[0]["task"] == "facts_answer" and ours[0]["arguments"][0][0].count("USER") == 3
    for sample, expected in zip(ours, theirs):
        for [answer], [expected_answer] in zip(sample["resps"], expected["resps"]):
            if isinstance(answer, str):
                assert answer == expected_answer
            else:
                assert answer == (pytest.approx(expected_answer[0], 1e-4), expected_answer[1])
    for score in scores:
        metrics = results["results"][score.task]
        error = metrics[f"{score.metric}_stderr,none"]
        assert (score.value, score.standard_error) == (metrics[f"{score.metric},none"], pytest.approx(error))
        assert np.mean(score.values) == pytest.approx(score.value) and score.questions == len(score.values) == 6
    assert [(score.name, score.num_fewshot, score.version) for score in scores] == [
        ("facts_answer exact_match", 2, "1"),
        ("facts_choice acc", 2, "1"),
    ]


def test_the_agent_template_is_scored_as_it_is_trained(model_folder, tmp_path):
    """HFLM would tokenize the line end of this template's prompt with the answer."""
    model, template, system = load_trained(str(save_agent(model_folder, tmp_path / "agent")))
    patch_loss_forward(model)
    tasks = load_tasks(TaskOptions((str(FACTS / "facts_choice.yaml"),), limit=3))
    _, samples = run_tasks(tasks, model, template, system)
    assert len(samples) == 3
    for sample in samples:
        for (prompt, choice), [[loglikelihood, _]] in zip(sample["arguments"], sample["resps"]):
            question = prompt.rpartition("user\n")[2].partition("<|im_end|>")[0]
            [sequence] = template.render([row(question, choice)], "last")[0]
            ids = list(chain.from_iterable(span.ids for span in sequence.spans))
            targets = sum(len(span.ids) for span in sequence.spans if span.supervised)
            expected = compute_plain_logprobs(model, ids)[-targets:-1].sum().item()
            assert loglikelihood == pytest.approx(expected, 1e-4)


def test_groups_and_metrics_without_a_mean(tmp_path, tiny_model, tokenizer):
    """A group has a score without values; perplexities are no means, and have no standard error."""
    write_task(tmp_path / "t", "texts", **TEXTS, metric_list=[{"metric": "word_perplexity"}])
    for name in ("first", "second"):
        write_task(tmp_path / "t", name, metric_list=[{"metric": "exact_match"}], tag="both")
    aggregate = [{"metric": "exact_match", "filter_list": ["none"]}]
    group = {"group": "g", "task": ["first"], "aggregate_metric_list": aggregate}
    (tmp_path / "t" / "g.yaml").write_text(yaml.safe_dump(group))
    options = TaskOptions(("texts", "g", "sec*"), include_path=str(tmp_path / "t"))
    patch_loss_forward(tiny_model)
    scores, samples = run_tasks(load_tasks(options), tiny_model, build_template("chat", tokenizer), None, True)
    by_name = {score.name: score for score in scores}
    assert set(by_name) == {"texts word_perplexity", "first exact_match", "second exact_match", "g exact_match"}
    assert by_name["texts word_perplexity"].values == [] and by_name["texts word_perplexity"].standard_error is None
    assert (
        by_name["g exact_match"].values == [] and by_name["g exact_match"].value == by_name["first exact_match"].value
    )
    assert len(by_name["first exact_match"].values) == 4 and len(samples) == 12
    assert list(load_tasks(TaskOptions(("both",), str(tmp_path / "t"), num_fewshot=0)).tasks["tasks"]) == [
        "first",
        "second",
    ]


CODE = """
import numpy as np

print("loaded")

def score(doc, results):
    if doc["question"] == "Say 2.":
        raise LookupError("no\\nmodel of sentences")
    return {"exact_match": np.float32(1)}
"""


def test_the_code_of_a_task(tmp_path, tiny_model, tokenizer, capsys):
    """What it prints is kept off the standard output; its numbers may be numpy's; its error names the task."""
    file = Path(write_task(tmp_path / "t", "own", metric_list=[{"metric": "exact_match"}]))
    (file.parent / "code.py").write_text(CODE)
    file.write_text(file.read_text() + "process_results: !function code.score\n")
    patch_loss_forward(tiny_model)
    template = build_template("chat", tokenizer)
    [score], _ = run_tasks(load_tasks(TaskOptions((str(file),), limit=2)), tiny_model, template, None, True)
    assert score.value == 1 and score.values == [1, 1]
    message = r"^task own: an answer cannot be scored \(LookupError: no model of sentences\); mend or remove the task$"
    with pytest.raises(SFTError, match=message):
        run_tasks(load_tasks(TaskOptions((str(file),))), tiny_model, template, None, True)
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("loaded\n")


def test_bars_can_be_turned_off(tmp_path, tiny_model, tokenizer, capsys):
    file = write_task(tmp_path / "t", "own", metric_list=[{"metric": "exact_match"}])
    tasks, template = load_tasks(TaskOptions((file,))), build_template("chat", tokenizer)
    patch_loss_forward(tiny_model)
    for disable, expected in ((True, False), (False, True)):
        capsys.readouterr()
        run_tasks(tasks, tiny_model, template, None, disable)
        assert ("4/4" in capsys.readouterr().err) == expected


def test_generation_kwargs():
    settings, until = read_generation_kwargs({"until": "\n", "do_sample": False, "temperature": 0.0})
    assert until == ["\n"] and (settings.max_new_tokens, settings.do_sample) == (256, False)
    settings, until = read_generation_kwargs({"until": ["", "a"], "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 3})
    assert until == ["a"] and settings.do_sample and (settings.temperature, settings.top_p) == (0.7, 0.9)
    assert read_generation_kwargs({"num_beams": 1}) == read_generation_kwargs({})
    with pytest.raises(SFTError, match="^generation_kwargs have num_beams: 4, which generation does not know; "):
        read_generation_kwargs({"num_beams": 4})


@pytest.fixture
def without_own_tasks(monkeypatch):
    """The harness knows no tasks of its own: reading them takes ten seconds and more."""
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, **_: manager(include_path=include_path, include_defaults=False),
    )


def test_error_messages(tmp_path, without_own_tasks, monkeypatch):
    folder = tmp_path / "t"
    known = write_task(folder, "known")
    (tmp_path / "empty").mkdir()
    hub = write_task(folder, "of_hub", dataset_path="nobody/nothing", dataset_kwargs=None)
    broken = write_task(folder, "broken", test_split="nowhere")
    (folder / "needs.py").write_text("import no_such_package\ndef process(doc, results): ...\n")
    (folder / "needs.yaml").write_text(Path(known).read_text().replace("task: known", "task: needs"))
    with (folder / "needs.yaml").open("a") as file:
        file.write("process_results: !function needs.process\n")
    unsafe = write_task(folder, "unsafe", unsafe_code=True)
    beams = write_task(folder, "beams", generation_kwargs={"num_beams": 4})
    cases = {
        ("knwn", str(folder)): "tasks: no task is named knwn; did you mean known? `lm-eval ls tasks` lists them",
        ("zzz", None): "tasks: no task is named zzz; a YAML file of your own is given by its path",
        (str(tmp_path / "empty"), None): f"tasks {tmp_path / 'empty'}: no task in this folder; give a folder of",
        (known, str(tmp_path / "no")): f"include_path {tmp_path / 'no'}: no such folder; give one of task files (YAML)",
        (hub, None): f"task {hub}: its rows cannot be downloaded (",
        (broken, None): f"task {broken}: cannot be loaded (",
        ("needs", str(folder)): "task needs: needs a package (No module named 'no_such_package'); install it with `pip",
        (unsafe, None): "task unsafe: runs code that the model writes",
        (
            beams,
            None,
        ): "task beams: generation_kwargs have num_beams: 4, which generation does not know; it knows ",
    }
    for (name, include_path), message in cases.items():
        with pytest.raises(SFTError) as error:
            load_tasks(TaskOptions((name,), include_path))
        assert str(error.value).startswith(message), name
    with pytest.raises(SFTError, match=r"^task known: asked for twice, the second time by known; remove one$"):
        load_tasks(TaskOptions((known, "known"), str(folder)))
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SFTError, match=r"install it with `pip install 'sft_pipeline\[harness\]'`$"):
        load_tasks(TaskOptions((known,)))


def test_options():
    assert TaskOptions.parse(None, None, None, None) is None
    assert TaskOptions.parse("a, b,", "folder", 0.5, 2) == TaskOptions(("a", "b"), "folder", 0.5, 2)
    cases = {
        (None, None, 2.0, None): "limit is for tasks; add --tasks",
        (" ,", None, None, None): "tasks: names no task; give names with commas between",
        ("a", None, -1.0, None): "limit is -1.0; give a number of questions, or a share between 0 and 1",
        ("a", None, 1.5, None): "limit is 1.5; give a number of questions",
        ("a", None, None, -1): "num_fewshot is -1; it has to be 0 or more",
    }
    for words, message in cases.items():
        with pytest.raises(SFTError) as error:
            TaskOptions.parse(*words)
        assert str(error.value).startswith(message), words


@pytest.mark.real
def test_the_harness_knows_its_own_tasks():
    """Their rows are on the hub, which tests do not reach."""
    for name, message in {
        "gsm8k": "task gsm8k: its rows cannot be downloaded (",
        "gsm8l": "tasks: no task is named gsm8l; did you mean gsm8k?",
    }.items():
        with pytest.raises(SFTError) as error:
            load_tasks(TaskOptions((name,)))
        assert str(error.value).startswith(message)
