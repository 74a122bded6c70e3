"""The streaming selection against sorting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamerge.errors import InputError
from adamerge.transforms.selection import kth_smallest


def pieces(vectors, width):
    return lambda: iter(vectors.split(width, dim=1))


def by_sorting(vectors, k):
    ordered = vectors.sort(dim=1).values
    return torch.stack([row[rank - 1] for row, rank in zip(ordered, k, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=st.integers(0, 1000), size=st.integers(1, 200), width=st.integers(1, 64), data=st.data())
def test_selection_equals_sorting(dtype, seed, size, width, data):
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 4, (3, size), generator=generator)
    vectors = (torch.randn(3, size, generator=generator, dtype=torch.float64) * scale).to(dtype)
    k = [data.draw(st.integers(1, size)) for _ in range(3)]
    found = kth_smallest(pieces(vectors, width), k)
    expected = by_sorting(vectors, k)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@given(values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, float("inf"), -2.5]), min_size=1))
def test_selection_counts_repeated_values_and_extremes(values):
    vectors = torch.tensor([values])
    for rank in range(1, len(values) + 1):
        assert torch.equal(kth_smallest(pieces(vectors, 3), [rank]), by_sorting(vectors, [rank]))


def test_selection_reads_float32_three_times_and_float64_six_times():
    for dtype, passes in ((torch.float32, 3), (torch.float64, 6)):
        calls = []

        def tiles(dtype=dtype, calls=calls):
            calls.append(1)
            return iter([torch.arange(4, dtype=dtype)[None]])

        assert kth_smallest(tiles, [2]).item() == 1
        assert len(calls) == 1 + passes  # the first shows dtype and number of experts


def test_selection_takes_pieces_that_are_overwritten():
    buffer = torch.empty(2, 1)

    def tiles():
        for value in (3.0, -5.0, 4.0):
            yield buffer.fill_(value)

    assert kth_smallest(tiles, [1, 3]).tolist() == [-5, 4]


@pytest.mark.parametrize("k", [[0], [4], [1, 1], []])
def test_selection_rank_outside_the_vector_is_refused(k):
    with pytest.raises(InputError, match="expected a rank"):
        kth_smallest(lambda: [torch.ones(1, 3)], k)


def test_selection_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least one tile"):
        kth_smallest(list, [1])
