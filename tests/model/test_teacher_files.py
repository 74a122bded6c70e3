"""The experts' outputs on disk: what they are keyed by, what a second run asks, and damage."""

import pickle

import pytest
import torch
from torch import nn

from adamerge import InputError
from adamerge.callbacks import KeepBest
from adamerge.checkpoints.hashes import digest
from adamerge.model.teacher_files import TeacherFiles, ask_expert
from adamerge.objectives.alignment import Alignment
from adamerge.objectives.imitation import Imitation
from tests.support.fits import QUIET, every_step, fit, make_data, make_method, values
from tests.support.toy import EXPERTS, make_toy

pytestmark = QUIET

HIDDEN = ("blocks.*.down",)


def run(folder, tmp_path, *, toy=None, data=None, objective=None, change=None, **options):
    """Fit with a teacher cache; return the method and how often an expert was asked."""
    method = make_method(toy or make_toy(), objective or Alignment(hidden_layers=HIDDEN, hidden_weight=0.01))
    method.teacher_files = TeacherFiles(folder) if folder else None
    if change:
        change(method)
    asked, outputs = [], method.model.expert_outputs

    def counted(expert, batches, hidden_layers=()):
        for output in outputs(expert, batches, hidden_layers):
            asked.append(expert)
            yield output

    method.model.expert_outputs = counted
    fit(method, data or make_data(), tmp_path, steps=options.pop("steps", 3), **options)
    return method, asked


def test_second_run_asks_no_expert_and_gets_the_same_bits(tmp_path):
    fresh, asked = run(None, tmp_path)
    assert sorted(set(asked)) == sorted(EXPERTS)
    first, asked = run(tmp_path / "cache", tmp_path)
    assert len(asked) == len(EXPERTS)
    second, asked = run(tmp_path / "cache", tmp_path)
    assert asked == []
    for task in EXPERTS:
        indices = torch.arange(7)
        expected, got = (m.model.teacher_cache.get(task, indices) for m in (fresh, second))
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.features, expected.features)
        assert got.hidden.keys() == expected.hidden.keys() != set()
        assert all(torch.equal(got.hidden[name], expected.hidden[name]) for name in expected.hidden)
    assert torch.equal(values(first), values(fresh))
    assert torch.equal(values(second), values(fresh))
    assert all(path.suffix == ".safetensors" for path in (tmp_path / "cache").iterdir())


def test_second_run_does_not_even_read_the_experts(tmp_path):
    run(tmp_path / "cache", tmp_path)

    def refuse(method):
        method.model.expert_parameters = None

    run(tmp_path / "cache", tmp_path, change=refuse)


def test_resume_asks_no_expert(tmp_path):
    whole, _ = run(tmp_path / "cache", tmp_path, steps=4, **every_step(tmp_path / "saved"))
    resumed, asked = run(tmp_path / "cache", tmp_path, steps=4, resume=tmp_path / "saved" / "step=2.ckpt")
    assert asked == []
    assert torch.equal(values(resumed), values(whole))


def test_held_out_images_are_filed_too(tmp_path):
    data = {"count": 20, "holdout": 0.3}
    _, asked = run(tmp_path / "cache", tmp_path, data=make_data(**data), callbacks=[KeepBest(every=1)])
    assert len(asked) > len(EXPERTS)
    _, asked = run(tmp_path / "cache", tmp_path, data=make_data(**data), callbacks=[KeepBest(every=1)])
    assert asked == []


def change_expert(toy):
    toy.experts["green"]["proj"][0, 0] += 1


def change_base(toy):
    toy.base["proj"][0, 0] += 1


def change_head(toy):
    with torch.no_grad():
        toy.heads["green"].bias += 1


def change_encoder(toy):
    toy.encoder.blocks[0].norm.eps = 0.5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_expert, ["green"]),
        (change_head, ["green"]),
        (change_base, list(EXPERTS)),
        (change_encoder, list(EXPERTS)),
    ],
)
def test_changed_model_is_asked_again(tmp_path, change, expected):
    run(tmp_path / "cache", tmp_path)
    toy = make_toy()
    change(toy)
    _, asked = run(tmp_path / "cache", tmp_path, toy=toy)
    assert sorted(asked) == sorted(expected)


