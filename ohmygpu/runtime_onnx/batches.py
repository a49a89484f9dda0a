"""Which texts run together: integers only.

Texts of a batch are padded to its longest, so a batch takes texts of about one length, from
whatever requests they are. The text that has waited longest is always among them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

PADDED_TOKENS = 512  # longer texts run without padding: full rows need no scores held at once
_WASTE = 0.25  # of a batch may be padding


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """One text: its length, when it came (a running number), whose it is and which of theirs."""

    tokens: int
    order: int
    request_id: int
    index: int


class Pending:
    """Texts that wait."""

    def __init__(self) -> None:
        self._items: list[Item] = []  # by length
        self._order = 0

    def __len__(self) -> int:
        return len(self._items)

    def add(self, request_id: int, lengths: list[int]) -> None:
        """Take the texts of a request."""
        for index, tokens in enumerate(lengths):
            self._order += 1
            insort(self._items, Item(tokens, self._order, request_id, index))

    def drop(self, request_id: int) -> None:
        """Forget the texts of a request."""
        self._items = [item for item in self._items if item.request_id != request_id]

    def take(self, most_tokens: int) -> list[Item]:
        """The next batch: at most `most_tokens` with its padding, or one text alone."""
        items = self._items
        oldest = min(items, key=lambda item: item.order)
        low = bisect_left(items, oldest)
        high = low + 1  # items[low:high] is the batch, grown towards the nearer length
        while True:
            below = items[low - 1] if low else None
            above = items[high] if high < len(items) else None
            grown = [
                (start, stop)
                for start, stop, neighbour in ((low - 1, high, below), (low, high + 1, above))
                if neighbour is not None and self._fits(start, stop, most_tokens)
            ]
            if not grown:
                break
            low, high = min(
                grown, key=lambda span: items[span[1] - 1].tokens - items[span[0]].tokens
            )
        batch = items[low:high]
        del items[low:high]
        return batch

    def _spread(self, span: tuple[int, int]) -> int:
        return self._items[span[1] - 1].tokens - self._items[span[0]].tokens

    def _fits(self, start: int, stop: int, most_tokens: int) -> bool:
        shortest, longest = self._items[start].tokens, self._items[stop - 1].tokens
        if longest * (stop - start) > most_tokens:
            return False
        if longest > PADDED_TOKENS:
            return shortest == longest
        return shortest >= longest * (1 - _WASTE)
