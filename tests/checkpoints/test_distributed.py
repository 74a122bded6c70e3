"""Folders of torch.distributed.checkpoint: the tensors that went in come out, whoever wrote them; nothing is run."""

import pickle
import warnings
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from adamerge import ExpertPool, InputError, load_state_dict
from adamerge.checkpoints.convert import convert_file
from adamerge.checkpoints.distributed import DistributedCheckpoint
from tests.support.processes import run_ranks


def save(state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process
        dcp.save(state, checkpoint_id=folder)
    return folder


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3).bfloat16(), nn.BatchNorm1d(3))


def training(seed):
    """Return what a training program saves: model, optimizer, and where it is."""
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 3}


def test_tensors_of_the_model_come_out_as_they_went_in(tmp_path):
    model, state = training(0)
    read = DistributedCheckpoint(save(state, tmp_path / "saved"))
    expected = model.state_dict()
    assert read.keys == tuple(sorted(expected))
    for name, tensor in expected.items():
        assert read.spec(name) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(read.get(name), tensor)


def test_base_and_experts_of_a_pool(tmp_path):
    states = [network(seed).state_dict() for seed in range(3)]
    folders = [save({"model": state}, tmp_path / str(seed)) for seed, state in enumerate(states)]
    options = {"include": ["*.weight", "*.bias"]}
    pool = ExpertPool.from_files(folders[0], {"a": folders[1], "b": folders[2]}, **options)
    expected = ExpertPool.from_state_dicts(states[0], {"a": states[1], "b": states[2]}, **options)
    assert set(pool.names) == set(expected.names)
    for name in pool.names:
        assert torch.equal(pool.task_vectors(name), expected.task_vectors(name))


def test_convert_writes_the_model_alone_tensor_by_tensor(tmp_path, monkeypatch):
    model, state = training(0)
    folder, out = save(state, tmp_path / "saved"), tmp_path / "model.safetensors"
    read, held = DistributedCheckpoint.get, []

    def get(self, key):
        assert sum(tensor() is not None for tensor in held) <= 1  # the one that was written last
        held.append(weakref.ref(tensor := read(self, key).clone()))
        return tensor

    monkeypatch.setattr(DistributedCheckpoint, "get", get)
    assert convert_file(folder, out).of == "state dict, folder of torch.distributed.checkpoint"
    written = load_state_dict(out)
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())


class Attack:
    def __reduce__(self):
        return print, ("run",)


def test_bad_folders_are_refused_and_nothing_is_run(tmp_path, capsys):
    folder = save(training(0)[1], tmp_path / "saved")
    metadata = folder / ".metadata"
    content = metadata.read_bytes()

    metadata.write_bytes(content[:200])
    with pytest.raises(InputError, match=r"\.metadata: truncated or damaged"):
        DistributedCheckpoint(folder)
    metadata.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(InputError, match=r"\.metadata: refused, nothing was run"):
        DistributedCheckpoint(folder)
    assert capsys.readouterr().out == ""
    metadata.write_bytes(content.replace(b"__0_0.distcp", b"../.._distcp"))
    with pytest.raises(InputError, match=r"\.metadata: truncated or damaged .*outside of the folder"):
        DistributedCheckpoint(folder)

    metadata.write_bytes(content)
    (folder / "__0_0.distcp").rename(folder / "moved")
    with pytest.raises(FileNotFoundError, match=r"names 1 files, missing: '__0_0\.distcp'"):
        DistributedCheckpoint(folder)
    (folder / "__0_0.distcp").write_bytes((folder / "moved").read_bytes()[:3000])
    read = DistributedCheckpoint(folder)
    with pytest.raises(InputError, match=r"__0_0\.distcp: truncated or damaged"):
        [read.get(key) for key in read.keys]
    (folder / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(InputError, match=r"larger than the files"):
        DistributedCheckpoint(folder)


def test_lightnings_optimizers_and_schedulers_are_left_out_of_the_model_alone(tmp_path):
    moment = torch.ones(2)
    state = {
        "model": {"optim.weight": moment},
        "optimizer_0": {"state": {"weight": moment}},
        "scheduler": {"a": moment},
    }
    assert DistributedCheckpoint(save(state, tmp_path / "saved")).keys == ("optim.weight",)
    wrapped = {"app": {"model": {"weight": moment}, "optim": {"weight": moment}}}
    assert DistributedCheckpoint(save(wrapped, tmp_path / "wrapped")).keys == ("weight",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.storage_data.clear(), "a part of 'model.0.bias' without a place"),
        (
            lambda m: m.state_dict_metadata["model.0.weight"].chunks.pop(),
            "the parts of 'model.0.weight' do not make it up",
        ),
        (lambda m: stretch(m.state_dict_metadata["model.0.weight"], 10**9), "its tensors are larger than the files"),
        (lambda m: stretch(m.state_dict_metadata["model.0.weight"], -1), "no shape and dtype of 'model.0.weight'"),
        (lambda m: nest(m.storage_data, 60), "a part of 'model.0.bias' without a place"),
    ],
)
def test_metadata_that_contradicts_itself_is_refused(tmp_path, change, message):
    folder = save(training(0)[1], tmp_path / "saved")
    content = pickle.loads((folder / ".metadata").read_bytes())
    change(content)
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=rf"\.metadata: truncated or damaged .*{message}"):
        DistributedCheckpoint(folder)


def stretch(entry, width):
    """Claim a width of a tensor and its only part."""
    entry.size = torch.Size([entry.size[0], width]) if width > 0 else (entry.size[0], width)
    entry.chunks[0].sizes = entry.size


def nest(storage, depth):
    """Let each key's offset be tuples of tuples, which take 2 ** depth steps to hash."""
    offset = ()
    for _ in range(depth):
        offset = (offset, offset)
    for index in storage:
        object.__setattr__(index, "offset", offset)


def test_optimizer_alone_is_no_model(tmp_path):
    folder = save({"optim": training(0)[1]["optim"]}, tmp_path / "saved")
    with pytest.raises(InputError, match=r"\.metadata: no tensors of a model"):
        DistributedCheckpoint(folder)


def _save_sharded(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    state = network(0).state_dict()
    parts = {
        name: distribute_tensor(tensor, mesh, [Shard(tensor.ndim - 1)]) if tensor.ndim else tensor
        for name, tensor in state.items()
    }
    dcp.save({"model": parts}, checkpoint_id=folder)


@pytest.mark.slow
def test_parts_of_two_processes_make_up_the_tensors(tmp_path):
    run_ranks(_save_sharded, 2, tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.distcp"))) == 2
    read = DistributedCheckpoint(tmp_path / "saved")
    for name, tensor in network(0).state_dict().items():
        assert torch.equal(read.get(name), tensor)
