"""Transforms of task vectors, and the pool that applies them."""

import pytest
import torch
from toy import Toy

from adamerge import Coefficients, ExpertPool, InputError, merge
from adamerge.coefficients import load_coefficients, save_coefficients
from adamerge.transforms import Trim


def test_trim_full_density_is_the_identity():
    tau = torch.randn(3, 4, 5)
    assert torch.equal(Trim(1.0)(tau.clone()), tau)


@pytest.mark.parametrize("shape", [(3, 10, 7), (3, 9), (3,), (2, 4, 3, 2, 2)])
def test_trim_keeps_exactly_the_largest(shape):
    tau = torch.randn(shape)
    trimmed = Trim(0.3)(tau.clone())
    entries = tau[0].numel()
    for before, after in zip(tau.reshape(shape[0], -1), trimmed.reshape(shape[0], -1), strict=True):
        kept = after != 0
        assert kept.sum() == max(1, int(0.3 * entries))
        assert torch.equal(after[kept], before[kept])
        assert kept.all() or before[kept].abs().min() >= before[~kept].abs().max()


def test_trim_ties_keep_the_first():
    assert Trim(0.5)(torch.tensor([[1.0, -1.0, 1.0, 1.0]])).tolist() == [[1.0, -1.0, 0.0, 0.0]]


@pytest.mark.parametrize("density", [0, -1, 1.5])
def test_trim_density_outside_is_refused(density):
    with pytest.raises(InputError, match=r"transform\.density: expected a number in \(0, 1\]"):
        Trim(density)


def test_pool_transform_changes_task_vectors_not_teachers(toy: Toy):
    raw = toy.pool()
    pool = ExpertPool.from_state_dicts(toy.base, toy.experts, transform=Trim(0.5))
    for name in pool.names:
        assert torch.equal(pool.task_vectors(name), Trim(0.5)(raw.task_vectors(name)))
    for name, tensor in raw.expert_parameters("red").items():
        assert torch.equal(pool.expert_parameters("red")[name], tensor)
    merged = merge(pool, Coefficients(pool, "task", 0.5, "none"), detach=True)
    name = pool.names[0]
    assert torch.allclose(merged[name], pool.base[name] + 0.5 * pool.task_vectors(name).sum(0))


def test_pool_transform_of_wrong_shape_is_refused(toy: Toy):
    with pytest.raises(InputError, match=r"parameter '.*': expected finite task vectors of shape \(3, .*found shape"):
        ExpertPool.from_state_dicts(toy.base, toy.experts, transform=lambda tau: tau[:1])


def test_coefficients_of_another_transform_are_refused(toy: Toy, tmp_path):
    trimmed = ExpertPool.from_state_dicts(toy.base, toy.experts, transform=Trim(0.5))
    save_coefficients(Coefficients(trimmed, "layer"), tmp_path / "c.json", trimmed)
    assert torch.equal(load_coefficients(tmp_path / "c.json", trimmed)(), Coefficients(trimmed, "layer")())
    with pytest.raises(InputError, match=r"made for the task vectors .*'trim'.*transform': None"):
        load_coefficients(tmp_path / "c.json", toy.pool())


def test_coefficients_of_other_parameters_are_refused(toy: Toy, tmp_path):
    fewer = toy.pool(exclude=["stem.*"])
    save_coefficients(Coefficients(fewer, "task"), tmp_path / "c.json", fewer)
    with pytest.raises(InputError, match=r"same dtype, transform and parameters \(include, exclude\)"):
        load_coefficients(tmp_path / "c.json", toy.pool())
