"""Which shapes get a CUDA graph, and which of them a batch takes.  Pure; replay is in test_device_cuda.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu.feed import batched, mixed
from inferstream.device.forward import Shape
from inferstream.device.graphs import FREE_PADDING, LARGEST, MAX_PADDING, capacities, choose, planned
from inferstream.settings import SETTINGS

BUDGET, PLENTY = 32_768, 1 << 30
DEFAULT = SETTINGS["device.cuda_graphs"].default
BERT = capacities(BUDGET, 4096, 512)


def test_capacities_when_the_model_reads_512_tokens_are_the_small_ones_and_the_budget() -> None:
    assert BERT[0] == Shape(32, 256, 128)
    assert BERT[-3:] == [Shape(1024, LARGEST, 512), Shape(1024, BUDGET, 128), Shape(1024, BUDGET, 512)]


def test_planned_when_the_setting_is_the_default_are_the_smallest_and_the_budget() -> None:
    bert = planned(BUDGET, 4096, 512, most=DEFAULT, fitting_tokens=PLENTY)
    longer = planned(BUDGET, 4096, 8192, most=DEFAULT, fitting_tokens=PLENTY)

    assert len(bert) == len(longer) == DEFAULT
    assert [each.tokens for each in bert[-4:]] == [15_360, 15_360, BUDGET, BUDGET]
    assert [each.tokens for each in longer[-5:]] == [6656, 6656, BUDGET, BUDGET, BUDGET]
    assert [each.longest for each in longer[-3:]] == [128, 512, 8192]


def test_planned_when_graphs_are_few_or_none_are_the_budgets_first() -> None:
    assert planned(BUDGET, 4096, 512, most=0, fitting_tokens=PLENTY) == []
    assert planned(BUDGET, 4096, 512, most=1, fitting_tokens=PLENTY) == [Shape(1024, BUDGET, 128)]
    assert planned(BUDGET, 4096, 512, most=3, fitting_tokens=PLENTY) == [
        Shape(32, 256, 128),
        Shape(1024, BUDGET, 128),
        Shape(1024, BUDGET, 512),
    ]


@pytest.mark.parametrize("fitting", [0, 511, 512, 30_000, 2 * BUDGET - 1, 2 * BUDGET])
def test_planned_when_memory_is_short_leave_half_of_it_to_batches_without_a_graph(fitting: int) -> None:
    found = planned(BUDGET, 4096, 512, most=1000, fitting_tokens=fitting)

    assert found == [each for each in BERT if 2 * each.tokens <= fitting]


def test_choose_when_there_is_a_backlog_takes_the_budgets_graph_for_every_batch() -> None:
    available = planned(BUDGET, 4096, 512, most=DEFAULT, fitting_tokens=PLENTY)
    batches = batched(mixed(20_000, 512, 1000), BUDGET, padded=False)

    found = []
    for batch in batches:
        lengths = [len(document) for document in batch]
        found.append(choose(Shape(len(batch), sum(lengths), max(lengths)), available))

    assert len(found) > 40
    assert {each and each.tokens for each in found} == {BUDGET}


@pytest.mark.parametrize(
    ("most", "items", "length"),
    [(32_768, 4096, 512), (2048, 64, 256), (16_384, 10, 8192), (12_000, 4096, 512)],
)
def test_capacities_when_listed_are_in_order_and_within_the_bounds(
    most: int, items: int, length: int
) -> None:
    found = capacities(most, items, length)

    assert found == sorted(set(found), key=lambda each: (each.tokens, each.longest))
    assert all(each.tokens <= most and each.count <= items for each in found)
    assert all(each.longest <= min(length, each.tokens) for each in found)
    assert found[-1].tokens == most and found[-1].longest == min(length, most)


def test_capacities_when_the_budget_is_below_the_smallest_graph_are_none() -> None:
    assert capacities(255, 100, 100) == []


def test_choose_when_several_fit_takes_the_fewest_tokens_then_the_shortest() -> None:
    assert choose(Shape(3, 200, 90), BERT) == Shape(32, 256, 128)
    assert choose(Shape(3, 200, 190), BERT) == Shape(32, 256, 256)
    assert choose(Shape(3, 512, 200), BERT) == Shape(32, 512, 512)
    assert (
        choose(Shape(40, 256, 10), BERT) is None
    )  # with 256 tokens for nothing the next takes no more documents
    assert choose(Shape(1024, 16_384, 512), BERT) == Shape(1024, 16_384, 512)
    assert choose(Shape(600, 32_500, 512), BERT) == BERT[-1]


@pytest.mark.parametrize(
    "shape", [Shape(1, 20_000, 512), Shape(4000, 16_000, 4), Shape(2, 300, 2000), Shape(17, 16_385, 512)]
)
def test_choose_when_none_fits_is_eager(shape: Shape) -> None:
    assert choose(shape, BERT) is None


def test_choose_when_padding_would_be_more_than_the_bound_is_eager() -> None:
    available = [Shape(1000, 10_000, 512)]

    assert choose(Shape(1, 8800, 100), available) == available[0]
    assert choose(Shape(1, 8799, 100), available) is None


@given(count=st.integers(1, 1000), tokens=st.integers(1, 16_384), longest=st.integers(1, 512))
def test_choose_whatever_the_batch_gives_only_what_holds_it_without_too_many_dummies(
    count: int, tokens: int, longest: int
) -> None:
    shape = Shape(count, max(tokens, longest, count), longest)

    found = choose(shape, BERT)

    if found is not None:
        assert found.count >= shape.count and found.longest >= shape.longest and found.tokens >= shape.tokens
        assert found.tokens - shape.tokens <= max(FREE_PADDING, MAX_PADDING * found.tokens)


@given(tokens=st.integers(1, 16_384))
def test_choose_when_documents_are_of_usual_length_always_finds_one(tokens: int) -> None:
    assert choose(Shape(max(1, tokens // 60), tokens, min(tokens, 200)), BERT) is not None
