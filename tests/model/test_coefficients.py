import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamerge import Coefficients, ExpertPool, InputError, merge
from adamerge.model.coefficients import load_coefficients, save_coefficients
from adamerge.model.constraints import Clamp, Sigmoid, Simplex
from adamerge.model.granularity import Block, Chunk, Layer, Pattern
from adamerge.model.groups import GroupIndex, Segment
from tests.support.pools import large_pool
from tests.support.toy import EXPERTS, make_toy

GRANULARITIES = [
    "task",
    "block",
    "layer",
    "chunk",
    "row",
    "column",
    Block(r"blocks|stem"),
    Chunk({"proj": 3, "stem.bias": 0}, default=2),
    Pattern({"down": r"down\.", "up": r"up\."}),
]
CONSTRAINTS = ["none", "box", "clamp", "sigmoid", "simplex", Simplex("at_most"), Clamp(-0.5, 0.75)]
POOL = make_toy().pool()


@dataclass(frozen=True)
class Halves:
    """A granularity of a user's own: two groups by the first letter of the name."""

    letter: str = "n"

    def __call__(self, shapes):
        segments = {
            name: (Segment(0, 1, 1, math.prod(shape), int(name < self.letter)),) for name, shape in shapes.items()
        }
        return GroupIndex(segments, {"late": (0, 1), "early": (1, 1)}, 2)


# Shape and initial values


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_coefficients_have_expert_axis_first_and_one_value_per_group(granularity):
    coefficients = Coefficients(POOL, granularity)
    assert coefficients().shape == (3, coefficients.index.size)
    assert coefficients().dtype == torch.float32
    assert len(coefficients.group_names) == len(set(coefficients.group_names)) == coefficients.index.size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coefficients_of_half_precision_models_stay_float32(dtype):
    toy = make_toy(dtype)
    assert Coefficients(toy.pool()).raw.dtype == torch.float32


def test_coefficients_of_float64_pools_are_float64():
    assert Coefficients(make_toy(torch.float64).pool()).raw.dtype == torch.float64


def test_coefficients_raw_is_the_only_parameter_and_the_only_entry_of_the_state_dict():
    coefficients = Coefficients(POOL, Chunk({"proj": 0}))
    assert [name for name, _ in coefficients.named_parameters()] == ["raw"]
    assert list(coefficients.state_dict()) == ["raw"]


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (0.25, [0.25, 0.25, 0.25]),
        (0, [0.0, 0.0, 0.0]),
        ("mean", [1 / 3, 1 / 3, 1 / 3]),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
        ({"blue": 0.3, "red": 0.1, "green": 0.2}, [0.1, 0.2, 0.3]),
        (torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), [0.1, 0.2, 0.3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("constraint", ["none", "box", "clamp", "sigmoid"])
def test_init_gives_these_coefficients_by_expert(init, expected, constraint):
    values = Coefficients(POOL, "layer", init, constraint)()
    # sigmoid: logit and back, and 1 is moved inside by 1e-6
    torch.testing.assert_close(values, torch.tensor(expected).unsqueeze(1).expand_as(values), rtol=0, atol=2e-6)


def test_init_large_sum_warns_with_remedy():
    with pytest.warns(UserWarning, match=r"init=1 for 3 experts: their sum 3\.0 usually overshoots.*try init=mean"):
        Coefficients(POOL, "task", init=1)


def test_init_tensor_of_experts_and_groups_is_taken_as_it_is():
    values = torch.rand(3, Coefficients(POOL, "layer").index.size)
    assert torch.equal(Coefficients(POOL, "layer", values)(), values)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("average", r"init.*no number, .*'mean' or .*, found 'average'"),
        ({"red": 0.1}, r"init: expected one number for each of 'red', 'green', 'blue', found 'red'"),
        ({"red": 0.1, "green": 0.1, "blu": 0.1}, r"init: expected one number for each of 'red'.*'blu'"),
        ([0.1, 0.2], r"init: expected a number, 3 numbers or a tensor \(3, 1\), found \[0\.1, 0\.2\]"),
        (torch.zeros(2, 2), r"init: expected .* tensor \(3, 1\), found shape \(2, 2\)"),
        (torch.zeros(1, 3, 1), r"init: expected .* tensor \(3, 1\), found shape \(1, 3, 1\)"),
        (math.nan, r"init: contains NaN or infinite values"),
        ([0.1, math.inf, 0.1], r"init: contains NaN or infinite values"),
        (["a", "b", "c"], r"init: expected a number, 3 numbers or a tensor \(3, 1\), found \['a', 'b', 'c'\]"),
        (None, r"init: expected a number, 3 numbers or a tensor \(3, 1\), found None"),
        ({"red": "x", "green": 0.1, "blue": 0.1}, r"init: expected a number, 3 numbers .* found \{'red': 'x'"),
    ],
    ids=str,
)
def test_init_that_does_not_fit_is_named(init, message):
    with pytest.raises(InputError, match=message):
        Coefficients(POOL, "task", init)


