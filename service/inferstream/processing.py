"""What is done to documents in the worker threads: before the device, and after it.

Nothing here knows of credit, queues or the order of things: from slots to pieces for the device, and from its rows to
outcomes.  Of a slot it sets only what the event loop reads when the answer is there (``prepared``, ``rows``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from inferstream.batching import Item
from inferstream.codec import Codec
from inferstream.documents import Document, Outgoing, Prepared, Reason, Record, Rejected, Stage
from inferstream.lanes import ADMITTED, Slot
from inferstream.tasks import Task

log = logging.getLogger(__name__)


class Processing:
    """The codec's and the task's part in each document."""

    def __init__(self, codec: Codec, task: Task) -> None:
        self.codec = codec
        self.task = task

    def prepare(
        self, admitted: tuple[float, list[Slot]]
    ) -> tuple[list[Slot], list[Item], list[tuple[Slot, Outgoing]]]:
        """In a worker thread: decode and tokenise; what cannot be becomes a dead letter.

        From when a chunk was admitted, and the chunk; gives it back, with what goes to the device and what does not.
        """
        admitted_at, chunk = admitted
        items: list[Item] = []
        answers: list[tuple[Slot, Outgoing]] = []
        slots: list[Slot] = []
        documents: list[Document] = []
        for slot in chunk:
            decoded = self._decode(slot.record)
            if isinstance(decoded, Document):
                slots.append(slot)
                documents.append(decoded)
            elif isinstance(decoded, Rejected):
                answers.append((slot, self.codec.dead_letter(slot.record, decoded)))
            else:
                answers.append((slot, decoded))
        answered = self._prepare_documents(documents)
        now = time.monotonic()
        for slot, prepared in zip(slots, answered, strict=True):
            if isinstance(prepared, Rejected):
                answers.append((slot, self.codec.dead_letter(slot.record, prepared)))
                continue
            slot.prepared = prepared
            if len(prepared.chunks) == 1:
                items.append(Item(slot, 0, prepared.lengths[0], now, prepared.chunks[0], admitted_at))
                continue
            slot.rows = [None] * len(prepared.chunks)
            for index, (piece, length) in enumerate(zip(prepared.chunks, prepared.lengths, strict=True)):
                items.append(Item(slot, index, length, now, piece, admitted_at))
        return chunk, items, answers

    def _decode(self, record: Record) -> Document | Rejected | Outgoing:
        try:
            return self.codec.decode(record)
        except Exception as error:  # what nobody foresaw in one record must not stop the others
            log.error("decoding one record raised", extra={"error": type(error).__name__})
            return Rejected(Reason.MODEL_ERROR, f"decoding raised {type(error).__name__}", Stage.PREPARE)

    def _prepare_documents(self, documents: list[Document]) -> list[Prepared | Rejected]:
        if not documents:
            return []
        try:
            return self.task.prepare(documents)
        except Exception as error:
            if len(documents) == 1:
                return [
                    Rejected(Reason.MODEL_ERROR, f"preparing raised {type(error).__name__}", Stage.PREPARE)
                ]
        # one of them is bad: alone, it harms only itself
        return [answer for document in documents for answer in self._prepare_documents([document])]

    def finish(
        self, batch: tuple[Sequence[Item], np.ndarray]
    ) -> tuple[int, list[tuple[Slot, Outgoing]], list[tuple[Item, np.ndarray]]]:
        """In a worker thread: from rows to serialised results; rows of chunked documents come back as they are.

        Gives how many pieces the batch had as well.
        """
        items, rows = batch
        finite = bool(np.isfinite(rows).all())
        answers: list[tuple[Slot, Outgoing]] = []
        parts: list[tuple[Item, np.ndarray]] = []
        for n, item in enumerate(items):
            slot: Slot = item.owner
            if slot.state != ADMITTED:
                continue  # dropped; the event loop looks again
            if slot.rows is None:
                answers.append((slot, self._finish_one(slot, rows[n : n + 1], finite)))
            else:
                parts.append((item, rows[n].copy()))  # not a view: it must not keep the batch alive
        return len(items), answers, parts

    def finish_chunked(self, slot: Slot) -> list[tuple[Slot, Outgoing]]:
        return [(slot, self._finish_one(slot, np.stack(slot.rows or []), finite=False))]

    def _finish_one(self, slot: Slot, rows: np.ndarray, finite: bool) -> Outgoing:
        """The result of a document from its rows, shape [chunks, width]; a dead letter if there is none.

        ``finite``: the rows are known to hold no NaN and no infinity, which JSON would turn into null in silence.
        """
        record, prepared = slot.record, slot.prepared
        try:
            assert prepared is not None
            if not finite and not np.isfinite(rows).all():
                raise ValueError("the model gave NaN or infinity")
            output = self.task.output(prepared, rows)
            result = self.codec.result(record, prepared, self.task.name, self.task.model, output)
        except Exception as error:
            log.error("finishing one document raised", extra={"error": repr(error)[:200]})
            result = Rejected(Reason.MODEL_ERROR, f"finishing raised {type(error).__name__}", Stage.FINISH)
        return self.codec.dead_letter(record, result) if isinstance(result, Rejected) else result
