"""Guesses at a row's next tokens from its own text: prompt lookup decoding.

Answers repeat: names and phrases of the prompt, and a model that is caught in a loop repeats itself without end. Where
the last tokens of a row have occurred in it before, what followed them then is guessed to follow now. The guessed
tokens are read in the same forward as the row's last token, which on few rows costs little more than reading that one
alone, and the ones that the model would have chosen are kept: the answer is the same, in fewer forwards.

Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding (`prompt_lookup_num_tokens` of
transformers' generate).
"""

LENGTHS = (4, 3, 2, 1)  # of the tokens looked up, the longest first
# How many must have occurred before, by the tokens that a forward reads anyway: the more, the dearer is another one.
# On answers to Alpaca's prompts a sixth of the guesses after 1 known token is right, near a half after 2 or 3, three in
# four after 4; on two cores another token takes 2% of the time of a forward of 1 token, and 3% of that of one of 16.
LEAST = ((8, 1), (16, 2))  # (below so many tokens, length)
MOST = 16  # guessed at once for a row


class PromptLookup:
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

    def next(self, most: int, tokens: int) -> list[int]:
        """At most `most` tokens, to be read in a forward of `tokens` others; none where the last tokens are new. A
        guess that reaches the text's end goes on as a loop."""
        least = next((length for below, length in LEAST if tokens < below), LENGTHS[0])
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
