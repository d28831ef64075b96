"""The workers of a run and the orchestrator over them: what ends is started again, what /livez calls dead killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.broker import free_ports
from tests.support.worker import Worker, merged

LOOK_S = 0.05
PROBE_S = 1.0
FAILED_PROBES = 3  # in a row, before a worker is killed, as an orchestrator would do it
RESTART_S = 0.3
KILLED = -int(signal.SIGKILL)
CHANGE = re.compile(r'"message":"(assigned|revoked)"(.*)')
"""A line of a worker's log that tells of its partitions, and the facts behind it."""


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal, as proc(5) tells; True if it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is None or bool(int(caught[1], 16) >> (number - 1) & 1)


class Member:
    """One worker's place: its process ends and is followed by the next, its name, port and files stay."""

    def __init__(self, folder: Path, name: str, tree: Mapping[str, Any], under_orders: bool) -> None:
        self.name = name
        self.folder = folder / name
        self.order = self.folder / "order.json"
        [self.port] = free_ports(1)
        self.worker = Worker(
            self.folder,
            merged(tree, {"telemetry": {"port": self.port}}),
            environ={"FAULTS_ORDER": str(self.order)},
            module="tests.faults.worker" if under_orders else "inferstream",
        )
        self.wanted = True  # is started again when it ends
        self.frozen = False
        self.under_orders = False
        self.starts = 0
        self.ended_at = 0.0
        self._said_before = 0  # characters of its log that its predecessors wrote
        self.told: set[int] = set()  # exit codes that what we did to this process can have
        self.excused: set[int] = set()  # exit codes that the fault at hand may end it with
        self.failed_probes = 0

    def start(self) -> None:
        self.told = set()
        self.failed_probes = 0
        self.frozen = False
        self.starts += 1
        self._said_before = len(self.worker.stderr_text())
        self.worker.start()

    @property
    def running(self) -> bool:
        return self.starts > 0 and self.worker.returncode is None

    @property
    def at_work(self) -> bool:
        """Whether it runs and the group has given it partitions, as it says."""
        if not self.running or self.frozen:
            return False
        what, facts = (self._changes or [("", "")])[-1]
        return what == "assigned" and '"partitions":["' in facts

    @property
    def joined(self) -> bool:
        """Whether this process, which may have ended, has ever been given partitions, or none, by the group."""
        return bool(self._changes)

    @property
    def _changes(self) -> list[tuple[str, str]]:
        return CHANGE.findall(self.worker.stderr_text()[self._said_before :])

    def kill(self) -> None:
        if self.running:
            self.told.add(KILLED)
            self.frozen = False
            self.worker.kill9()

    def terminate(self) -> None:
        """SIGTERM; one that comes while the process has no handler for it ends it by the signal itself.

        That is so when it starts, and at its very end: one that is ending already may be that far.
        """
        if self.running:
            ending = bool(self.told | self.excused)
            self.told.add(0)
            if ending or not catches(self.worker.pid, signal.SIGTERM):
                self.told.add(-int(signal.SIGTERM))
            self.worker.terminate()

    def freeze(self) -> None:
        if self.running:
            self.frozen = True
            self.worker.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.frozen = False
        if self.running:
            self.worker.send_signal(signal.SIGCONT)

    def give_order(self, order: Mapping[str, Any]) -> None:
        """Tell the device what to do, in place of what it was told before; see :mod:`tests.faults.worker`."""
        self.under_orders = True
        self.order.with_suffix(".obeyed").unlink(missing_ok=True)
        partial = self.order.with_suffix(".new")
        partial.write_text(json.dumps(order))
        partial.rename(self.order)

    def take_order_back(self) -> None:
        self.under_orders = False
        self.order.unlink(missing_ok=True)

    @property
    def obeyed(self) -> bool:
        return self.order.with_suffix(".obeyed").exists()


