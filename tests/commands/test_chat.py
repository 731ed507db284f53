"""The command `chat`: streamed answers, the conversation, tools, commands, and lines from a pipe."""

import io
import json
import shutil
from pathlib import Path

import pytest
from support.agent import OSLO, TOOLS, assistant, make_call, save_agent, script_answers, user, write_call
from support.templates import AGENT_TEMPLATE

from sft_pipeline import cli
from sft_pipeline.commands import chat as chat_module
from sft_pipeline.commands.chat import HELP, ChatSession, chat, load_tools
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
def session(tiny_model, tokenizer) -> ChatSession:
    return ChatSession(tiny_model, build_template("role", tokenizer), "You are 冬瓜.", LIMIT, [])


@pytest.fixture
def agent(tiny_model, make_tokenizer) -> ChatSession:
    return ChatSession(
        tiny_model, build_template("chat", make_tokenizer(AGENT_TEMPLATE)), "You are 冬瓜.", LIMIT, TOOLS
    )


@pytest.fixture
def seen_prompts(monkeypatch) -> list[list[int]]:
    """The ids of the prompts that the model gets, in order."""
    prompts_seen = []

    def spy(model, template, prompts, *args, **kwargs):
        prompts_seen.extend(prompts)
        return generate_answers(model, template, prompts, *args, **kwargs)

    monkeypatch.setattr(chat_module, "generate_answers", spy)
    return prompts_seen


def answer_greedily(session: ChatSession, messages: list) -> str:
    template = session.template
    prompt = template.encode_prompt(add_system_prompt({"messages": messages}, session.system_prompt))
    sampling = SamplingParams(max_new_tokens=LIMIT)
    [completion] = generate(session.model, [prompt], template.stop_token_ids, sampling)
    return template.parse(completion.ids)["content"]


def test_answers_are_printed_and_added_to_the_conversation(session, seen_prompts, capsys):
    session.handle_line("Hi")
    first = answer_greedily(session, [user("Hi")])
    assert capsys.readouterr().out.strip() == replace_control_characters(first).strip() and first
    session.handle_line("And then?")
    history = [user("Hi"), {"role": "assistant", "content": first}, user("And then?")]
    assert session.messages[:3] == history
    system = {"role": "system", "content": "You are 冬瓜."}
    assert seen_prompts[1] == session.template.encode_prompt({"messages": [system, *history]})
    assert replace_control_characters(session.messages[3]["content"]) == capsys.readouterr().out.strip()


def test_commands(session, seen_prompts, capsys):
    session.handle_line("Hi")
    session.handle_line("/reset")
    assert session.messages == [] and session.system_prompt == "You are 冬瓜."
    session.handle_line("Hi")
    assert seen_prompts[0] == seen_prompts[1]
    session.handle_line("/system  Answer in verse. ")
    assert session.messages == []
    session.handle_line("Hi")
    template = session.template
    assert seen_prompts[2] == template.encode_prompt(
        {"messages": [{"role": "system", "content": "Answer in verse."}, user("Hi")]}
    )
    session.handle_line("/system")
    session.handle_line("Hi")
    assert seen_prompts[3] == template.encode_prompt({"messages": [user("Hi")]})
    assert capsys.readouterr().err == ""


def test_an_unknown_command_is_not_answered(session, seen_prompts, capsys):
    session.handle_line("/rest")
    assert capsys.readouterr().err == f"/rest: no such command; {HELP}\n"
    assert seen_prompts == [] and session.messages == []
    session.handle_line("/etc/hosts is what?")  # a path, not a command
    assert len(seen_prompts) == 1


def test_a_message_that_is_too_long_is_removed(session, capsys):
    session.model.config.max_position_embeddings = 60
    session.handle_line("long " * 60)
    assert "no answer: " in (error := capsys.readouterr().err) and "exceed the limit of 60" in error
    assert session.messages == []
    session.handle_line("Hi")
    assert capsys.readouterr().out.strip() and len(session.messages) == 2


