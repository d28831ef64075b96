"""The tasks a worker can do, one file each, behind one short protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from inferstream.documents import Document, Prepared, Rejected


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model made a result; stands in every result and in the ``model_info`` metric."""

    id: str
    revision: str
    dtype: str


class Task(Protocol):
    """What the pipeline needs of a task.  Both methods are called from several worker threads at once."""

    name: str
    model: ModelInfo

    def prepare(self, documents: Sequence[Document]) -> list[Prepared | Rejected]:
        """Turn documents into model inputs (tokenise), one answer per document, in order."""
        ...

    def output(self, prepared: Prepared, vectors: np.ndarray) -> dict[str, Any]:
        """Build the result's ``output`` object from the device's rows, shape [chunks, width], float32."""
        ...
