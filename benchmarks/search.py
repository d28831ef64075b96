"""Where something that rises with a rate first reaches a bound, if every single measurement of it is noisy."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Crossing:
    """``below`` and ``reached`` are neighbours: at the one the median stays below the bound, at the other it does not.

    ``runs`` are all measurements by rate.  Both rates are None where the runs allowed did not settle them.
    """

    below: int | None
    reached: int | None
    runs: dict[int, list[float]]


async def first_reaching(
    measure: Callable[[int], Awaitable[float]],
    bound: float,
    below: int,
    reached: int,
    *,
    step: int,
    rounds: int,
    most: int,
) -> Crossing:
    """Bisect between two rates, a measurement each; then judge the neighbours that remain by ``rounds`` of each.

    A single measurement may have led the wrong way, and the two rates given may be wrong: while the medians of the
    neighbours do not have the bound between them, the pair moves by a step towards it.  Rates are multiples of
    ``step`` if those given are, and above 0; ``most`` measurements are made.
    """
    runs: dict[int, list[float]] = {}
    made = 0

    async def again(rate: int) -> float:
        nonlocal made
        made += 1
        found = await measure(rate)
        runs.setdefault(rate, []).append(found)
        return found

    while reached - below > step and made < most:
        middle = below + (reached - below) // (2 * step) * step
        if await again(middle) < bound:
            below = middle
        else:
            reached = middle
    while below > 0:
        for rate in (below, reached):
            while len(runs.get(rate, ())) < rounds:
                if made >= most:
                    return Crossing(None, None, runs)
                await again(rate)
        if statistics.median(runs[below]) >= bound:
            below, reached = below - step, below
        elif statistics.median(runs[reached]) < bound:
            below, reached = reached, reached + step
        else:
            return Crossing(below, reached, runs)
    return Crossing(None, None, runs)