def test_changed_images_layers_or_precision_are_asked_again(tmp_path):
    run(tmp_path / "cache", tmp_path)
    for options in (
        {"data": make_data(seed=1)},
        {"objective": Imitation()},
        {"precision": "bf16-mixed"},
    ):
        _, asked = run(tmp_path / "cache", tmp_path, **options)
        assert sorted(asked) == sorted(EXPERTS)
        _, asked = run(tmp_path / "cache", tmp_path, **{**options, "data": make_data(seed=int("data" in options))})
        assert asked == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def pickled(path):
    class Evil:
        def __reduce__(self):
            return (path.with_name("ran").touch, ())

    path.write_bytes(pickle.dumps(Evil()))


def torch_file(path):
    torch.save({"logits": torch.zeros(7, 3), "features": torch.zeros(7, 5)}, path)


@pytest.mark.parametrize("damage", [truncate, empty, flip, pickled, torch_file])
def test_damaged_file_is_computed_again_with_a_warning(tmp_path, caplog, damage):
    whole, _ = run(tmp_path / "cache", tmp_path)
    path = sorted((tmp_path / "cache").iterdir())[1]
    good = path.read_bytes()
    damage(path)
    again, asked = run(tmp_path / "cache", tmp_path)
    assert len(asked) == 1
    assert "teacher_cache: a damaged file is made anew" in caplog.text
    assert path.name in caplog.text
    assert torch.equal(values(again), values(whole))
    assert path.read_bytes() == good
    assert not (tmp_path / "cache" / "ran").exists()


def test_file_that_cannot_be_written_is_said_and_gone_without(tmp_path, caplog, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adamerge.checkpoints.tensor_cache.save_state_dict", full)
    method, asked = run(tmp_path / "cache", tmp_path)
    assert len(asked) == len(EXPERTS)
    assert "cannot be written (No space left on device)" in caplog.text
    assert torch.equal(values(method), values(run(None, tmp_path)[0]))


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="not writable"):
        TeacherFiles(tmp_path / "file" / "cache")


def test_part_of_the_batches_missing_asks_for_those_only_and_keeps_the_order(tmp_path):
    toy = make_toy(batch=9)
    model = make_method(toy).model
    inputs, indices = toy.inputs["red"].split(3), torch.arange(9).split(3)
    files = TeacherFiles(tmp_path)
    ask_expert(model, "red", list(zip(inputs[1:2], indices[1:2], strict=True)), files=files)
    model.teacher_cache.clear()
    ask_expert(model, "red", list(zip(inputs, indices, strict=True)), files=files)
    assert files.summary() == f"1 batches read from {tmp_path}, 3 computed and added"
    expected = make_method(toy).model.teacher("red", toy.inputs["red"], torch.arange(9))
    torch.testing.assert_close(model.teacher_cache.get("red", torch.arange(9)).logits, expected.logits)


def test_digest_tells_values_names_types_and_shapes_apart():
    one = torch.tensor([1.0, 2.0])
    contents = [
        {"a": one}, {"b": one}, {"a": one.double()}, {"a": one.view(2, 1)}, {"a": one + 1}, {"a": [one]}, {"a": "1"},
        {"a": 1}, {"a": one.bfloat16()}, [one, one],
    ]  # fmt: skip
    assert len({digest(content) for content in contents}) == len(contents)
    assert digest({"a": one, "b": 1}) == digest({"b": 1, "a": one.clone()})


def test_addresses_in_an_encoders_print_do_not_count(tmp_path):
    class Printed(nn.Identity):
        def extra_repr(self):
            return f"function=<function at {hex(id(self))}>"

    for _ in range(2):
        toy = make_toy()
        toy.encoder.extra = Printed()
        _, asked = run(tmp_path / "cache", tmp_path, toy=toy)
    assert asked == []
