"""What the source needs of the others: who takes the records, and who counts what happens to the group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from inferstream.lanes import Lane


class Intake(Protocol):
    """What the source needs of the pipeline."""

    def open_lanes(self, lanes: Sequence[Lane], epoch: int) -> None:
        """Begin with those that are new, and let those that were suspended go on."""
        ...

    def poll_limit(self, lanes: Sequence[Lane]) -> tuple[Sequence[Lane], int]:
        """The lanes that may be polled and how many records there is credit for."""
        ...

    def admit(self, lane: Lane, records: Sequence[Any]) -> None: ...

    def condemn(self, lane: Lane, record: Any) -> None:
        """Dead-letter a record unseen: it killed the process."""
        ...

    def commit_soon(self) -> None:
        """Do not wait for the next tick."""
        ...

    async def wait_for_credit(self, timeout_s: float) -> None: ...

    async def close_lanes(self, lanes: Sequence[Lane], timeout_s: float, *, for_good: bool = True) -> bool:
        """Finish what fits; True when everything that was kept has been acknowledged.

        The rest is dropped; unless ``for_good``, it stays.
        """
        ...

    def suspend_lanes(self, lanes: Sequence[Lane]) -> None:
        """Send nothing more of the lanes, which keep what they hold until they are opened again or dropped."""
        ...

    def drop_lanes(self, lanes: Sequence[Lane]) -> None:
        """Forget what is left of the lanes and give its credit back."""
        ...

    def committed(self, lane: Lane, settled: int) -> None:
        """The group's offset now covers the first ``settled`` slots of the lane."""
        ...


class SourceListener(Protocol):
    """Who counts what happens to the group."""

    def assigned(self, lanes: Sequence[Lane]) -> None: ...

    def revoked(self, lanes: Sequence[Lane]) -> None: ...

    def commit_ended(self, outcome: str) -> None: ...

    def lost(self, topic: str, count: int) -> None: ...