def test_the_oldest_exchanges_are_removed_at_the_context_length(session, seen_prompts):
    """The system prompt stays, and so do the newest exchanges that fit."""
    session.model.config.max_position_embeddings = 110
    for number in range(6):
        session.handle_line(f"Question {number}?")
    lengths = [len(ids) for ids in seen_prompts]
    assert max(lengths) + LIMIT <= 110 and lengths[1] > lengths[0]
    texts = session.template.tokenizer.batch_decode(seen_prompts)
    assert all("冬瓜" in text and f"Question {number}?" in text for number, text in enumerate(texts))
    assert "Question 0?" not in texts[-1] and session.messages[0]["content"] != "Question 0?"


# Tools.

WEATHER, TIME = (write_call(name, '{"city": "Oslo"}') for name in ("get_weather", "get_time"))
REASONING = "<think>\nLet me see.\n</think>\n\n"


def with_id(call: dict, number: int) -> dict:
    return {"id": f"call{number:05}", **call}


def result(text: str, name: str, number: int) -> dict:
    return {"role": "tool", "content": text, "tool_call_id": f"call{number:05}", "name": name}


def encode(session: ChatSession, *messages: dict) -> list[int]:
    system = {"role": "system", "content": "You are 冬瓜."}
    return session.template.encode_prompt({"messages": [system, *messages], "tools": TOOLS})


def test_the_results_of_the_calls_are_the_next_lines(agent, monkeypatch, capsys):
    calls = f"{REASONING}I look.\n{WEATHER}\n{TIME}"
    prompts = script_answers(monkeypatch, agent.template.tokenizer, calls, "It is cold.", "You are welcome.")
    agent.handle_line("What is it like in Oslo?")
    assert capsys.readouterr().out.strip() == calls  # as the model wrote them
    assert agent.input_prompt == "result of get_weather: "
    agent.handle_line("4 degrees")
    assert agent.input_prompt == "result of get_time: " and len(prompts) == 1
    agent.handle_line('{"hour": 12}')
    assert agent.input_prompt == "> " and capsys.readouterr().out.strip() == "It is cold."
    agent.handle_line("Thanks.")
    called = assistant(
        "I look.", with_id(OSLO, 1), with_id(make_call("get_time", city="Oslo"), 2), reasoning="Let me see."
    )
    history = [user("What is it like in Oslo?"), called]
    history += [result("4 degrees", "get_weather", 1), result('{"hour": 12}', "get_time", 2)]
    history += [assistant("It is cold."), user("Thanks.")]
    assert agent.messages == [*history, assistant("You are welcome.")]
    assert prompts == [encode(agent, *history[:1]), encode(agent, *history[:4]), encode(agent, *history)]
    texts = agent.template.tokenizer.batch_decode(prompts)
    assert all("Call get_weather." in text for text in texts)
    assert ["Let me see." in text for text in texts] == [
        False,
        True,
        False,
    ]  # the template leaves earlier reasoning out


def test_calls_after_results_have_results_of_their_own(agent, monkeypatch):
    prompts = script_answers(monkeypatch, agent.template.tokenizer, WEATHER, TIME, "Noon.")
    for line in ("Hi", "cold", "/status", "noon"):
        agent.handle_line(line)
    assert [message["role"] for message in agent.messages] == ["user", *["assistant", "tool"] * 2, "assistant"]
    assert agent.messages[2]["content"] == "cold" and agent.messages[4] == result("noon", "get_time", 3)
    assert len(prompts) == 3


@pytest.mark.parametrize("command", ["/reset", "/system Be brief."])
def test_a_new_conversation_waits_for_no_results(command, agent, monkeypatch):
    script_answers(monkeypatch, agent.template.tokenizer, WEATHER, "Yes.")
    agent.handle_line("Hi")
    agent.handle_line(command)
    assert agent.input_prompt == "> " and agent.messages == []
    agent.handle_line("Hi")
    assert agent.messages == [user("Hi"), assistant("Yes.")]


def test_an_exchange_without_an_answer_is_removed(agent, monkeypatch, capsys):
    script_answers(monkeypatch, agent.template.tokenizer, "Yes.", WEATHER, None, "No.")
    for line in ("Hi", "Cold?", "4 degrees"):
        agent.handle_line(line)
    assert agent.messages == [user("Hi"), assistant("Yes.")] and agent.input_prompt == "> "
    assert capsys.readouterr().err == "no answer: too long\n"
    agent.handle_line("Hi")
    assert agent.messages[2:] == [user("Hi"), assistant("No.")]


