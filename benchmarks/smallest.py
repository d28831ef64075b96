"""The smallest aiokafka loop that could do what builtin:hash does.  ``python -m benchmarks.smallest JSON``.

No validation, no headers, no dead letters, no order to keep, no bound on memory; one thread.  It writes the id
and the same vector.  Prints ``{"ready": true}`` once the group has settled.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from inferstream.tasks.hash import digest, hash_vectors

BATCH_BYTES = 512 * 1024


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
    while not consumer.assignment():
        await asyncio.sleep(0.1)
    print(json.dumps({"ready": True}), flush=True)
    while True:
        fetched = await consumer.getmany(timeout_ms=1000)
        sent = []
        for partition, records in fetched.items():
            documents = [orjson.loads(record.value) for record in records]
            vectors = hash_vectors([digest(document["text"]) for document in documents])
            batch = producer.create_batch()
            for record, document, vector in zip(records, documents, vectors, strict=True):
                result = {"id": document["id"], "embedding": vector}
                value = orjson.dumps(result, option=orjson.OPT_SERIALIZE_NUMPY)
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


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