def test_init_simplex_is_feasible_from_the_start():
    coefficients = Coefficients(POOL, "layer", 0.3, "simplex")
    torch.testing.assert_close(coefficients().sum(0), torch.ones(coefficients.index.size))


def test_coefficients_unknown_options_suggest():
    with pytest.raises(InputError, match=r"granularity: .*found 'layers'\. Did you mean 'layer'"):
        Coefficients(POOL, "layers")
    with pytest.raises(InputError, match=r"constraint: .*found 'boxes'\. Did you mean 'box'"):
        Coefficients(POOL, constraint="boxes")


# Moving


def test_project_moves_raw_back_and_assign_sets_values():
    coefficients = Coefficients(POOL, "task")
    with torch.no_grad():
        coefficients.raw.copy_(torch.tensor([[-1.0], [0.5], [2.0]]))
    coefficients.project()
    assert torch.equal(coefficients(), torch.tensor([[0.0], [0.5], [1.0]]))
    coefficients.assign(torch.tensor([[0.2], [0.4], [7.0]]))
    assert torch.equal(coefficients(), torch.tensor([[0.2], [0.4], [1.0]]))
    assert coefficients.raw.requires_grad


@pytest.mark.parametrize("constraint", ["none", "box", "clamp", "sigmoid", "simplex"])
def test_frozen_chunks_keep_their_initial_value_whatever_the_step(constraint):
    coefficients = Coefficients(POOL, Chunk({"proj": 0}), init=0.3, constraint=constraint)
    (frozen,) = coefficients.index.frozen
    before = coefficients().detach().clone()
    optimizer = torch.optim.SGD(coefficients.parameters(), lr=0.1)
    coefficients().pow(2).sum().backward()
    assert torch.equal(coefficients.raw.grad[:, frozen], torch.zeros(3))
    optimizer.step()
    coefficients.project()
    after = coefficients().detach()
    assert torch.equal(after[:, frozen], before[:, frozen])
    moved = (after != before).any(0)
    assert moved.sum() == (0 if constraint == "simplex" else coefficients.index.size - 1)


def test_groups_name_the_groups_of_each_parameter():
    groups = Coefficients(POOL, "row").groups
    assert list(groups) == list(POOL.names)
    assert [len(groups[name]) for name in POOL.names] == [(shape or (1,))[0] for shape in POOL.shapes.values()]
    assert sorted(group for numbers in groups.values() for group in numbers) == list(
        range(Coefficients(POOL, "row").index.size)
    )


# By name, out and in


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_from_dict_of_to_dict_through_json_gives_the_same_bits(granularity, constraint):
    coefficients = Coefficients(POOL, granularity, constraint=constraint)
    with torch.no_grad():
        coefficients.raw.add_(torch.randn_like(coefficients.raw) * 0.1)
        coefficients.project()
    content = json.loads(json.dumps(coefficients.to_dict()))
    assert torch.equal(Coefficients.from_dict(POOL, content)(), coefficients())


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_to_dict_any_float32_round_trips_exactly(values):
    coefficients = Coefficients(POOL, "task", values, "none")
    content = json.loads(json.dumps(coefficients.to_dict()))
    assert Coefficients.from_dict(POOL, content)().flatten().tolist() == torch.tensor(values).tolist()


