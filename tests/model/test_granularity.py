import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamerge import InputError
from adamerge.model.granularity import Block, Chunk, Column, Layer, Pattern, Row, TaskWise, by_name
from adamerge.model.groups import Segment, names_of
from tests.support.toy import group_ids

SHAPES = {
    "stem.weight": (4, 1, 2, 2),
    "blocks.0.up.weight": (7, 3),
    "blocks.0.up.bias": (7,),
    "blocks.10.up.weight": (2, 3),
    "scale": (),
}

names = st.sampled_from(["a", "b.0.w", "b.1.w", "b.1.v", "c.weight", "d"])
shapes = st.dictionaries(names, st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1)
granularities = st.one_of(
    st.sampled_from([TaskWise(), Block(), Layer(), Row(), Column()]),
    st.integers(0, 9).map(Chunk),
    st.builds(lambda number: Chunk({}, default=number), st.integers(0, 9)),
)


def ids(granularity, name, shapes=SHAPES):
    return group_ids(granularity(shapes), name, shapes[name])


@settings(max_examples=80)
@given(shapes, granularities)
def test_granularity_covers_every_entry_exactly_once(shapes, granularity):
    index = granularity(shapes)
    assert set(index.segments) == set(shapes)
    seen = set()
    for name, shape in shapes.items():
        groups = group_ids(index, name, shape)  # fails where segments overlap
        assert (groups >= 0).all(), f"{name}: an entry without a group"
        assert (groups < index.size).all()
        assert max((segment.stop for segment in index.segments[name]), default=0) == math.prod(shape)
        seen |= set(groups.flatten().tolist())
    assert seen <= set(range(index.size))
    if all(math.prod(shape) for shape in shapes.values()):
        assert seen == set(range(index.size)), "a group without an entry"


@settings(max_examples=80)
@given(shapes, granularities)
def test_granularity_labels_partition_the_groups(shapes, granularity):
    index = granularity(shapes)
    runs = sorted(index.labels.values())
    assert [first for first, _ in runs] == [sum(count for _, count in runs[:i]) for i in range(len(runs))]
    assert sum(count for _, count in runs) == index.size
    group_names = list(names_of(index))
    assert len(group_names) == len(set(group_names)) == index.size


def test_task_puts_everything_into_one_group():
    assert TaskWise()(SHAPES).size == 1
    assert TaskWise()(SHAPES).labels == {"all": (0, 1)}


def test_layer_gives_one_group_per_tensor_in_order():
    index = Layer()(SHAPES)
    assert index.size == len(SHAPES)
    for number, name in enumerate(SHAPES):
        assert (group_ids(index, name, SHAPES[name]) == number).all()


def test_row_follows_dimension_0():
    groups = ids(Row(), "blocks.0.up.weight")  # after the stem's 4 rows
    assert torch.equal(groups, (4 + torch.arange(7)).view(7, 1).expand(7, 3))
    assert torch.equal(ids(Row(), "stem.weight"), torch.arange(4).view(4, 1, 1, 1).expand(4, 1, 2, 2))
    assert torch.equal(ids(Row(), "blocks.0.up.bias"), 11 + torch.arange(7))
    assert Row()(SHAPES).size == 4 + 7 + 7 + 2 + 1


def test_column_follows_dimension_1_and_small_tensors_share():
    groups = ids(Column(), "blocks.0.up.weight")  # after the stem's one column
    assert torch.equal(groups, (1 + torch.arange(3)).expand(7, 3))
    assert (ids(Column(), "stem.weight") == 0).all()
    assert (ids(Column(), "blocks.0.up.bias") == 4).all()
    assert Column()(SHAPES).size == 1 + 3 + 1 + 3 + 1


def test_block_groups_by_everything_up_to_the_first_number():
    index = Block()(SHAPES)
    assert list(index.labels) == ["stem", "blocks.0", "blocks.10"]
    assert ids(Block(), "stem.weight").unique().tolist() == ids(Block(), "scale").unique().tolist() == [0]
    assert ids(Block(), "blocks.0.up.bias").unique().tolist() == [1]


def test_block_custom_pattern_decides():
    index = Block(r"up\.\w+")(SHAPES)
    assert list(index.labels) == ["stem", "up.weight", "up.bias"]


def test_pattern_first_match_decides_and_the_rest_is_one_group():
    index = Pattern({"bias": r"bias$", "blocks": r"^blocks"})(SHAPES)
    assert set(index.labels) == {"rest", "blocks", "bias"}
    assert ids(Pattern({"bias": r"bias$", "blocks": r"^blocks"}), "blocks.0.up.bias").unique().tolist() == [
        index.labels["bias"][0]
    ]


@pytest.mark.parametrize("groups", [{"x": "nothing"}, {"all": "", "shadowed": "bias"}])
def test_pattern_that_decides_nothing_is_named(groups):
    name = list(groups)[-1]
    with pytest.raises(
        InputError, match=rf"granularity\.groups\['{name}'\].*decides for no parameter\. Names look like"
    ):
        Pattern(groups)(SHAPES)


@pytest.mark.parametrize("granularity", [Pattern({"x": "("}), Block("[")])
def test_granularity_bad_regular_expression_is_named(granularity):
    with pytest.raises(InputError, match=r"granularity\..*'[\(\[]' is not a regular expression"):
        granularity(SHAPES)


def test_chunk_uneven_pieces_differ_by_at_most_one_entry():
    groups = ids(Chunk(4), "w", {"w": (5, 2)})
    assert groups.flatten().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]


def test_chunk_more_pieces_than_entries_gives_one_per_entry():
    index = Chunk(9)({"w": (2, 2), "s": ()})
    assert index.size == 4 + 1
    assert ids(Chunk(9), "w", {"w": (2, 2)}).flatten().tolist() == [0, 1, 2, 3]


def test_chunk_zero_pieces_freezes_the_tensor():
    index = Chunk({"scale": 0, "blocks.0.up.weight": 2})(SHAPES)
    assert index.frozen == (index.labels["scale"][0],)
    assert index.labels["blocks.0.up.weight"][1] == 2
    assert index.labels["stem.weight"][1] == 1  # the default


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        (Chunk(-1), r"granularity\.pieces.*expected a whole number >= 0, found -1"),
        (Chunk({"scale": -2}), r"granularity\.pieces, of 'scale': .*>= 0, found -2"),
        (Chunk({}, default=-1), r"of 'default': .*>= 0, found -1"),
        (Chunk(2.5), r"granularity\.pieces.*>= 0, found 2\.5"),
        (Chunk("many"), r"granularity\.pieces.*>= 0, found 'many'"),
        (Chunk({"scale": True}), r"of 'scale': .*>= 0, found True"),
        (Chunk({"scal": 2}), r"granularity\.pieces names no parameter 'scal'\. Did you mean 'scale'\?"),
    ],
)
def test_chunk_bad_pieces_are_named(granularity, message):
    with pytest.raises(InputError, match=message):
        granularity(SHAPES)


def test_by_name_unknown_lists_and_suggests():
    with pytest.raises(InputError, match=r"granularity: .*found 'colum'\. Did you mean 'column'\?"):
        by_name("colum")


def test_segment_stop_is_start_plus_entries():
    assert Segment(5, 2, 3, 4, 0).stop == 5 + 24


def test_group_names_say_label_and_position():
    assert list(names_of(Row()({"w": (2, 3), "s": ()}))) == ["w[0]", "w[1]", "s"]
