import pytest
import torch

from adamerge import Outputs
from adamerge.data.batch import join, kind, pad, read_output, size, split, stack, take, to
from adamerge.errors import InputError


def sample(length: int, start: int = 1) -> dict[str, torch.Tensor]:
    return {"ids": torch.arange(start, start + length), "mask": torch.ones(length, dtype=torch.bool)}


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad_keeps_every_sample_and_fills_the_rest(side):
    samples = [sample(3), sample(1, 7), sample(2, 9)]
    batch = pad(samples, {"ids": 99}, side)
    assert batch["ids"].shape == batch["mask"].shape == (3, 3)
    for i, one in enumerate(samples):
        assert torch.equal(batch["ids"][i][batch["mask"][i]], one["ids"])
        assert (batch["ids"][i][~batch["mask"][i]] == 99).all()
        assert bool(batch["mask"][i, -1 if side == "left" else 0])


def test_pad_stacks_what_has_one_shape_and_refuses_what_only_further_axes_could_pad():
    images = pad([{"pixels": torch.ones(3, 2, 2)}, {"pixels": torch.zeros(3, 2, 2)}])
    assert images["pixels"].shape == (2, 3, 2, 2)
    with pytest.raises(InputError, match="pixels"):
        pad([{"pixels": torch.ones(3, 2, 2)}, {"pixels": torch.ones(3, 2, 4)}])
    with pytest.raises(InputError, match="differ: a mapping with ids and a mapping with ids, mask"):
        pad([{"ids": torch.ones(1)}, {"ids": torch.ones(1), "mask": torch.ones(1)}])


@pytest.mark.parametrize("inputs", [torch.arange(12).view(6, 2), pad([sample(4, i) for i in range(6)])])
def test_split_join_take_are_inverse(inputs):
    assert size(inputs) == 6
    parts = split(inputs, [1, 3, 2])
    assert [size(part) for part in parts] == [1, 3, 2]
    assert len({kind(part) for part in parts}) == 1
    for again in (join(parts), to(inputs, "cpu"), join([take(inputs, slice(0, 2)), take(inputs, slice(2, 6))])):
        pairs = [(inputs, again)] if isinstance(inputs, torch.Tensor) else [(inputs[k], again[k]) for k in inputs]
        assert all(torch.equal(one, two) for one, two in pairs)


def test_kind_tells_lengths_keys_and_dtypes_apart():
    kinds = {kind(pad([sample(n)])) for n in (2, 3)} | {kind({"ids": torch.ones(1, 2)}), kind(torch.ones(1, 2))}
    assert len(kinds) == 4
    assert kind(pad([sample(3)] * 2)) == kind(pad([sample(3)]))


def test_stack_names_the_key_whose_lengths_differ_and_the_remedy():
    assert stack([sample(2), sample(2)])["ids"].shape == (2, 2)
    with pytest.raises(InputError, match=r"\(2,\) and \(3,\) as ids.*collate"):
        stack([sample(2), sample(3)])


def test_rows_are_the_valid_positions_sample_after_sample():
    logits = torch.arange(24.0).view(2, 4, 3)
    valid = torch.tensor([[True, False, True], [False, True, True]])  # one fewer: a shifted mask
    outputs = Outputs(logits, hidden={"layer": logits * 2, "pooled": torch.ones(2, 5)}, valid=valid)
    expected = torch.stack([logits[0, 0], logits[0, 2], logits[1, 1], logits[1, 2]])
    assert torch.equal(outputs.rows(), expected)
    compact = outputs.compact()
    assert torch.equal(compact.rows(), expected)
    assert torch.equal(compact.hidden["layer"], expected * 2)
    assert torch.equal(compact.hidden["pooled"], torch.ones(2, 5))
    assert torch.equal(torch.cat([part.rows() for part in outputs.split([1, 1])]), expected)
    assert torch.equal(outputs[1:].rows(), expected[2:])


def test_rows_without_a_mask_are_all_samples_or_positions():
    logits = torch.randn(2, 3, 4)
    assert torch.equal(Outputs(logits).rows(), logits.view(6, 4))
    flat = torch.randn(5, 4)
    assert Outputs(flat).rows() is flat or torch.equal(Outputs(flat).rows(), flat)


def test_rows_refuse_a_mask_of_other_axes():
    with pytest.raises(InputError, match=r"valid.*\(2, 4\).*\(2, 2\)"):
        Outputs(torch.ones(2, 4, 3), valid=torch.ones(2, 2, dtype=torch.bool)).rows()


def test_hidden_states_of_other_positions_follow_the_padding():
    padding = torch.tensor([[True, True, False, False], [True, True, True, True]])
    outputs = Outputs(
        torch.ones(2, 2, 4), hidden={"encoder": torch.arange(8.0).view(2, 4, 1)},
        valid=torch.tensor([[True, False], [True, True]]), padding=padding,
    )  # fmt: skip
    assert outputs.compact().hidden["encoder"].flatten().tolist() == [0, 1, 4, 5, 6, 7]


def test_read_output_takes_tensors_objects_and_mappings():
    tensor = torch.ones(2, 3)
    for output in (tensor, {"logits": tensor}, type("Output", (), {"pooler_output": tensor})()):
        assert read_output(output, tensor).features is tensor
    assert read_output(torch.ones(2, 3, 4, 5), tensor, class_axis=1).logits.shape == (2, 4, 5, 3)
    assert read_output({"one": tensor, "logits": tensor + 1}, tensor, names=["one"]).logits is tensor
    with pytest.raises(InputError, match=r"dict with loss.*read"):
        read_output({"loss": tensor}, tensor)
