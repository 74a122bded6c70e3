"""The pool that applies a transform, and what is recorded of it."""

import pytest
import torch

from adamerge import Coefficients, ExpertPool, InputError, merge
from adamerge.checkpoints.checkpoint import MemoryCheckpoint
from adamerge.model.coefficients import load_coefficients, save_coefficients
from adamerge.pool.options import PoolOptions
from adamerge.transforms import Dare, Lines, Tall, Ties, Trim
from tests.support.toy import Toy, save_files


def test_pool_transform_changes_task_vectors_not_teachers(toy: Toy):
    raw = toy.pool()
    pool = ExpertPool.from_state_dicts(toy.base, toy.experts, transform=Trim(0.5))
    for name in pool.names:
        assert torch.equal(pool.task_vectors(name), Trim(0.5)(name, raw.task_vectors(name)))
    for name, tensor in raw.expert_parameters("red").items():
        assert torch.equal(pool.expert_parameters("red")[name], tensor)
    merged = merge(pool, Coefficients(pool, "task", 0.5, "none"), detach=True)
    name = pool.names[0]
    assert torch.allclose(merged[name], pool.base[name] + 0.5 * pool.task_vectors(name).sum(0))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda name, tau: tau[:1], r"parameter '.*': expected finite task vectors of shape \(3, .*found shape"),
        (lambda name, tau: tau / 0, r"parameter '.*': expected finite task vectors .* with NaN"),
        (lambda tau: tau, r"expected a call with .*\(name, task_vectors\)"),
        (lambda name, tau: tau * 0, r"Every expert is identical to the base base after the transform function"),
        (Tall(0), r"Experts 'red' and 'green' have identical weights after the transform Tall"),
    ],
)
def test_pool_transform_that_does_not_fit_is_refused(toy: Toy, transform, message):
    with pytest.raises(InputError, match=message):
        ExpertPool.from_state_dicts(toy.base, toy.experts, transform=transform)


def test_pool_with_an_unchanged_parameter_is_transformed(toy: Toy):
    for expert in toy.experts.values():
        expert["stem.weight"] = toy.base["stem.weight"].clone()
    pool = ExpertPool.from_state_dicts(toy.base, toy.experts, transform=Lines())
    assert "stem.weight" in pool.fixed
    assert "stem.weight" not in pool.names


def test_pool_parameter_that_a_transform_empties_stays_at_the_base(toy: Toy):
    for expert in toy.experts.values():
        expert["proj"] = toy.base["proj"] + 1e-6 * torch.randn_like(toy.base["proj"])
    pool = ExpertPool.from_state_dicts(toy.base, toy.experts, transform=Ties(0.1))
    assert pool.skipped["proj"] == "no expert changed it after the transform Ties"
    assert torch.equal(merge(pool, Coefficients(pool), detach=True)["proj"], toy.base["proj"])


def test_pool_statistics_come_from_the_files_not_from_rounded_vectors(toy: Toy, tmp_path):
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    exact = ExpertPool.from_files(base, experts, transform=Ties(0.3))
    rounded = ExpertPool.from_files(base, experts, transform=Ties(0.3), dtype=torch.bfloat16)
    for name in exact.names:
        assert torch.equal(exact.task_vectors(name).bfloat16(), rounded.task_vectors(name).bfloat16())


@pytest.mark.parametrize(
    ("made", "other"), [(Trim(0.5), None), (Dare(0.5, seed=1), Dare(0.5, seed=2)), (Ties(), Ties(scope="tensor"))]
)
def test_coefficients_of_another_transform_are_refused(toy: Toy, tmp_path, made, other):
    pool = ExpertPool.from_state_dicts(toy.base, toy.experts, transform=made)
    save_coefficients(Coefficients(pool, "layer"), tmp_path / "c.json", pool)
    assert torch.equal(load_coefficients(tmp_path / "c.json", pool)(), Coefficients(pool, "layer")())
    with pytest.raises(InputError, match=r"made for the task vectors .*'transform'"):
        load_coefficients(tmp_path / "c.json", ExpertPool.from_state_dicts(toy.base, toy.experts, transform=other))


def test_coefficients_of_other_parameters_are_refused(toy: Toy, tmp_path):
    fewer = toy.pool(exclude=["stem.*"])
    save_coefficients(Coefficients(fewer, "task"), tmp_path / "c.json", fewer)
    with pytest.raises(InputError, match=r"same dtype, transform and parameters \(include, exclude\)"):
        load_coefficients(tmp_path / "c.json", toy.pool())


def test_duplicates_are_allowed_with_a_transform_too(toy: Toy):
    name = next(iter(toy.experts))
    experts = {key: MemoryCheckpoint(key, toy.experts[name]) for key in ("a", "copy")}
    pool = ExpertPool(MemoryCheckpoint("base", toy.base), experts, PoolOptions(transform=Ties(), duplicates="allow"))
    first, second = pool.task_vectors(pool.names[0])
    assert torch.equal(first, second)
