"""What a fault does when another one at the same time takes its worker away."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults.catalogue import FAULTS


def worker(name: str) -> Any:
    member = SimpleNamespace(name=name, starts=1, running=True, frozen=False)
    member.freeze = lambda: setattr(member, "frozen", True)
    member.thaw = lambda: setattr(member, "frozen", False)
    return member


@pytest.mark.parametrize("started_again", [False, True])
async def test_zombie_when_its_worker_ends_all_the_same_then_another_one_is_frozen(
    started_again: bool,
) -> None:
    ending, staying = worker("worker-1"), worker("worker-2")
    picked = iter([ending, staying])
    group = {"worker-1", "worker-2"}
    reached = []

    async def pick(at_work: bool) -> Any:
        return next(picked)

    async def until(condition: Any, what: str) -> None:
        assert not await condition()
        if ending.frozen:
            ending.running = started_again
            ending.starts += started_again
        else:
            group.remove("worker-2")
        assert await condition()

    async def members() -> set[str]:
        return group

    async def results(fewest: int, most: int) -> None:
        assert staying.frozen and not ending.frozen
        reached.append(most)

    fleet = SimpleNamespace(running=[ending])
    scene: Any = SimpleNamespace(
        pick=pick, until=until, members=members, results=results, fleet=fleet, note=lambda line: None
    )
    await FAULTS["zombie"].inject(scene)

    assert reached and not staying.frozen
