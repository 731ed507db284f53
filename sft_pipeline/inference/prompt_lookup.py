"""Prompt lookup decoding: draft tokens copied from earlier text of the same sequence.

Answers repeat names and phrases of the prompt, and a model caught in a loop repeats itself. Where the last tokens of a
sequence have occurred in it before, the tokens that followed them then are proposed as draft tokens. The model verifies
the drafts in the same forward pass that reads the sequence's last token, which for few sequences costs little more than
reading that token alone. Drafts equal to the tokens the model would have chosen are accepted, so the answer is the same
with fewer forward passes.

Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding (`prompt_lookup_num_tokens` of
transformers' generate).
"""

NGRAM_SIZES = (4, 3, 2, 1)  # the longest match is tried first
# The shortest n-gram that must match, by the number of tokens that the forward pass reads without drafts: the more it
# reads, the more an extra token costs. On answers to Alpaca's prompts a sixth of the drafts after 1 matching token is
# accepted, near a half after 2 or 3, and three in four after 4; on two cores an extra token adds 2% to the time of a
# forward pass of 1 token, and 3% to that of one of 16.
MIN_NGRAM_SIZES = ((8, 1), (16, 2))  # (for forward passes of fewer tokens than this, n-gram size)
MAX_DRAFT_TOKENS = 16  # for one sequence in one forward pass


class PromptLookup:
    """The tokens of one sequence, indexed by n-gram, and the number of draft tokens to propose next."""

    def __init__(self, ids: list[int]) -> None:
        self.ids: list[int] = []
        self.next_index: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its latest occurrence
        self.num_draft_tokens = 4
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Append a token to the sequence and update the n-gram index."""
        for size in NGRAM_SIZES:
            if len(self.ids) >= size:
                self.next_index[tuple(self.ids[-size:])] = len(self.ids)
        self.ids.append(token)

    def get_draft_tokens(self, limit: int, num_tokens: int) -> list[int]:
        """Return at most `limit` draft tokens for a forward pass that reads `num_tokens` tokens without them.

        Empty if the last tokens have not occurred before. Drafts that reach the end of the sequence repeat from the
        matched position.
        """
        min_size = next((size for threshold, size in MIN_NGRAM_SIZES if num_tokens < threshold), NGRAM_SIZES[0])
        indices = (self.next_index.get(tuple(self.ids[-size:])) for size in NGRAM_SIZES if size >= min_size)
        start = next((index for index in indices if index is not None), None)
        if start is None:
            return []
        period = len(self.ids) - start
        return [self.ids[start + i % period] for i in range(max(min(limit, self.num_draft_tokens), 0))]

    def update_num_draft_tokens(self, proposed: int, accepted: int) -> None:
        """Adapt the number of drafts: double it if all `proposed` tokens were accepted, else use the accepted count."""
        if proposed:
            self.num_draft_tokens = min(2 * proposed, MAX_DRAFT_TOKENS) if accepted == proposed else max(accepted, 1)
