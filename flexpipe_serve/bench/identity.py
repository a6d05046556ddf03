"""Whether streams said what they would have said without a refactoring: pure.

Texts are compared, piece by piece as they were streamed: over HTTP a piece is a token, but for tokens that are part of
a character only, which come together with the one that completes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_INCOMPLETE = "\ufffd"
"""What a stream that ends amid a character ends with."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a stream left its reference.

    Args:
        prompt: the prompt's index.
        char: offset of the first character that differs.
        piece: index of the first piece of text that differs.
        num_pieces: pieces that differ from the reference's of the same index.
        expected: some of the reference from there.
        found: some of the stream from there.
        logprob_gap: difference of the two best tokens' log probabilities there; tiny: a tie, which rounding decides.
            None: not known.
    """

    prompt: int
    char: int
    piece: int
    num_pieces: int
    expected: str
    found: str
    logprob_gap: float | None = None


def find_difference(prompt: int, pieces: Sequence[str], reference: Sequence[str]) -> Difference | None:
    """Compares a stream with its reference, as far as the stream came; None where they agree.

    Args:
        prompt: the prompt's index.
        pieces: the stream's text; it may be cut short anywhere, but not be longer than the reference.
        reference: the text of the same prompt without disturbance.
    """
    found, expected = "".join(pieces).rstrip(_INCOMPLETE), "".join(reference)
    if expected.startswith(found):
        return None
    char = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    padded = [*reference, *[""] * max(0, len(pieces) - len(reference))]
    different = [i for i, piece in enumerate(pieces) if piece != padded[i]]
    return Difference(
        prompt=prompt,
        char=char,
        piece=different[0],
        num_pieces=len(different),
        expected=expected[char : char + 20],
        found=found[char : char + 20],
    )
