import pytest
import torch

from adamerge import InputError, Outputs
from adamerge.model.task_step import TaskStep
from adamerge.model.teachers import TeacherCache
from adamerge.objectives.imitation import Imitation


def outputs(indices: torch.Tensor, hidden: tuple[str, ...] = ()) -> Outputs:
    """Values that say which sample they belong to."""
    values = indices.float().unsqueeze(1)
    return Outputs(values * 10, values * 100, {name: values.view(-1, 1, 1) * 1000 for name in hidden})


def test_get_unknown_task_or_index_is_none():
    cache = TeacherCache()
    assert cache.get("a", torch.tensor([0])) is None
    cache.put("a", torch.tensor([0, 5]), outputs(torch.tensor([0, 5])))
    assert cache.get("a", torch.tensor([0, 4])) is None
    assert cache.get("a", torch.tensor([0, 500])) is None
    assert cache.get("b", torch.tensor([0])) is None


def test_get_returns_rows_in_the_order_asked_across_puts():
    cache = TeacherCache()
    for start in (0, 300, 7):
        indices = torch.tensor([start, start + 2])
        cache.put("a", indices, outputs(indices, ("layer",)))
    wanted = torch.tensor([302, 0, 9, 9])
    got, expected = cache.get("a", wanted), outputs(wanted, ("layer",))
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.features, expected.features)
    assert torch.equal(got.hidden["layer"], expected.hidden["layer"])


def test_put_tasks_are_kept_apart():
    cache = TeacherCache()
    cache.put("a", torch.tensor([1]), outputs(torch.tensor([1])))
    cache.put("b", torch.tensor([1]), outputs(torch.tensor([2])))
    assert cache.get("a", torch.tensor([1])).logits.item() == 10
    assert cache.get("b", torch.tensor([1])).logits.item() == 20


def test_put_keeps_no_gradient_and_no_reference():
    cache = TeacherCache()
    values = torch.ones(1, 2, requires_grad=True) * 2
    cache.put("a", torch.tensor([0]), Outputs(values, values + 1, {"layer": values + 2}))
    got = cache.get("a", torch.tensor([0]))
    assert not any(tensor.requires_grad for tensor in (got.logits, got.features, *got.hidden.values()))
    got.logits.zero_()
    assert torch.equal(cache.get("a", torch.tensor([0])).logits, values)


def test_put_other_hidden_layers_start_the_task_anew():
    cache = TeacherCache()
    cache.put("a", torch.tensor([0]), outputs(torch.tensor([0])))
    cache.put("a", torch.tensor([1]), outputs(torch.tensor([1]), ("layer",)))
    assert cache.get("a", torch.tensor([0])) is None, "row 0 has no hidden layer"
    assert cache.get("a", torch.tensor([1])).hidden["layer"].item() == 1000


def test_memory_follows_the_samples_that_were_put_not_their_positions():
    cache = TeacherCache()
    cache.put("a", torch.tensor([1_000_000, 3]), Outputs(torch.eye(2), torch.eye(2)))
    cache.put("a", torch.tensor([3, 7]), Outputs(torch.ones(2, 2), torch.ones(2, 2)))
    assert sum(map(len, cache._rows["a"]["logits"].blocks)) == 3
    found = cache.get("a", torch.tensor([7, 3, 1_000_000]))
    assert found.logits.tolist() == [[1, 1], [1, 1], [1, 0]]
    assert cache.get("a", torch.tensor([4])) is None


def ragged(classes: int, lengths=(3, 1, 4)) -> Outputs:
    """Answers of texts of unequal length, padded."""
    logits = 3 * torch.randn(len(lengths), max(lengths), classes, generator=torch.Generator().manual_seed(0))
    return Outputs(logits, valid=torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1))


def test_kept_classes_and_their_mass_come_back_for_each_text():
    expert, cache = ragged(20), TeacherCache(top_k=5)
    cache.put("a", torch.tensor([4, 0, 2]), expert)
    got = cache.get("a", torch.tensor([2, 4]))
    whole = torch.cat([expert.rows()[4:], expert.rows()[:3]]).softmax(-1)
    best = whole.topk(5)
    assert torch.equal(got.classes.long(), best.indices)
    torch.testing.assert_close(got.rows().exp()[:, :5], best.values)
    torch.testing.assert_close(got.rows().exp().sum(-1), torch.ones(7))


def test_half_precision_comes_back_in_single():
    expert, cache = ragged(20), TeacherCache(dtype="float16")
    cache.put("a", torch.arange(3), expert)
    got = cache.get("a", torch.arange(3)).rows()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expert.rows().log_softmax(-1), rtol=1e-3, atol=1e-3)


def test_imitation_of_kept_classes_is_a_lower_bound_that_is_exact_for_all_of_them():
    expert, merged = ragged(20), Outputs(torch.zeros(8, 20, requires_grad=True))

    def loss(**options):
        cache = TeacherCache(**options)
        cache.put("a", torch.arange(3), expert)
        teacher = cache.get("a", torch.arange(3))
        step = TaskStep("a", torch.zeros(1), torch.arange(3), merged, torch.zeros(1, 1), lambda *_: teacher, None)
        return Imitation()(step)

    whole, values = loss(), [loss(top_k=k) for k in (1, 4, 19)]
    assert values[0] < values[1] < whole
    assert torch.equal(values[2], whole)
    (gradient,) = torch.autograd.grad(values[1], merged.logits)
    assert gradient.isfinite().all()
    assert gradient.any()
    torch.testing.assert_close(loss(top_k=4, dtype="float16"), values[1], rtol=1e-3, atol=1e-3)


def test_a_temperature_does_not_go_with_kept_classes():
    cache = TeacherCache(top_k=3)
    cache.put("a", torch.arange(3), ragged(20))
    teacher, merged = cache.get("a", torch.arange(3)), Outputs(torch.zeros(8, 20))
    step = TaskStep("a", torch.zeros(1), torch.arange(3), merged, torch.zeros(1, 1), lambda *_: teacher, None)
    with pytest.raises(InputError, match=r"objective\.temperature"):
        Imitation(temperature=2.0)(step)
    Imitation(targets="hard", drop_unsure=True)(step)


def test_bytes_per_row_are_those_that_are_kept():
    for options in ({}, {"top_k": 5}, {"dtype": "float16"}, {"top_k": 5, "dtype": "bfloat16"}, {"top_k": 19}):
        cache = TeacherCache(**options)
        kept = cache.kept(ragged(20))
        stored = sum(tensor.nbytes for name, tensor in kept.items() if not name.startswith("rows of"))
        assert stored == 8 * cache.bytes_per_row(20), options
