import pickle
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

from adamerge import InputError, load_state_dict
from adamerge.checkpoints.convert import convert_file
from adamerge.checkpoints.pickles import read_pickle
from tests.support import hostile
from tests.support.hostile import (
    CALLS,
    HEADERS,
    OPCODES,
    archive,
    call,
    laughs,
    legacy,
    nested,
    saved,
    tensor,
    touch,
    tuple_keys,
)

BODY = bytes(16)  # four float32


def read(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_pickle(path).tensors)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(path: Path, canary: Path, match: str) -> None:
    """Both readers refuse the file in one line that names it, and nothing runs."""
    for reader in (read_pickle, lambda p: convert_file(p, p.with_name("out.safetensors"))):
        with pytest.raises(InputError, match=match) as caught:
            reader(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        load_state_dict(path)
    assert not canary.exists(), "the file ran code"


# What is read


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", range(1, 6))  # torch itself writes no storages in protocol 0
@pytest.mark.parametrize("what", ["module", "state dict", "nested", "parameters"])
def test_read_pickle_torch_files_give_the_state_dict(tmp_path, zipped, protocol, what):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4), torch.nn.MultiheadAttention(4, 2))
    content = {
        "module": module,
        "state dict": module.state_dict(),
        "nested": {"epoch": 3, "state_dict": {"model": module}},
        "parameters": module.state_dict(keep_vars=True),
    }[what]
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found = read(tmp_path / "x.pt")
    wanted = module.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[k], wanted[k]) and found[k].dtype == wanted[k].dtype for k in wanted)


