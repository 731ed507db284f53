"""Chat templates for tests; `AGENT_TEMPLATE` is the one that the project ships for conversations with tools."""

from pathlib import Path

AGENT_TEMPLATE = (Path(__file__).parents[2] / "configs" / "templates" / "agent.jinja").read_text(encoding="utf-8")

CHATML_TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
)
# Opens the next answer whether it is asked for a generation prompt or not.
OPENING_TEMPLATE = CHATML_TURNS + "{{ '<|im_start|>assistant\\n' }}"
# Its prompt ends with a tag that its answers lack.
NO_PLACE_TEMPLATE = CHATML_TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>' }}{% endif %}"
# Ends a call with another token than an answer of text, as Llama's.
TWO_STOPS_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '{\"name\": \"' + call.function.name + '\", \"parameters\": ' + (call.function.arguments | tojson) + '}' }}"
    "{% endfor %}{{ ('<|endoftext|>' if message.tool_calls else '<|im_end|>') + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Writes an empty reasoning in its prompt where `enable_thinking` is false, and a mode.
THINKING_TEMPLATE = (
    "{{ '<|im_start|>' + (mode or 'none') + '<|im_end|>\\n' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' and loop.last %}"
    "{{ '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '') }}{% endif %}"
)