def test_from_dict_experts_in_another_order_are_paired_by_name():
    toy = make_toy()
    pool = toy.pool()
    coefficients = Coefficients(pool, "layer", torch.rand(3, len(pool.names)))
    reordered = ExpertPool.from_state_dicts(toy.base, {name: toy.experts[name] for name in reversed(EXPERTS)})
    restored = Coefficients.from_dict(reordered, coefficients.to_dict())
    assert torch.equal(restored(), coefficients().flip(0))


def test_from_dict_groups_in_another_order_are_paired_by_name():
    toy = make_toy()
    coefficients = Coefficients(toy.pool(), "row", torch.rand(3, Coefficients(toy.pool(), "row").index.size))
    base = dict(reversed(toy.base.items()))
    reordered = ExpertPool.from_state_dicts(base, toy.experts)
    restored = Coefficients.from_dict(reordered, coefficients.to_dict())
    merged, again = merge(toy.pool(), coefficients), merge(reordered, restored)
    assert list(merged) == list(reversed(again))
    assert all(torch.equal(merged[name], again[name]) for name in merged)


def test_from_dict_own_granularity_needs_its_object():
    coefficients = Coefficients(POOL, Halves(), torch.rand(3, 2))
    content = coefficients.to_dict()
    assert content["granularity"] == {"name": "tests.model.test_coefficients.Halves", "letter": "n"}
    message = r"granularity 'tests\.model\.test_coefficients\.Halves' is not built in .* Pass the granularity"
    with pytest.raises(InputError, match=message):
        Coefficients.from_dict(POOL, content)
    assert torch.equal(Coefficients.from_dict(POOL, content, granularity=Halves())(), coefficients())


def test_to_dict_says_what_it_was_made_with():
    content = Coefficients(POOL, Chunk(2), constraint=Sigmoid()).to_dict()
    assert content["granularity"] == {"name": "chunk", "pieces": 2, "default": 1}
    assert content["constraint"] == "sigmoid"
    assert content["experts"] == list(EXPERTS)
    assert Coefficients(POOL, "task", constraint="none").to_dict()["constraint"] == "none"


CHANGES = [
    (lambda c: c.pop("experts"), r"not a coefficients file: the keys 'experts' are missing"),
    (lambda c: c.update(format=99), r"format 99 is not 1; update adamerge"),
    (lambda c: c.update(experts=["red", "green"]), r"made for the experts 'red', 'green', but the pool has 'red', 'gr"),
    (lambda c: c.update(experts=3), r"not a coefficients file: 'experts' .* expected a list"),
    (lambda c: c.update(coefficients=[]), r"not a coefficients file: 'coefficients' .* expected a mapping"),
    (lambda c: c["coefficients"].update(red=0.3), r"not a coefficients file: 'coefficients' .* expected a mapping"),
    (lambda c: c["coefficients"].pop("red"), r"made for the experts .*, but"),
    (lambda c: c["coefficients"]["red"].pop("proj"), r"groups of expert 'red' are not this pool's: missing 'proj'"),
    (lambda c: c["coefficients"]["red"].update(x=1), r"groups of expert 'red' .* not in the pool 'x'"),
    (lambda c: c["coefficients"]["red"].update(proj=[1, 2]), r"expert 'red', 'proj': expected 1 numbers, found .1, 2."),
    (lambda c: c["coefficients"]["red"].update(proj="x"), r"expert 'red', 'proj': expected 1 numbers, found 'x'"),
    (lambda c: c["coefficients"]["red"].update(proj=None), r"expert 'red', 'proj': expected 1 numbers, found None"),
    (lambda c: c["coefficients"]["red"].update(proj=math.nan), r"contains NaN or infinite coefficients"),
    (lambda c: c.update(granularity="layers"), r"granularity 'layers' is not built in"),
    (lambda c: c.update(granularity={"name": "task", "x": 1}), r"granularity 'task' does not take these options"),
    (lambda c: c.update(granularity={"name": "chunk", "pieces": "x"}), r"expected a whole number >= 0, found 'x'"),
    (lambda c: c.update(granularity={"name": "block", "pattern": 3}), r"granularity\.pattern: 3 is not a regular"),
    (lambda c: c.update(granularity={"name": "pattern", "groups": [1]}), r"granularity\.groups: .*found \[1\]"),
    (lambda c: c.update(pool="x"), r"not a coefficients file: 'pool' .* expected a mapping"),
    (lambda c: c.update(pool={"red": "0" * 64}), r"belongs to another pool: the content of 'red' differs"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message[:30] for _, message in CHANGES])
