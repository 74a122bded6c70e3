import torch

from adamerge import Outputs
from adamerge.model.teachers import TeacherCache


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
    assert len(cache._rows["a"]["logits"].rows) <= 4
    found = cache.get("a", torch.tensor([7, 3, 1_000_000]))
    assert found.logits.tolist() == [[1, 1], [1, 1], [1, 0]]
    assert cache.get("a", torch.tensor([4])) is None
