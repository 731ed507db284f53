"""Stop strings: where an answer ends, and how its text is cut."""

from support.generation import LLAMA, PROMPTS, decode

from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.sampling import SamplingParams


def test_stop_strings():
    plain = generate(LLAMA, PROMPTS, [], SamplingParams(max_new_tokens=30), decode=decode, batch_size=3)
    assert [c.text for c in plain] == [decode(c.ids) for c in plain]
    stop = plain[1].text[4:7]
    stopped = generate(
        LLAMA, PROMPTS, [], SamplingParams(max_new_tokens=30), decode=decode, stop_strings=[stop, "never"], batch_size=3
    )
    for full, cut in zip(plain, stopped):
        assert cut.text == full.text.partition(stop)[0]
        assert cut.finish_reason == ("stop" if stop in full.text else "length")
        assert stop not in decode(cut.ids[:-1]) and cut.ids == full.ids[: len(cut.ids)]
    assert "stop" in [c.finish_reason for c in stopped]