@pytest.mark.parametrize("protocol", range(6))
def test_read_pickle_plain_pickle_of_a_module_gives_the_state_dict(tmp_path, protocol):
    module = torch.nn.Linear(3, 2)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(module, protocol=protocol))
    found = read(tmp_path / "x.pkl")
    assert all(torch.equal(found[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "dtype", [*(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32), torch.int16, torch.int8,
              torch.uint8, torch.bool],
)  # fmt: skip
def test_read_pickle_dtypes_views_and_empty_tensors_are_kept(tmp_path, zipped, dtype):
    whole = torch.arange(24).view(4, 6).to(dtype)
    content = {"whole": whole, "part": whole[1:3, ::2], "turned": whole.t(), "scalar": whole[0, 1], "none": whole[:0]}
    (tmp_path / "x.pt").write_bytes(saved(content, zipped=zipped))
    found = read(tmp_path / "x.pt")
    assert all(torch.equal(found[k], v) and found[k].dtype == dtype for k, v in content.items())


def test_read_pickle_module_gives_what_its_state_dict_would(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(2, 2, bias=False)
            self.second = self.first
            self.head = torch.nn.Linear(2, 2, bias=False)
            self.head.weight = self.first.weight
            self.register_buffer("kept", torch.ones(1))
            self.register_buffer("volatile", torch.ones(1), persistent=False)
            self.register_buffer("absent", None)
            self.register_parameter("bias", None)
            self.options = torch.device("cpu"), torch.float32, torch.Size([1]), slice(1), {1, 2}, Path("x"), 2 + 1j

    globals()["Tied"] = Tied
    Tied.__qualname__ = "Tied"
    module = Tied()
    torch.save(module, tmp_path / "x.pt")
    del globals()["Tied"]
    assert list(read(tmp_path / "x.pt")) == list(module.state_dict())
    done = convert_file(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert done.of.startswith("module tests.checkpoints.test_pickles.Tied")
    loaded = load_state_dict(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[k], v) for k, v in module.state_dict().items())


def test_read_pickle_function_that_is_only_named_stays_inert(tmp_path):
    content = {"x": torch.ones(2), "activation": torch.nn.functional.gelu, "kind": torch.nn.Linear}
    torch.save(content, tmp_path / "x.pt")
    pickled = read_pickle(tmp_path / "x.pt")
    assert set(pickled.inert) == {"torch._C._nn.gelu", "torch.nn.modules.linear.Linear"}
    assert pickled.left_out == ("activation", "kind")


# Hostile: what would run


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("name", CALLS)
def test_read_pickle_call_is_refused_by_name_and_not_run(tmp_path, kind, name):
    canary = tmp_path / "canary"
    make, named = CALLS[name]
    content = make(canary)
    if kind == "zip":
        path = archive(tmp_path / "x.pt", content)
    else:
        path = write(tmp_path / "x.pt", content if kind == "plain" else legacy(content))
    refused(path, canary, rf"refused, nothing was run: the pickle (asks for|calls) {named}[,;]")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("opcode", OPCODES)
def test_read_pickle_every_way_to_call_is_refused(tmp_path, opcode, protocol):
    canary = tmp_path / "canary"
    for number, (module, name) in enumerate([("posix", "system"), ("torch.hub", "load")]):
        content = call(module, name, touch(canary), opcode=opcode, protocol=protocol)
        path = archive(tmp_path / f"{number}.pt", content)
        refused(path, canary, rf"the pickle (asks for|calls|changes) {module}.{name}")


class Attack:
    """Reduces to whatever it is given."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts

    def __reduce_ex__(self, protocol):
        return self.parts


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("where", ["value", "key", "list", "state", "hook", "item"])
def test_read_pickle_reduce_anywhere_is_refused(tmp_path, protocol, where):
    import os

    canary = tmp_path / "canary"
    attack = Attack(os.system, (touch(canary),))
    module = torch.nn.Linear(1, 1)
    if where == "hook":
        module._forward_hooks[0] = attack
    content = {
        "value": {"x": attack},
        "key": {attack: 1},
        "list": [[[[attack]]]],
        "state": Attack(torch.nn.Linear, (1, 1), {"a": attack}),
        "hook": module,
        "item": Attack(dict, (), None, None, iter([("k", attack)])),
    }[where]
    path = write(tmp_path / "x.pkl", pickle.dumps(content, protocol=protocol))
    refused(path, canary, r"the pickle asks for posix\.system")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02\x82\x01.", "uses an extension code, or a buffer"),
        (b"\x80\x02\x83\x01\x00.", "uses an extension code, or a buffer"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "uses an extension code, or a buffer"),
        (b"\x80\x05\x97.", "uses an extension code, or a buffer"),
        (b"\x80\x02cos\nsystem\n.", r"asks for os\.system"),
        (b"\x80\x02cfoo bar\nBaz\n.", "asks for 'foo bar.Baz', which is no name"),
        (b"\x80\x04" + hostile.text("\u043es") + hostile.text("system") + b"\x93.", "no name of a class"),
        (b"\x80\x02c\nX\n.", "no name of a class"),
        (b"\x80\x02c\\Pfoo\nBar\n.", "no name of a class"),
        (b"\x80\x02cfoo\n" + b"A" * 4000 + b"\n.", "no name of a class"),
        (b"\x80\x02cfoo\nOuter.inner\n.", r"asks for foo\.Outer\.inner"),
        (b"\x80\x02cfoo\nBar\n)R)R.", r"calls foo\.Bar"),
        (b"\x80\x02cfunctools\npartial\n(cos\nsystem\ntR)R.", r"asks for os\.system"),
        (b"\x80\x02cfunctools\npartial\n(ctorch.hub\nload\ntR)R.", r"calls functools\.partial"),
        (b"\x80\x02U\x01xU\x01y\x85R.", "calls a value"),
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch.hub\nload\nN)NtR.", r"calls torch\.hub\.load"),
        (
            b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nN)NtR.",
            r"calls torch\._tensor\._rebuild_from_type_v2 to make a tensor",
        ),
        (b"\x80\x02ccopyreg\n_reconstructor\n(ctorch.hub\nload\nNNtR.", r"an object of torch\.hub\.load"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", r"changes torch\._utils\._rebuild_tensor_v2"),
        (b"\x80\x02cfoo\nBar\n}U\x08__init__cos\nsystem\nsb.", r"asks for os\.system"),
        (b"\x80\x02cfoo\nBar\n}U\x03keyU\x03valsb.", r"changes foo\.Bar"),
        (b"cos\nsystem\n(S'true'\ntR.", r"asks for os\.system"),
        (nested(call("posix", "system", "true")), r"asks for posix\.system"),
        (nested(legacy(call("builtins", "eval", "1"))), r"asks for builtins\.eval"),
        (nested(nested(b"N.")), "a file inside of a file"),
        (tuple_keys(), "keys that are neither texts nor numbers"),
        (b"\x80\x02}]Ns.", "keys that are neither"),
        (b"\x80\x02(" + b"N" * 20_001 + b"t.", "takes more steps"),
        (
            b"\x80\x02" + hostile.text("x" * 1000) + b"q\x000" + b"c_codecs\nencode\nq\x01h\x00\x85R" * 1000 + b".",
            "repeats more bytes",
        ),
    ],
)
def test_read_pickle_trick_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr("adamerge.checkpoints.pickles.MAX_STEPS", 20_000)
    refused(write(tmp_path / "x.pt", content), tmp_path / "canary", message)
    refused(archive(tmp_path / "y.pt", content), tmp_path / "canary", message)


# Hostile: what would overflow


@pytest.mark.parametrize(
    "changed",
    [
        {"count": 5},
        {"count": 2**62},
        {"count": 2**64},
        {"count": 10**5000},
        {"count": -4},
        {"count": 4.0},
        {"kind": "DoubleStorage"},
        {"kind": "ComplexFloatStorage"},
        {"kind": "QInt8Storage"},
        {"key": "1"},
        {"key": "../../data.pkl"},
        {"size": (5,)},
        {"size": (-1,)},
        {"size": (2**62, 2**62), "stride": (2**62, 1)},
        {"size": (2**63,)},
        {"size": (2.0,)},
        {"size": "4"},
        {"size": (0, 2**62, 8), "stride": (1, 1, 1)},
        {"size": (1,) * 100, "stride": (1,) * 100},
        {"size": (True,)},
        {"stride": (2,)},
        {"stride": (-1,)},
        {"stride": (1, 1)},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**63 - 1},
        {"offset": None},
    ],
    ids=lambda changed: ",".join(f"{k}={'huge' if v == 10**5000 else str(v)[:20]}" for k, v in changed.items()),
)  # fmt: skip
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_read_pickle_lying_tensor_is_refused(tmp_path, kind, changed):
    content = tensor(**changed)
    if kind == "zip":
        path = archive(tmp_path / "x.pt", content, {"0": BODY})
    else:
        path = write(tmp_path / "x.pt", legacy(content))
    refused(path, tmp_path / "canary", r"x\.pt: (truncated or damaged torch file \(|refused)")


def test_read_pickle_tensor_made_by_hand_is_read(tmp_path):
    data = struct.pack("<4f", 1, 2, 3, 4)
    wanted = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(read(archive(tmp_path / "x.pt", tensor(), {"0": data}))["x"], wanted)
    path = write(tmp_path / "y.pt", legacy(tensor(old=True), storages=struct.pack("<q", 4) + data))
    assert torch.equal(read(path)["x"], wanted)
    assert torch.equal(load_state_dict(path)["x"], wanted)


def duplicate(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(path, tensor(), {"0": BODY}, more={"archive/data/0": BODY})


def scripted(path: Path) -> None:
    archive(path, tensor(), {"0": BODY}, more={"archive/constants.pkl": b"N.", "archive/code/x.py": b"import os"})


def encrypted(path: Path) -> None:
    archive(path, tensor(), {"0": BODY})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def overlapping(path: Path) -> None:
    archive(path, tensor(), {"0": BODY, "1": BODY})
    content = bytearray(path.read_bytes())
    name = b"archive/data/"
    first, second = (content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + n) for n in (0, 1))
    entries = [
        m for m in range(first, len(content)) if content[m : m + 4] == b"PK\x01\x02" and name in content[m : m + 62]
    ]
    where = struct.unpack_from("<I", content, entries[0] + 42)
    struct.pack_into("<I", content, entries[1] + 42, *where)
    path.write_bytes(content)
    assert second > first


def lying(path: Path) -> None:
    archive(path, tensor(), {"0": BODY})
    content = bytearray(path.read_bytes())
    for match in [m for m in range(len(content)) if content[m : m + 4] == b"PK\x01\x02"]:
        struct.pack_into("<II", content, match + 20, 2**30, 2**30)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: archive(p, tensor(), {"0": BODY}, compression=zipfile.ZIP_DEFLATED), "data.pkl' is compressed"),
        (lambda p: archive(p, tensor(), {"0": BODY}, compression=zipfile.ZIP_BZIP2), "compressed"),
        (lambda p: archive(p, tensor(), {"0": BODY}, more={"../../evil": b""}), r"'\.\./\.\./evil' is named .* path"),
        (lambda p: archive(p, tensor(), {"0": BODY}, more={"/etc/passwd": b""}), "'/etc/passwd' is named"),
        (lambda p: archive(p, tensor(), {"0": BODY}, more={"archive/a\\b": b""}), "is named"),
        (lambda p: archive(p, tensor(), {"0": BODY}, more={"C:/x": b""}), "is named"),
        (lambda p: archive(p, tensor(), {"0": BODY}, more={"other/data.pkl": b"N."}), "without one data.pkl"),
        (lambda p: archive(p, tensor(), {"0": BODY}, folder="a/b"), "without one data.pkl"),
        (lambda p: archive(p, tensor(), {"0": BODY[:-1]}), "has 15 bytes, but its pickle claims more"),
        (lambda p: archive(p, tensor(), {}), "the storage '0' is not in the archive"),
        (duplicate, "named twice"),
        (scripted, "a TorchScript archive"),
        (encrypted, "compressed or encrypted"),
        (overlapping, "not where the archive's directory says|overlap"),
        (lying, "not where the archive's directory says|overlap"),
    ],
    ids=lambda item: item.__name__ if callable(item) and item.__name__ != "<lambda>" else None,
)
def test_read_pickle_hostile_archive_is_refused(tmp_path, make, message):
    make(tmp_path / "x.pt")
    refused(tmp_path / "x.pt", tmp_path / "canary", rf"x\.pt: .*{message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (legacy(tensor(), keys=()), "list of storages"),
        (legacy(tensor(), keys=("0", "0")), "list of storages"),
        (legacy(tensor(), keys=("0", "1")), "list of storages"),
        (legacy(tensor(), keys=(0,)), "list of storages"),
        (legacy(tensor(), storages=struct.pack("<q", 2**40)), "cut off or has another size"),
        (legacy(tensor(), storages=struct.pack("<q", 4)), "cut off"),
        (legacy(tensor(), storages=b""), "cut off"),
        (tensor(), "names storages outside"),
        (hostile.MAGIC + pickle.dumps({"little_endian": False}, 2), "version|little-endian"),
        (b"\x80\x02\x8e" + struct.pack("<Q", 2**60) + b"ab.", "cut off or makes no sense"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"ab.", "cut off or makes no sense"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N", "cut off or makes no sense"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "cut off or makes no sense"),
        (b"\x80\x02N" + b"r\xff\xff\xff\xff" + b"0.", "cut off or makes no sense"),
        (b"I" + b"9" * 100_000 + b"\n.", "cut off or makes no sense"),
        (b"hello, I am a text file", "makes no sense"),
        (b"", "empty file"),
    ],
)
def test_read_pickle_broken_stream_is_refused(tmp_path, content, message):
    refused(write(tmp_path / "x.pt", content), tmp_path / "canary", rf"x\.pt: .*({message})")


BOMBS = {
    "laughs": laughs(),
    "modules": None,
    "expanded": None,
    "zip bomb": None,
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "deep": b"\x80\x02" + b"(" * 400_000 + b"." ,
    "nested lists": b"\x80\x02" + b"]" * 450_000 + b"a" * 449_999 + b".",
    "states": None,
}  # fmt: skip


def bomb(name: str, path: Path) -> None:
    if name == "expanded":
        archive(path, tensor(size=(2**20, 2**20), stride=(0, 0)), {"0": BODY})
    elif name == "zip bomb":
        body = bytes(1 << 26)
        archive(path, tensor(count=1 << 24, size=(1 << 24,)), {"0": body}, compression=zipfile.ZIP_DEFLATED)
    elif name == "modules":
        # a module whose two children are the same module, sixty times over
        empty = b"ccollections\nOrderedDict\n)R"
        kinds = hostile.text("_parameters") + empty + hostile.text("_buffers") + empty + hostile.text("_modules")
        made = b"cfoo\nM\n)R}(" + kinds + b"}ubq\x00"
        for _ in range(60):
            made += b"cfoo\nM\n)R}(" + kinds + b"}(U\x01ah\x00U\x01bh\x00uubq\x00"
        path.write_bytes(b"\x80\x02" + made + b".")
    elif name == "states":
        # one large dictionary, given as its state to a great many objects
        large = b"}(" + b"".join(b"J" + struct.pack("<i", n) + b"N" for n in range(50_000)) + b"uq\x000"
        path.write_bytes(b"\x80\x02" + large + b"cfoo\nM\nq\x010(" + b"h\x01)Rh\x00b" * 50_000 + b"l.")
    else:
        path.write_bytes(BOMBS[name] or b"")


@pytest.mark.parametrize("names", [("laughs", "memo"), pytest.param(tuple(BOMBS), marks=pytest.mark.slow)])
def test_read_pickle_bombs_are_refused_in_little_memory_and_time(tmp_path, names):
    for name in names:
        bomb(name, tmp_path / f"{name}.pt")
    code = """
        import resource, sys, time
        from pathlib import Path
        from adamerge import InputError, load_state_dict
        from adamerge.checkpoints.pickles import read_pickle
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sorted(Path(sys.argv[1]).glob("*.pt")):
            start = time.process_time()
            for reader in (read_pickle, load_state_dict):
                try:
                    reader(path)
                    sys.exit(f"{path} was read")
                except InputError as error:
                    print(error)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
            seconds = time.process_time() - start
            print(path.name, grown, "kB", seconds, "s")
            if grown > 300_000 or seconds > 30:
                sys.exit("too much")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


# Hostile headers of safetensors


@pytest.mark.parametrize("name", HEADERS)
def test_load_state_dict_hostile_header_is_refused_in_one_line(tmp_path, name):
    path = write(tmp_path / "x.safetensors", HEADERS[name])
    with pytest.raises(InputError, match=r"x\.safetensors: ") as caught:
        load_state_dict(path)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_corpus_is_large_enough():
    assert len(CALLS) >= 25
