"""Guesses at a row's next tokens from its own text: prompt lookup decoding.

Answers repeat: names and phrases of the prompt, and a model that is caught in a loop repeats itself without end. Where
the last tokens of a row have occurred in it before, what followed them then is guessed to follow now. The guessed
tokens are read in the same forward as the row's last token, which on few rows costs little more than reading that one
alone, and the ones that the model would have chosen are kept: the answer is the same, in fewer forwards.

Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding (`prompt_lookup_num_tokens` of
transformers' generate).
"""

LENGTHS = (4, 3, 2, 1)  # of the tokens looked up, the longest first
# On answers to Alpaca's prompts three in four guesses are right after 4 tokens that have occurred before, near a half after
# 3 or 2, a sixth after 1.
SURE = 4
MOST = 16  # guessed at once for a row


class Guesses:
    """The text of one row, and how many of its next tokens are worth guessing."""

    def __init__(self, ids: list[int]) -> None:
        self.ids: list[int] = []
        self.followed_at: dict[tuple[int, ...], int] = {}  # by the tokens before: the latest place of what followed
        self.trust = 4
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        for length in LENGTHS:
            if len(self.ids) >= length:
                self.followed_at[tuple(self.ids[-length:])] = len(self.ids)
        self.ids.append(token)

    def next(self, most: int, least: int) -> list[int]:
        """At most `most` tokens; none where the last `least` tokens are new. A guess that reaches the text's end goes
        on as a loop."""
        places = (self.followed_at.get(tuple(self.ids[-length:])) for length in LENGTHS if length >= least)
        start = next((place for place in places if place is not None), None)
        if start is None:
            return []
        period = len(self.ids) - start
        return [self.ids[start + i % period] for i in range(max(min(most, self.trust), 0))]

    def learn(self, guessed: int, right: int) -> None:
        """The first `right` of `guessed` tokens were what the model chose: guess more if all were, else as many."""
        if guessed:
            self.trust = min(2 * guessed, MOST) if right == guessed else max(right, 1)