class Fleet:
    """What ends otherwise than the fault at hand explains is in ``problems``.

    ``excused`` are the exit codes that it may end any worker with.  ``unheard``: brokers may be out of reach, so a
    drain may pass its deadline (6), and a worker that starts may wait in vain (3).  :meth:`settle` ends both, and what
    single members are excused for.
    """

    def __init__(
        self,
        folder: Path,
        make_tree: Callable[[str], Mapping[str, Any]],
        under_orders: bool,
        note: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._make_tree = make_tree
        self._under_orders = under_orders
        self._note = note
        self.excused: frozenset[int] = frozenset()
        self.unheard = False
        self.members: list[Member] = []
        self.problems: list[str] = []
        self.exits: list[tuple[str, int]] = []
        self.patience = FAILED_PROBES
        self._watch: asyncio.Task[None] | None = None

    def start(self, count: int) -> None:
        for _ in range(count):
            self.add()
        self._watch = asyncio.create_task(self._run(), name="orchestrator")

    def add(self) -> Member:
        name = f"worker-{len(self.members) + 1}"
        member = Member(self._folder, name, self._make_tree(name), self._under_orders)
        self.members.append(member)
        member.start()
        self._note(f"{name} starts")
        return member

    @property
    def running(self) -> list[Member]:
        """Those that are there and not frozen."""
        return [member for member in self.members if member.running and not member.frozen]

    def settle(self) -> None:
        """The fault is over: from now on nothing is excused by it."""
        self.excused = frozenset()
        self.unheard = False
        self.patience = FAILED_PROBES
        for member in self.members:
            member.excused.clear()

    async def drain(self, timeout_s: float = 60.0) -> None:
        """SIGTERM to all; every one has to end with 0."""
        members = [member for member in self.members if member.wanted or member.running]
        for member in members:
            member.wanted = False
            member.terminate()
        for member in members:
            try:
                await member.worker.ended(timeout_s)
            except AssertionError:
                self.problems.append(f"{member.name} does not drain within {timeout_s:.0f} s")
        await self.stop()
        for member in members:
            self._ended(member)

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None

    def kill_all(self) -> None:
        for member in self.members:
            member.wanted = False
            member.kill()

    async def _run(self) -> None:
        turn = 0
        while True:
            await asyncio.sleep(LOOK_S)
            turn += 1
            for member in list(self.members):
                if not member.running:
                    self._ended(member)
                    if member.wanted and time.monotonic() > member.ended_at + RESTART_S:
                        member.start()
                        self._note(f"{member.name} starts again")
                elif turn * LOOK_S % PROBE_S < LOOK_S and not member.frozen:
                    await self._probe(member)

    def _ended(self, member: Member) -> None:
        """Take note of an end, once."""
        if member.starts <= sum(name == member.name for name, _ in self.exits):
            return
        code = member.worker.returncode
        assert code is not None
        self.exits.append((member.name, code))
        member.ended_at = time.monotonic()
        self._note(f"{member.name} ended with {code}")
        allowed = member.told | member.excused | self.excused
        if self.unheard:
            allowed |= {6} if 0 in member.told else set()
            allowed |= set() if member.joined else {3}
        if code not in allowed:
            last = member.worker.stderr_text().splitlines()[-1:]
            self.problems.append(f"{member.name} ended by itself with exit code {code}: {last}")

    async def _probe(self, member: Member) -> None:
        """A refused connection is a worker that starts; only a 503 counts."""
        status = b""
        try:
            async with asyncio.timeout(0.5):
                reader, writer = await asyncio.open_connection("127.0.0.1", member.port)
                try:
                    writer.write(b"GET /livez HTTP/1.0\r\n\r\n")
                    status = await reader.readline()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return
        member.failed_probes = member.failed_probes + 1 if b" 503 " in status else 0
        if member.failed_probes >= self.patience:
            self._note(f"/livez calls {member.name} dead: killed")
            if not (member.told | member.excused | self.excused or self.unheard):
                self.problems.append(f"/livez calls {member.name} dead, which no fault explains")
            member.kill()
