"""Unfinished sequences by request, and the rule by which a request's sequences compute their prompt only once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from flexpipe_serve.engine.request import Sequence


@dataclass(slots=True)
class _Group:
    sequences: list[Sequence] = field(default_factory=list)
    prompt_computed: bool = False


class RequestGroups:
    """The unfinished sequences of each request, in order of arrival.

    Args:
        block_size: tokens of a KV block, what sequences share.
        prefix_cache: False: nothing is shared, so nobody waits for a sibling.
    """

    def __init__(self, *, block_size: int, prefix_cache: bool) -> None:
        self._block_size = block_size
        self._prefix_cache = prefix_cache
        self._groups: dict[str, _Group] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for group in self._groups.values() for seq in group.sequences)

    def sequences(self, request_id: str) -> tuple[Sequence, ...]:
        """The request's unfinished sequences; none for an unknown request."""
        group = self._groups.get(request_id)
        return tuple(group.sequences) if group else ()

    def add(self, seq: Sequence) -> None:
        self._groups.setdefault(seq.request_id, _Group()).sequences.append(seq)

    def remove(self, seq: Sequence) -> None:
        group = self._groups[seq.request_id]
        group.sequences.remove(seq)
        if not group.sequences:
            del self._groups[seq.request_id]

    def note_computed(self, seq: Sequence) -> None:
        """``seq.num_computed`` has grown: siblings may come once it covers all they can share."""
        group = self._groups[seq.request_id]
        if not group.prompt_computed:
            group.prompt_computed = seq.num_computed // self._block_size >= self._num_shared_blocks(seq)

    def forget_computed(self) -> None:
        """The prefix cache is empty."""
        for group in self._groups.values():
            group.prompt_computed = False

    def is_held_back(self, seq: Sequence) -> bool:
        """True while the first sequence of the request computes the prompt blocks that ``seq`` will share.

        That one ranks before ``seq`` and is never held back, so the wait ends.
        """
        group = self._groups[seq.request_id]
        return (
            group.sequences[0] is not seq
            and not group.prompt_computed
            and self._prefix_cache
            and not seq.params.prompt_logprobs
            and self._num_shared_blocks(seq) > 0
        )

    def _num_shared_blocks(self, seq: Sequence) -> int:
        # The last token of a prompt is always computed anew.
        return (seq.num_prompt_tokens - 1) // self._block_size
