"""The loop that people write first: poll, encode, send, commit.  ``python -m benchmarks.naive JSON``.

Prints ``{"ready": true}`` once the model is warm and the group has settled; then, for each SIGUSR1, what the model
computed since the last one.  Torch with its default number of threads, and encode() as it comes: batches of 32, the
longest texts first within one call.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from inferstream.models.files import locate


def load(model_id: str, dtype: str) -> Any:
    """The model as sentence-transformers loads it, warm."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(locate(model_id, None).folder),
        model_kwargs={"dtype": getattr(torch, dtype)},
        local_files_only=True,
    )
    model.encode(["warm up " * n for n in (1, 8, 64, 256)] * 8, show_progress_bar=False)
    return model


class Computed:
    """The tokens that go through a sentence-transformers model, and what they are with their padding."""

    def __init__(self, model: Any) -> None:
        self._tokens = self._padded = 0
        model[0].register_forward_pre_hook(self._count)

    def taken(self) -> dict[str, int]:
        """What there was since this was last asked."""
        found = {"tokens": self._tokens, "padded_tokens": self._padded}
        self._tokens = self._padded = 0
        return found

    def _count(self, _: Any, arguments: tuple[Any, ...]) -> None:
        mask = arguments[0]["attention_mask"]
        self._tokens += int(mask.sum())
        self._padded += mask.numel()


async def serve(
    options: dict[str, Any],
    embed: Callable[[list[str]], Awaitable[Sequence[np.ndarray]]],
    computed: Computed,
) -> None:
    """Answer what is in the topic for ever; ``embed`` gives a vector for each text."""
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGUSR1, lambda: print(json.dumps(computed.taken()), flush=True)
    )
    consumer = AIOKafkaConsumer(
        options["source"],
        bootstrap_servers=options["bootstrap"],
        group_id=options["group"],
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        max_poll_interval_ms=3_600_000,
    )
    producer = AIOKafkaProducer(
        bootstrap_servers=options["bootstrap"],
        enable_idempotence=True,
        compression_type=options["compression"],
    )
    await consumer.start()
    await producer.start()
    await assigned(consumer)
    print(json.dumps({"ready": True}), flush=True)
    while True:
        fetched = await consumer.getmany(timeout_ms=1000, max_records=options["max_records"])
        records = [record for found in fetched.values() for record in found]
        if not records:
            continue
        documents = [orjson.loads(record.value) for record in records]
        vectors = await embed([document["text"] for document in documents])
        sent = []
        for record, document, vector in zip(records, documents, vectors, strict=True):
            result = {"id": document["id"], "embedding": vector}
            value = orjson.dumps(result, option=orjson.OPT_SERIALIZE_NUMPY)
            sent.append(
                await producer.send(options["target"], value, key=record.key, partition=record.partition)
            )
        await asyncio.gather(*sent)
        await consumer.commit()


async def assigned(consumer: AIOKafkaConsumer) -> None:
    """Wait until the group has given partitions to this member."""
    while not consumer.assignment():  # noqa: ASYNC110 - aiokafka tells a listener only, which is no shorter
        await asyncio.sleep(0.1)


async def main(options: dict[str, Any]) -> None:
    model = load(options["model"], options["dtype"])

    async def embed(texts: list[str]) -> Sequence[np.ndarray]:
        found: Sequence[np.ndarray] = model.encode(texts, show_progress_bar=False)
        return found

    await serve(options, embed, Computed(model))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
