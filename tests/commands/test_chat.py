"""The command `chat`: streamed answers, the conversation, commands, and lines from a pipe."""

import io
import json
import shutil
from pathlib import Path

import pytest

from sft_pipeline.commands import chat as chat_module
from sft_pipeline.commands.chat import HELP, Conversation, chat
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.messages import add_system_prompt
from sft_pipeline.inference.answers import generate_answers
from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.runs.output_dir import TEMPLATE_FILE
from sft_pipeline.runs.trained_model import load_template
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.sanitize import replace_control_characters

LIMIT = 5


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def conversation(tiny_model, tokenizer) -> Conversation:
    return Conversation(tiny_model, build_template("role", tokenizer), "You are 冬瓜.", LIMIT)


@pytest.fixture
def seen_prompts(monkeypatch) -> list[list[int]]:
    """The ids of the prompts that the model gets, in order."""
    prompts_seen = []

    def spy(model, template, prompts, *args, **kwargs):
        prompts_seen.extend(prompts)
        return generate_answers(model, template, prompts, *args, **kwargs)

    monkeypatch.setattr(chat_module, "generate_answers", spy)
    return prompts_seen


def answer_greedily(conversation: Conversation, messages: list) -> str:
    template = conversation.template
    prompt = template.encode_prompt(add_system_prompt(messages, conversation.system_prompt))
    sampling = SamplingParams(max_new_tokens=LIMIT)
    [completion] = generate(conversation.model, [prompt], [template.stop_token_id], sampling)
    return template.parse(completion.ids)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_answers_are_printed_and_added_to_the_conversation(conversation, seen_prompts, capsys):
    conversation.handle_line("Hi")
    first = answer_greedily(conversation, [user("Hi")])
    assert capsys.readouterr().out.strip() == replace_control_characters(first).strip() and first
    conversation.handle_line("And then?")
    history = [user("Hi"), {"role": "assistant", "content": first}, user("And then?")]
    assert conversation.messages[:3] == history
    system = {"role": "system", "content": "You are 冬瓜."}
    assert seen_prompts[1] == conversation.template.encode_prompt([system, *history])
    assert replace_control_characters(conversation.messages[3]["content"]) == capsys.readouterr().out.strip()


def test_commands(conversation, seen_prompts, capsys):
    conversation.handle_line("Hi")
    conversation.handle_line("/reset")
    assert conversation.messages == [] and conversation.system_prompt == "You are 冬瓜."
    conversation.handle_line("Hi")
    assert seen_prompts[0] == seen_prompts[1]
    conversation.handle_line("/system  Answer in verse. ")
    assert conversation.messages == []
    conversation.handle_line("Hi")
    template = conversation.template
    assert seen_prompts[2] == template.encode_prompt([{"role": "system", "content": "Answer in verse."}, user("Hi")])
    conversation.handle_line("/system")
    conversation.handle_line("Hi")
    assert seen_prompts[3] == template.encode_prompt([user("Hi")])
    assert capsys.readouterr().err == ""


def test_an_unknown_command_is_not_answered(conversation, seen_prompts, capsys):
    conversation.handle_line("/rest")
    assert capsys.readouterr().err == f"/rest: no such command; {HELP}\n"
    assert seen_prompts == [] and conversation.messages == []
    conversation.handle_line("/etc/hosts is what?")  # a path, not a command
    assert len(seen_prompts) == 1


def test_a_message_that_is_too_long_is_removed(conversation, capsys):
    conversation.model.config.max_position_embeddings = 60
    conversation.handle_line("long " * 60)
    assert "no answer: " in (error := capsys.readouterr().err) and "exceed the limit of 60" in error
    assert conversation.messages == []
    conversation.handle_line("Hi")
    assert capsys.readouterr().out.strip() and len(conversation.messages) == 2


def test_the_oldest_exchanges_are_removed_at_the_context_length(conversation, seen_prompts):
    """The system prompt stays, and so do the newest exchanges that fit."""
    conversation.model.config.max_position_embeddings = 110
    for number in range(6):
        conversation.handle_line(f"Question {number}?")
    lengths = [len(ids) for ids in seen_prompts]
    assert max(lengths) + LIMIT <= 110 and lengths[1] > lengths[0]
    texts = conversation.template.tokenizer.batch_decode(seen_prompts)
    assert all("冬瓜" in text and f"Question {number}?" in text for number, text in enumerate(texts))
    assert "Question 0?" not in texts[-1] and conversation.messages[0]["content"] != "Question 0?"


def set_stdin(monkeypatch, lines: str, kind=io.StringIO) -> None:
    monkeypatch.setattr("sys.stdin", kind(lines))


def test_each_line_of_a_pipe_is_answered(model_folder, monkeypatch, capsys, seen_prompts):
    set_stdin(monkeypatch, "Hi\n\n   \nAnd then?")
    chat(str(model_folder), LIMIT)
    output = capsys.readouterr()
    assert output.err.count("no answer") == 0 and HELP not in output.out and "> " not in output.out
    assert len(seen_prompts) == 2 and len(output.out.splitlines()) >= 2
    assert seen_prompts[1][: len(seen_prompts[0])] == seen_prompts[0]  # the same conversation


def test_lines_after_quit_are_not_answered(model_folder, monkeypatch, capsys, seen_prompts):
    set_stdin(monkeypatch, "/quit\nHi\n")
    chat(str(model_folder), LIMIT)
    assert seen_prompts == [] and capsys.readouterr().out == ""


def test_a_terminal_shows_the_commands(model_folder, monkeypatch, capsys, seen_prompts):
    set_stdin(monkeypatch, "Hi\n", Terminal)
    chat(str(model_folder), LIMIT)
    output = capsys.readouterr().out
    assert output.startswith(f"{HELP}\n> ") and len(seen_prompts) == 1


def test_ctrl_c_at_the_prompt_ends(model_folder, monkeypatch, seen_prompts):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    chat(str(model_folder), LIMIT)
    assert seen_prompts == []


def test_the_trained_template_and_system_prompt_are_used(model_folder, tmp_path, monkeypatch, seen_prompts):
    folder = Path(shutil.copytree(model_folder, tmp_path / "run"))
    template, system_prompt = load_template(str(folder))
    assert (template.name, system_prompt) == ("chat", None)
    (folder / TEMPLATE_FILE).write_text(json.dumps({"template": "role", "system_prompt": "Be brief."}))
    template, system_prompt = load_template(str(folder))
    assert (template.name, system_prompt) == ("role", "Be brief.")
    set_stdin(monkeypatch, "Hi\n")
    chat(str(folder), LIMIT)
    assert template.tokenizer.decode(seen_prompts[0]) == "<|im_start|>\n#SYSTEM:Be brief.\n#USER:Hi\n#ASSISTANT:"


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(SFTError, match="not a model folder"):
        chat(str(tmp_path), LIMIT)


def test_no_model_is_loaded_for_answers_of_no_token(tmp_path):
    with pytest.raises(SFTError, match="^max_new_tokens: 0 must be at least 1$"):
        chat(str(tmp_path), 0)
