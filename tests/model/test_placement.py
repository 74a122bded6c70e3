"""Everything of a step lies on the accelerator: torch's fake tensors refuse to compute across devices, without one.

A backward pass cannot run there, so gradients are handed in for the pull-back, and hooks are seen forward only.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from adamerge import Coefficients, MergedModel
from adamerge.checkpoints.checkpoint import SafetensorsCheckpoint
from adamerge.model.encoder import EncoderOptions
from adamerge.model.granularity import Chunk
from adamerge.model.merge import pull_back
from adamerge.model.task_step import TaskStep
from adamerge.model.weights import TrainedWeights
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.imitation import Imitation
from adamerge.objectives.infomax import InfoMax
from tests.model.test_beside import Small, pool_of
from tests.support.toy import EXPERTS

DEVICE = torch.device("cuda", 0)
OBJECTIVES = [Entropy(), InfoMax(), Imitation(), Imitation(targets="hard", drop_unsure=True)]


@pytest.fixture
def fake(monkeypatch):
    """Tensors without data on a device that is not there: no page is pinned for it, and files are read outside."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr("adamerge.pool.task_vectors.free_device_memory", lambda _: float("inf"))
    read = SafetensorsCheckpoint.get

    def get(self, key):
        with unset_fake_temporarily():
            return read(self, key)

    monkeypatch.setattr(SafetensorsCheckpoint, "get", get)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_device(tensors):
    return {tensor.device for tensor in tensors} == {DEVICE}


def check_step(model, inputs):
    """Run a step's passes, objectives and teachers on the device, and pull gradients back."""
    model.to_device(DEVICE)
    assert on_device([*model.pool.base.values(), *model.encoder_buffers.values(), *model.parameters()])
    inputs = {task: batch.to(DEVICE) for task, batch in inputs.items()}
    with model.merged(model.coefficients()) as merged:
        assert on_device(merged._leaves.values())
        outputs = {task: part for group in merged.groups(inputs) for task, part in merged(group).items()}
        for task, part in outputs.items():
            (expert,) = model.expert_outputs(model.teacher_of(task), [(task, inputs[task])])
            step = TaskStep(
                task, inputs[task], torch.arange(3), part, model.coefficients(), lambda *_, e=expert: e, None
            )
            assert on_device([part.logits, expert.logits, *(objective(step) for objective in OBJECTIVES)])
    gradients = {
        name: torch.empty(shape, dtype=model.pool.compute_dtype, device=DEVICE)
        for name, shape in model.pool.shapes.items()
    }
    assert on_device([pull_back(model.pool, model.coefficients.index, gradients)])


@pytest.mark.parametrize(
    ("granularity", "storage"),
    [
        ("row", "ram"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("task", "device"), ("column", "ram"), ("block", "stream"), (Chunk(3), "stream"))
        ),
    ],
    ids=str,
)
def test_step_stays_on_the_device(toy, granularity, storage, request):
    pool = toy.pool(storage=storage)
    model = MergedModel(toy.encoder, pool, Coefficients(pool, granularity), toy.heads)
    request.getfixturevalue("fake")
    check_step(model, toy.inputs)
    assert pool.storage == storage
    assert TrainedWeights(toy.encoder, pool, model.coefficients).parameters["proj"].device == DEVICE


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["task", "row", "column"])
def test_adapters_beside_the_base_stay_on_the_device(tmp_path, granularity, request):
    network = Small().float()
    pool = pool_of(network, tmp_path, ["words", "mix", "blocks.0", "attention.out_proj", "out"], dense=["norm"])
    heads = {expert: nn.Linear(4, 3).double() for expert in pool.expert_names}
    ids = {expert: torch.randint(0, 7, (3, 5)) for expert in pool.expert_names}
    options = EncoderOptions(engine="beside")
    model = MergedModel(network, pool, Coefficients(pool, granularity), heads, options=options)
    request.getfixturevalue("fake")
    check_step(model, ids)


def test_fake_tensors_refuse_what_lies_elsewhere(toy, fake):
    with pytest.raises(RuntimeError, match="cpu"):
        torch.ones(2, device=DEVICE) + torch.ones(2)
    assert set(toy.inputs) == set(EXPERTS)
