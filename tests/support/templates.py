"""Chat templates for tests; `AGENT_TEMPLATE` is the one that the project ships for conversations with tools."""

from pathlib import Path

AGENT_TEMPLATE = (Path(__file__).parents[2] / "configs" / "templates" / "agent.jinja").read_text(encoding="utf-8")