def test_from_dict_bad_content_is_named_with_its_source(change, message):
    content = json.loads(json.dumps(Coefficients(POOL, Layer()).to_dict()))
    change(content)
    with pytest.raises(InputError, match=rf"^my\.json: .*{message}"):
        Coefficients.from_dict(POOL, content, source="my.json")


@pytest.mark.parametrize("content", [None, [], 3, "x"])
def test_from_dict_not_a_mapping_is_named(content):
    with pytest.raises(InputError, match=r"my\.json: not a coefficients file: the keys 'format', .* are missing"):
        Coefficients.from_dict(POOL, content, source="my.json")


# Files


def test_save_coefficients_then_load_gives_the_same_bits(tmp_path):
    coefficients = Coefficients(POOL, "row", torch.rand(3, Coefficients(POOL, "row").index.size))
    save_coefficients(coefficients, tmp_path / "coefficients.json", POOL)
    assert [path.name for path in tmp_path.iterdir()] == ["coefficients.json"]
    assert torch.equal(load_coefficients(tmp_path / "coefficients.json", POOL)(), coefficients())
    content = json.loads((tmp_path / "coefficients.json").read_text())
    assert content["pool"] == POOL.hashes()
    assert content["task_vectors"]["dtype"] == "float32"
    assert content["task_vectors"]["transform"] is None


def test_save_coefficients_above_10000_values_go_beside_the_json(tmp_path):
    pool = large_pool()
    coefficients = Coefficients(pool, "row", torch.rand(2, 6003))
    save_coefficients(coefficients, tmp_path / "coefficients.json", pool)
    assert {path.name for path in tmp_path.iterdir()} == {"coefficients.json", "coefficients.safetensors"}
    assert (tmp_path / "coefficients.json").stat().st_size < 2000
    assert torch.equal(load_coefficients(tmp_path / "coefficients.json", pool)(), coefficients())


def test_load_coefficients_tensor_file_gone_is_named(tmp_path):
    pool = large_pool()
    save_coefficients(Coefficients(pool, "row"), tmp_path / "coefficients.json", pool)
    (tmp_path / "coefficients.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"coefficients\.safetensors: no such file"):
        load_coefficients(tmp_path / "coefficients.json", pool)


def test_load_coefficients_tensor_file_of_another_run_is_refused(tmp_path):
    pool = large_pool()
    for name, init in (("a", 0.1), ("b", 0.2)):
        save_coefficients(Coefficients(pool, "row", init), tmp_path / f"{name}.json", pool)
    (tmp_path / "b.safetensors").replace(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.json: a\.safetensors is not the file that was written with it"):
        load_coefficients(tmp_path / "a.json", pool)


def test_load_coefficients_of_another_pool_is_refused(tmp_path):
    save_coefficients(Coefficients(POOL), tmp_path / "coefficients.json", POOL)
    other = make_toy()
    other.experts["green"]["proj"] += 1
    with pytest.raises(InputError, match=r"belongs to another pool: the content of 'green' differs"):
        load_coefficients(tmp_path / "coefficients.json", other.pool())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_load_coefficients_not_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json: not readable as JSON"):
        load_coefficients(tmp_path / "x.json", POOL)


def test_load_coefficients_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        load_coefficients(tmp_path / "nothing.json", POOL)
