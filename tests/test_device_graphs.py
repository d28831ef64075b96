"""Which shapes get a CUDA graph, and which of them a batch takes.  Pure; replay is in test_device_cuda.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferstream.device.forward import Shape
from inferstream.device.graphs import FREE_PADDING, MAX_PADDING, capacities, choose
from inferstream.settings import SETTINGS

BERT = capacities(32_768, 4096, 512)


def test_capacities_when_the_model_reads_512_tokens_are_as_many_as_the_setting_allows() -> None:
    assert len(BERT) == SETTINGS["device.cuda_graphs"].default
    assert BERT[0] == Shape(32, 256, 128)
    assert BERT[-1] == Shape(1024, 16_384, 512)


@pytest.mark.parametrize(
    ("most", "items", "length"), [(32_768, 4096, 512), (2048, 64, 256), (16_384, 10, 8192)]
)
def test_capacities_when_listed_are_in_order_and_within_the_bounds(
    most: int, items: int, length: int
) -> None:
    found = capacities(most, items, length)

    assert found == sorted(set(found), key=lambda each: (each.tokens, each.longest))
    assert all(each.tokens <= most and each.count <= items for each in found)
    assert all(each.longest <= min(length, each.tokens) for each in found)
    assert {each.longest for each in found if each.tokens == found[-1].tokens} >= {min(length, most)}


def test_capacities_when_the_budget_is_below_the_smallest_graph_are_none() -> None:
    assert capacities(255, 100, 100) == []


def test_choose_when_several_fit_takes_the_fewest_tokens_then_the_shortest() -> None:
    assert choose(Shape(3, 200, 90), BERT) == Shape(32, 256, 128)
    assert choose(Shape(3, 200, 190), BERT) == Shape(32, 256, 256)
    assert choose(Shape(3, 512, 200), BERT) == Shape(32, 512, 512)
    assert (
        choose(Shape(40, 256, 10), BERT) is None
    )  # with 256 tokens for nothing the next takes no more documents
    assert choose(Shape(1024, 16_384, 512), BERT) == BERT[-1]


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