def test_a_template_that_refuses_the_history_gives_no_answer(agent, monkeypatch, capsys):
    script_answers(monkeypatch, agent.template.tokenizer, WEATHER)
    agent.handle_line("Hi")
    agent.template.features.__dict__["writes_tool_results"] = False
    agent.handle_line("4 degrees")
    error = "no answer: messages[3]: the chat template does not write tool results; "
    assert capsys.readouterr().err.startswith(error) and agent.messages == []


def test_whole_exchanges_are_removed_at_the_context_length(agent, monkeypatch):
    prompts = script_answers(monkeypatch, agent.template.tokenizer, WEATHER, "Cold.", "Yes.", WEATHER, "Warm.")
    for line in ("Question 0?", "4 degrees", "Question 1?"):
        agent.handle_line(line)
    agent.model.config.max_position_embeddings = len(prompts[2]) + 10 + LIMIT
    agent.handle_line("Question 2?")
    agent.handle_line("20 degrees")
    assert [message["content"] for message in agent.messages if message["role"] == "user"] == [
        "Question 1?",
        "Question 2?",
    ]
    texts = agent.template.tokenizer.batch_decode(prompts[3:])
    assert all("You are 冬瓜." in text and "Call get_weather." in text and "4 degrees" not in text for text in texts)


FORMS = {
    "a list": json.dumps(TOOLS, indent=2),
    "JSON lines": "\n\n".join(map(json.dumps, TOOLS)),
    "functions": json.dumps([tool["function"] for tool in TOOLS]),
}


@pytest.mark.parametrize("form", FORMS)
def test_tools_of_a_file(form, tmp_path):
    (tmp_path / "tools.json").write_text("\ufeff" + FORMS[form], encoding="utf-8")
    assert load_tools(tmp_path / "tools.json") == TOOLS
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS[0], indent=2))
    assert load_tools(tmp_path / "tools.json") == TOOLS[:1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory); check the path"),
        (b"\xff", "not UTF-8 at byte 0; save it as UTF-8"),
        (b" \n", "no tools in it; write a JSON list of tools, or one a line"),
        (b"[]", "no tools in it; write a JSON list of tools, or one a line"),
        (b"[{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 3 (char 2)); write a JSON"),
        (b'[\n{"name": "f"},\n]', "not JSON ("),
        (b'{"name": "f"}\n{"name"}', "tools[1] is not JSON (Expecting ':' delimiter"),
        (b'[{"type": "function", "function": {}}]', "tools[0] has no name; add function.name"),
        (b"3", "tools[0] must be an object with a function, got int"),
    ],
)
def test_bad_tools_are_named(content, message, tmp_path, model_folder):
    file = tmp_path / "tools.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SFTError) as error:
        chat(str(tmp_path / "no model"), LIMIT, str(file))
    assert str(error.value).startswith(f"tools {file}: {message}") and "\n" not in str(error.value)


def test_a_template_that_does_not_write_tools_is_refused(model_folder, tmp_path, monkeypatch):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    with pytest.raises(SFTError, match=f"^tools {tmp_path}/tools.json: the chat template does not write tools; "):
        chat(str(model_folder), LIMIT, str(tmp_path / "tools.json"))


def test_a_terminal_asks_for_the_results(model_folder, tokenizer, tmp_path, monkeypatch, capsys):
    folder = save_agent(model_folder, tmp_path / "agent")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    prompts = script_answers(monkeypatch, tokenizer, WEATHER, "Cold.")
    set_stdin(monkeypatch, "Hi\n4 degrees\n", Terminal)
    cli.main(["chat", str(folder), "--tools", str(tmp_path / "tools.json")])
    output = capsys.readouterr().out
    assert output.startswith(f"{HELP}\n> ") and output.endswith(f"{WEATHER}\nresult of get_weather: Cold.\n> ")
    assert "Call get_time." in tokenizer.decode(prompts[0])


# Input.


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
    settings = {"template": "role", "chat_template_kwargs": {}, "system_prompt": "Be brief."}
    (folder / TEMPLATE_FILE).write_text(json.dumps(settings))
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
