import json
import logging
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from adamerge import InputError, load_state_dict
from adamerge.checkpoints.checkpoint import FileCheckpoint, MemoryCheckpoint, SafetensorsCheckpoint, open_checkpoint
from adamerge.checkpoints.writing import save_state_dict
from adamerge.system.files import atomic_path, combined_hash, ensure_writable, save_json, sha256


def tensors() -> dict[str, torch.Tensor]:
    return {
        "b": torch.arange(6.0).view(2, 3),
        "a": torch.tensor(1.5),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor([1, 2]),
        "none": torch.zeros(0, 2),
    }


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return set(first) == set(second) and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


def write_header(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + body)
    return path


class Malicious:
    """Touches a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


# Reading


def test_open_checkpoint_safetensors_keeps_file_order(tmp_path):
    save_file(tensors(), tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert checkpoint.keys == tuple(file.offset_keys())
    assert checkpoint.spec("b") == ((2, 3), torch.float32)
    assert checkpoint.spec("half") == ((3,), torch.bfloat16)
    assert torch.equal(checkpoint.get("b"), tensors()["b"])


@pytest.mark.parametrize("length", [0x80, 0x180, 0x4B50], ids=hex)
def test_open_checkpoint_header_length_that_looks_like_another_format_is_read(tmp_path, length):
    # the file opens with the header's length: these begin with the first bytes of a pickle and of a zip archive
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(length)
    path = write_header(tmp_path / "x.safetensors", header, b"\0" * 8)
    assert path.read_bytes()[:1] in (b"\x80", b"P")
    assert equal(load_state_dict(path), {"x": torch.zeros(2)})


DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in DTYPES])
def test_spec_every_supported_dtype_agrees_with_tensor(tmp_path, dtype):
    save_file({"x": torch.ones(2, dtype=dtype)}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.spec("x") == ((2,), dtype)
    assert checkpoint.get("x").dtype == dtype


def test_spec_unsupported_dtype_names_tensor_and_remedy(tmp_path):
    save_file({"x": torch.ones(2, dtype=torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors: tensor 'x' has dtype F8_E4M3, expected one of .*Convert"):
        open_checkpoint(tmp_path / "x.safetensors").spec("x")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("nest", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_state_dict_torch_files_are_unwrapped(tmp_path, legacy, nest, prefix):
    content = {prefix + key: tensor for key, tensor in tensors().items()}
    content = content if nest is None else {nest: content, "epoch": 3, "name": "run"}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    assert isinstance(open_checkpoint(tmp_path / "x.pt"), FileCheckpoint)
    assert equal(load_state_dict(tmp_path / "x.pt"), tensors())


def test_load_state_dict_doubly_nested_is_unwrapped(tmp_path):
    torch.save({"state_dict": {"model": tensors()}}, tmp_path / "x.pt")
    assert equal(load_state_dict(tmp_path / "x.pt"), tensors())


def test_load_state_dict_tensor_named_model_is_not_a_nest(tmp_path):
    torch.save({"model": torch.ones(2)}, tmp_path / "x.pt")
    assert list(load_state_dict(tmp_path / "x.pt")) == ["model"]


def test_load_state_dict_some_keys_with_module_keeps_all_names(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.pt")
    assert set(load_state_dict(tmp_path / "x.pt")) == {"module.a", "b"}


def test_load_state_dict_parameters_lose_their_graph(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(keep_vars=True), tmp_path / "x.pt")
    assert not any(tensor.requires_grad for tensor in load_state_dict(tmp_path / "x.pt").values())


def test_load_state_dict_wrong_suffix_is_read_by_content(tmp_path):
    save_file(tensors(), tmp_path / "x.pt")
    torch.save(tensors(), tmp_path / "x.safetensors")
    assert equal(load_state_dict(tmp_path / "x.pt"), load_state_dict(tmp_path / "x.safetensors"))


def test_load_state_dict_result_survives_replacement_of_the_file(tmp_path):
    save_file({"x": torch.zeros(1000)}, tmp_path / "x.safetensors")
    loaded = load_state_dict(tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(b"\xff" * 4000)
    assert torch.equal(loaded["x"], torch.zeros(1000))


# Refusing


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["value", "beside"])
def test_load_state_dict_malicious_pickle_is_refused_and_not_run(tmp_path, legacy, where):
    attack = Malicious(tmp_path / "marker")
    content = {"a": attack} if where == "value" else {"state_dict": tensors(), "args": attack}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"x\.pt: refused, nothing was run: the pickle asks for posix\.mkdir"):
        load_state_dict(tmp_path / "x.pt")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_load_state_dict_plain_pickle_is_refused_and_not_run(tmp_path, protocol):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Malicious(tmp_path / "marker"), protocol=protocol))
    with pytest.raises(InputError, match=r"x\.pkl: (holds pickled Python objects|not a checkpoint)"):
        load_state_dict(tmp_path / "x.pkl")
    assert not (tmp_path / "marker").exists()


def test_load_state_dict_whole_module_is_refused_with_remedy(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"holds pickled Python objects .*: adamerge convert .*x\.pt --out NAME"):
        load_state_dict(tmp_path / "x.pt")


def test_load_state_dict_not_a_dict_names_what_was_found(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: expected a state dict .*, found list"):
        load_state_dict(tmp_path / "x.pt")


def test_load_state_dict_other_values_are_named(tmp_path):
    torch.save({"a": torch.ones(1), "epoch": 3, "lr": 0.1}, tmp_path / "x.pt")
    with pytest.raises(
        InputError, match=r"x\.pt: expected only tensors, found other values under 'epoch', 'lr'\. Save"
    ):
        load_state_dict(tmp_path / "x.pt")


def test_load_state_dict_legacy_file_cut_in_the_count_of_an_empty_storage_is_refused(tmp_path):
    torch.save({"a": torch.ones(2), "b": torch.empty(0)}, tmp_path / "x", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x").read_bytes()
    for cut in range(1, 8):  # storages stand in no fixed order: the empty one may or may not be the last
        (tmp_path / "x").write_bytes(content[:-cut])
        with pytest.raises(InputError, match="truncated or damaged"):
            load_state_dict(tmp_path / "x")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@settings(max_examples=60)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_load_state_dict_truncated_file_is_refused(tmp_path_factory, kind, fraction):
    folder = tmp_path_factory.mktemp("truncated")
    if kind == "safetensors":
        save_file(tensors(), folder / "whole")
    else:
        torch.save(tensors(), folder / "whole", _use_new_zipfile_serialization=kind == "zip")
    content = (folder / "whole").read_bytes()
    (folder / "x").write_bytes(content[: min(int(fraction * len(content)), len(content) - 1)])
    # cut inside the name of a class, a legacy file looks like one that asks for a foreign class
    also = "|holds pickled" if kind == "legacy" else ""
    with pytest.raises(InputError, match=rf"/x: (truncated or damaged|not a checkpoint{also})"):
        load_state_dict(folder / "x")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@settings(max_examples=100)
@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_load_state_dict_changed_byte_loads_or_is_refused_cleanly(tmp_path_factory, kind, position, byte):
    folder = tmp_path_factory.mktemp("changed")
    if kind == "safetensors":
        save_file(tensors(), folder / "x")
    else:
        torch.save(tensors(), folder / "x", _use_new_zipfile_serialization=kind == "zip")
    content = bytearray((folder / "x").read_bytes())
    content[int(position * len(content))] = byte
    (folder / "x").write_bytes(content)
    try:
        load_state_dict(folder / "x")
    except InputError as error:
        assert str(folder / "x") in str(error)  # noqa: PT017


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ({"x": ENTRY}, b"\0" * 4),
        ({"x": ENTRY}, b"\0" * 12),
        ({"x": {**ENTRY, "data_offsets": [0, 800]}}, b"\0" * 8),
        ({"x": {**ENTRY, "data_offsets": [0, "8"]}}, b"\0" * 8),
        ({"x": {**ENTRY, "data_offsets": [8]}}, b"\0" * 8),
        ({"x": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
        ({"x": 3}, b""),
        (b"{" + b'"a":[' * 100_000, b""),
        (b"{\xff\xfe", b""),
        (b'{"x": ', b""),
    ],
    ids=["short", "long", "far", "string", "one", "missing", "number", "deep", "bytes", "cut"],
)
def test_open_checkpoint_lying_header_is_refused(tmp_path, header, body):
    path = write_header(tmp_path / "x.safetensors", header, body)
    with pytest.raises(InputError, match=r"x\.safetensors: truncated or damaged .* Copy or export it again"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "entry",
    [
        {**ENTRY, "shape": [3]},
        {**ENTRY, "shape": [-2]},
        {**ENTRY, "shape": "ab"},
        {**ENTRY, "dtype": "F16"},
        {**ENTRY, "dtype": 7},
        {"shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "data_offsets": [0, 8]},
        {**ENTRY, "data_offsets": [8, 8]},
        {**ENTRY, "data_offsets": [-8, 8]},
    ],
)
def test_checkpoint_entry_that_contradicts_its_bytes_is_refused_before_any_use(tmp_path, entry):
    path = write_header(tmp_path / "x.safetensors", {"x": entry}, b"\0" * 8)
    with pytest.raises(InputError, match=r"x\.safetensors: .*damaged"):
        open_checkpoint(path).spec("x")


def test_open_checkpoint_huge_header_length_is_refused_without_reading_it(tmp_path):
    path = write_header(tmp_path / "x.safetensors", {"x": ENTRY}, b"\0" * 8, length=2**63)
    with pytest.raises(InputError, match="truncated or damaged safetensors file"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"hello, I am a text file\n", b"\x00" * 100, b"<!DOCTYPE html><html></html>"])
def test_open_checkpoint_other_file_is_named_not_a_checkpoint(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.safetensors: not a checkpoint\. Expected a safetensors file or a torch"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_open_checkpoint_other_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match=r"x\.zip: truncated or damaged torch file"):
        open_checkpoint(tmp_path / "x.zip")


def test_open_checkpoint_torchscript_is_refused_with_remedy(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("x/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
    with pytest.raises(InputError, match=r"x\.pt: a TorchScript archive, expected a state dict\. .*state_dict\(\)"):
        open_checkpoint(tmp_path / "x.pt")


def test_open_checkpoint_folder_is_refused_with_remedy(tmp_path):
    with pytest.raises(InputError, match=r"expected a checkpoint file, found a folder\. Name the file inside it"):
        open_checkpoint(tmp_path)


def test_open_checkpoint_missing_file_suggests_its_neighbour(tmp_path):
    save_file(tensors(), tmp_path / "mnist.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"minst\.safetensors: no such file\. Did you mean 'mnist\.safetensors'\?"
    ):
        open_checkpoint(tmp_path / "minst.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nowhere/x: no such file\.$"):
        open_checkpoint(tmp_path / "nowhere" / "x")


def test_memory_checkpoint_other_values_are_named():
    with pytest.raises(InputError, match=r"base: expected only tensors, found other values under 'epoch'"):
        MemoryCheckpoint("base", {"a": torch.ones(1), "epoch": 3})


# Hashing


def test_sha256_of_memory_depends_on_names_values_shapes_and_dtypes_only():
    base = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(True)}
    digest = MemoryCheckpoint("x", base).sha256()
    assert MemoryCheckpoint("y", dict(reversed(base.items()))).sha256() == digest
    assert MemoryCheckpoint("x", {**base, "a": torch.arange(8.0)[::2] / 2}).sha256() == digest
    for changed in (
        {**base, "a": torch.arange(4.0) + 1},
        {**base, "a": torch.arange(4.0).view(2, 2)},
        {**base, "a": torch.arange(4.0).view(torch.int32)},
        {"z": base["a"], "b": base["b"], "c": base["c"]},
    ):
        assert MemoryCheckpoint("x", changed).sha256() != digest


def test_sha256_of_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_combined_hash_ignores_order_but_not_pairing():
    assert combined_hash({"a": "1", "b": "2"}) == combined_hash({"b": "2", "a": "1"})
    assert combined_hash({"a": "1", "b": "2"}) != combined_hash({"a": "2", "b": "1"})


# Writing


def test_save_state_dict_tied_and_strided_tensors_are_written_in_full(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    content = {
        "whole": whole,
        "tied": whole,
        "transposed": whole.t(),
        "part": whole[1:],
        "expanded": torch.ones(1).expand(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0),
        "empty_too": torch.zeros(0, 3),
    }
    save_state_dict(content, tmp_path / "x.safetensors", {"adamerge": "1"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert equal(loaded, {key: tensor.detach() for key, tensor in content.items()})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "adamerge": "1"}  # transformers refuses files without the format
    assert (content["tied"] == torch.arange(12.0).view(3, 4)).all(), "the caller's tensors stay as they are"


def test_save_state_dict_same_content_gives_the_bytes_of_safetensors_with_its_metadata_in_our_order(tmp_path):
    dtypes = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.int32,
              torch.float32, torch.float64, torch.int64)  # fmt: skip
    content = {f"{size}.{dtype}": torch.ones(size, dtype=dtype) for dtype in dtypes for size in ((), (3,), (0, 2))}
    content['größe\n"'] = torch.ones(2)
    save_state_dict(content, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == save(content, {"format": "pt"})
    save_state_dict(content, tmp_path / "b.safetensors", {"k": "v", "a": "w"})
    header = (tmp_path / "b.safetensors").read_bytes()[8:]
    assert header.startswith(b'{"__metadata__":{"format":"pt","k":"v","a":"w"},')


def test_save_state_dict_dtype_that_is_not_read_either_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"x\.safetensors: 'c': torch\.complex64 has no place"):
        save_state_dict({"c": torch.ones(1, dtype=torch.complex64)}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_torch_file_with_averaged_weights_beside_says_that_these_are_not_read(tmp_path, caplog):
    content = {"state_dict": {"w": torch.ones(1)}, "state_dict_ema": {"w": torch.zeros(1)}, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "x.pt")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(load_state_dict(tmp_path / "x.pt")["w"], torch.ones(1))
    assert "'state_dict_ema'" in caplog.text
    assert "--entry" in caplog.text
    assert "optimizer" not in caplog.text


def test_save_json_floats_and_text_are_kept(tmp_path):
    content = {"value": 0.1 + 0.2, "text": "größe"}
    save_json(content, tmp_path / "new" / "x.json")
    assert json.loads((tmp_path / "new" / "x.json").read_text(encoding="utf-8")) == content
    assert "größe" in (tmp_path / "new" / "x.json").read_text(encoding="utf-8")


def test_atomic_path_failure_keeps_old_file_and_leaves_nothing(tmp_path):
    target = tmp_path / "x.json"
    target.write_text("old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the new")
            raise KeyboardInterrupt("stopped")

    with pytest.raises(KeyboardInterrupt, match="stopped"):
        fail()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_saved_weights_can_be_read_by_whom_the_umask_lets(tmp_path):
    (tmp_path / "plain").touch()
    save_state_dict({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_atomic_path_success_replaces_and_leaves_nothing_else(tmp_path):
    (tmp_path / "x").write_text("old")
    with atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "x").read_text() == "old"
    assert (tmp_path / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_save_json_unserialisable_content_keeps_old_file(tmp_path):
    save_json([1], tmp_path / "x.json")
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_json({"bad": object()}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == [1]
    assert len(list(tmp_path.iterdir())) == 1


def test_ensure_writable_creates_folder_and_leaves_it_empty(tmp_path):
    ensure_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_ensure_writable_file_in_the_way_names_folder_and_remedy(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match=r"Output folder .*a/b is not writable \(Not a directory\)\. Choose another"):
        ensure_writable(tmp_path / "a" / "b")
