"""How many tokens a batch may hold: the memory model, and what out of memory teaches it.  Pure.

A batch's memory grows with its tokens, so one number of bytes per token, measured at start on the longest documents,
says how many fit.  It is an estimate all the same: kernels take workspaces, the allocator cannot always put two holes
together, and others may use the GPU.  So every length class has a ceiling of its own, halved when a batch of the class
ran out of memory and raised again slowly while its batches fit.
"""

from __future__ import annotations

from inferstream.batching import length_class

SHARE = 0.8
"""Of the memory that is free with the model loaded, how much batches are planned with."""

RAISE = 0.005
"""By how much of the full budget a lowered ceiling rises with each batch of its class that fits."""


def fitting_tokens(free_bytes: int, peak_bytes: int, tokens: int) -> int:
    """How many tokens fit ``free_bytes``, where a batch of ``tokens`` took ``peak_bytes``; at least 1.

    Batches compute one after the other on one stream, and the memory of one is the next one's: it counts once,
    however many are in flight.
    """
    return max(1, int(free_bytes * SHARE * tokens / max(1, peak_bytes)))


class Ceilings:
    """The token budget of a batch by the length class of its longest piece; ``budget`` is that of all at first.

    A batch of one piece is never above the ceiling: it goes alone whatever it costs, and what does not fit then
    fits never.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._lowered: dict[int, float] = {}

    @property
    def lowered(self) -> bool:
        """Whether any class is below the budget."""
        return bool(self._lowered)

    def of(self, longest: int) -> int:
        """The budget in tokens of a batch whose longest piece has ``longest``."""
        return int(self._lowered.get(length_class(longest), self.budget))

    def out_of_memory(self, longest: int, tokens: int) -> int:
        """A batch of ``tokens`` (as the engine counts them) did not fit; gives the class's new ceiling.

        Half of the batch, not of the ceiling: those that were on their way when it was lowered may fail as well, and
        say nothing of smaller ones.  Nor does a long piece that goes alone and never fits.
        """
        lowered = max(1, min(self.of(longest), tokens // 2))
        self._lowered[length_class(longest)] = lowered
        return lowered

    def fitted(self, longest: int) -> None:
        """A batch whose longest piece has ``longest`` tokens came through."""
        if not self._lowered:
            return
        number = length_class(longest)
        if number not in self._lowered:
            return
        raised = self._lowered[number] + self.budget * RAISE
        if raised >= self.budget:
            del self._lowered[number]
        else:
            self._lowered[number] = raised
