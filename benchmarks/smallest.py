"""The smallest aiokafka loop that writes what builtin:hash writes.  ``python -m benchmarks.smallest JSON``.

The same result records, and nothing else: no validation, no dead letters, no order to keep, no bound on memory,
one poll after the other in one thread.  Prints ``{"ready": true}`` once the group has settled.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from benchmarks.naive import assigned
from inferstream.tasks.hash import digest, hash_vectors

BATCH_BYTES = 512 * 1024
MODEL = {"id": "builtin:hash", "revision": "1", "dtype": "float32"}


async def serve(options: dict[str, Any]) -> None:
    consumer = AIOKafkaConsumer(
        options["source"],
        bootstrap_servers=options["bootstrap"],
        group_id=options["group"],
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    producer = AIOKafkaProducer(
        bootstrap_servers=options["bootstrap"],
        enable_idempotence=True,
        compression_type=options["compression"],
        max_batch_size=BATCH_BYTES,
    )
    await consumer.start()
    await producer.start()
    await assigned(consumer)
    print(json.dumps({"ready": True}), flush=True)
    while True:
        fetched = await consumer.getmany(timeout_ms=1000)
        sent = []
        for partition, records in fetched.items():
            documents = [orjson.loads(record.value) for record in records]
            vectors = hash_vectors([digest(document["text"]) for document in documents])
            batch = producer.create_batch()
            for record, document, vector in zip(records, documents, vectors, strict=True):
                value = orjson.dumps(result(record, document, vector), option=orjson.OPT_SERIALIZE_NUMPY)
                if batch.append(timestamp=None, key=record.key, value=value) is None:
                    batch.close()
                    sent.append(
                        await producer.send_batch(batch, options["target"], partition=partition.partition)
                    )
                    batch = producer.create_batch()
                    batch.append(timestamp=None, key=record.key, value=value)
            batch.close()
            sent.append(await producer.send_batch(batch, options["target"], partition=partition.partition))
        await asyncio.gather(*sent)
        if sent:
            await consumer.commit()


def result(record: Any, document: dict[str, Any], vector: np.ndarray) -> dict[str, Any]:
    return {
        "id": document["id"],
        "task": "embed",
        "model": MODEL,
        "output": {"embedding": vector, "dimensions": len(vector)},
        "usage": {"tokens": len(document["text"]) // 4 + 1, "truncated": False, "chunks": 1},
        "source": {
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "timestamp_ms": record.timestamp,
        },
    }


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
