"""Pickles, archives and headers made by hand to do harm: what each must be refused for."""

import copy
import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
BOMB = "a: &a [x]\n" + "".join(
    f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}]\n" for i in range(30)
)  # yaml
SYSTEM = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def call(module: str, name: str, *arguments: str, opcode: str = "REDUCE", protocol: int = 2) -> bytes:
    """Return a pickle that calls a function with texts, in the way of an opcode."""
    head = b"\x80" + bytes([protocol]) if protocol >= 2 else b""
    named = b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    values = b"".join(text(a) if protocol else b"V" + a.encode() + b"\n" for a in arguments)
    made = {
        "REDUCE": named + b"(" + values + b"tR",
        "INST": b"(" + values + b"i" + named[1:],
        "OBJ": b"(" + named + values + b"o",
        "NEWOBJ": named + b"(" + values + b"t\x81",
        "NEWOBJ_EX": named + b"(" + values + b"t}\x92",
        "STACK_GLOBAL": text(module) + text(name) + b"\x93(" + values + b"tR",
        "BUILD": named + b"(" + values + b"tb",
    }[opcode]
    return head + made + b"."


def touch(canary: Path) -> str:
    return f"touch {canary}"


Pickle = Callable[[Path], bytes]


def _calls() -> dict[str, tuple[Pickle, str]]:
    """Name to a pickle that would make the canary, and the global that the error must name."""
    python = "open({0!r}, 'w').close()"
    shell = [
        *[("os", "system"), ("posix", "system"), ("nt", "system"), ("os", "popen"), ("subprocess", "getoutput")],
        *[("subprocess", "Popen"), ("commands", "getoutput"), ("pty", "spawn"), ("asyncio", "create_subprocess_shell")],
        *[("pip._internal.cli.main", "main"), ("torch.utils.collect_env", "run")],
    ]
    code = [
        *[
            ("builtins", "eval"),
            ("builtins", "exec"),
            ("__builtin__", "eval"),
            ("code", "interact"),
            ("timeit", "timeit"),
        ],
        *[("bdb", "Bdb"), ("cProfile", "run"), ("torch.jit.unsupported_tensor_ops", "execWrapper")],
        *[("numpy.testing._private.utils", "runstring"), ("torch._dynamo.guards.GuardBuilder", "get")],
        *[
            ("torch._inductor.codecache", "compile_file"),
            ("pickle", "loads"),
            ("marshal", "loads"),
            ("types", "CodeType"),
        ],
        *[("types", "FunctionType"), ("builtins", "compile"), ("pydoc", "pipepager"), ("doctest", "debug_script")],
    ]
    names = [
        *[("builtins", "getattr"), ("builtins", "__import__"), ("builtins", "open"), ("runpy", "run_path")],
        *[("importlib", "import_module"), ("operator", "methodcaller"), ("operator", "attrgetter")],
        *[("shutil", "rmtree"), ("webbrowser", "open"), ("torch.hub", "load"), ("torch", "load"), ("numpy", "load")],
        *[("torch.serialization", "load"), ("joblib", "load"), ("pandas", "read_pickle"), ("ctypes", "CDLL")],
        *[("torch", "serialization.os.system"), ("torch.nn", "Module.__init__.__globals__"), ("socket", "socket")],
        *[("dill", "loads"), ("cloudpickle.cloudpickle", "_make_function"), ("sys", "setprofile"), ("io", "FileIO")],
    ]
    renamed = {"__builtin__.eval": "builtins.eval", "commands.getoutput": "subprocess.getoutput"}
    made: dict[str, tuple[Pickle, str]] = {}
    for pairs, argument in ((shell, touch), (code, lambda c: python.format(str(c))), (names, str)):
        for module, name in pairs:
            full = f"{module}.{name}"

            def make(canary: Path, module: str = module, name: str = name, argument=argument) -> bytes:
                return call(module, name, argument(canary))

            made[full] = (make, renamed.get(full, full))
    return made


CALLS = _calls()

OPCODES = ["REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "BUILD"]


def _bytes(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def nested(inner: bytes) -> bytes:
    """Return a plain pickle whose storage is a file of its own."""
    return b"\x80\x02ctorch.storage\n_load_from_bytes\n" + _bytes(inner) + b"\x85R."


def tensor(
    *,
    kind: str = "FloatStorage",
    key: str = "0",
    count: object = 4,
    offset: object = 0,
    size: object = (4,),
    stride: object = (1,),
    old: bool = False,
) -> bytes:
    """Return the pickle of {"x": tensor} as torch writes it, with any numbers."""

    def value(item: object) -> bytes:
        return pickle.dumps(item, 2)[2:-1]

    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + value(count)
    storage += b"N" * old  # the legacy format's sixth part
    view = value(offset) + value(size) + value(stride) + b"\x89ccollections\nOrderedDict\n)R"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + view + b"tR"
    return b"\x80\x02}" + text("x") + made + b"s."


def archive(
    path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, *, more: dict[str, bytes] | None = None,
    folder: str = "archive", compression: int = zipfile.ZIP_STORED,
) -> Path:  # fmt: skip
    """Write a zip archive in torch's layout."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{folder}/data.pkl", pickled)
        file.writestr(f"{folder}/byteorder", "little")
        for key, data in (storages or {}).items():
            file.writestr(f"{folder}/data/{key}", data)
        file.writestr(f"{folder}/version", "3\n")
        for name, data in (more or {}).items():
            file.writestr(name, data)
    return path


def legacy(pickled: bytes, keys: object = ("0",), storages: bytes | None = None) -> bytes:
    """Return a file in torch's format before 1.6."""
    body = struct.pack("<q", 4) + bytes(16) if storages is None else storages
    return MAGIC + SYSTEM + pickled + pickle.dumps(list(keys), 2) + body


def laughs(levels: int = 40) -> bytes:
    """Return a pickle of lists of lists: small, and exponential for who walks it."""
    made = b"\x80\x02]q\x00"
    for level in range(levels):
        made += b"]q" + bytes([level + 1]) + b"(" + (b"h" + bytes([level])) * 10 + b"e"
    return made + b"."


def tuple_keys(levels: int = 60) -> bytes:
    """Return a pickle whose one key takes 2**levels steps to hash."""
    made = b"\x80\x02}" + b")" + b"q\x00"
    for _ in range(levels):
        made += b"2\x86"
    return made + b"Ns."


def safetensors(header: object, body: bytes = bytes(8), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: dict[str, bytes] = {
    "length beyond the file": safetensors({"x": ENTRY}, length=10**6),
    "length of 2**63": safetensors({"x": ENTRY}, length=2**63),
    "offset beyond the file": safetensors({"x": {**ENTRY, "data_offsets": [0, 80]}}),
    "offsets that end early": safetensors({"x": ENTRY}, bytes(80)),
    "offsets backwards": safetensors({"x": {**ENTRY, "data_offsets": [8, 0]}}, b""),
    "offsets that overlap": safetensors({"x": ENTRY, "y": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
    "offsets with a hole": safetensors({"x": ENTRY, "y": {**ENTRY, "data_offsets": [16, 24]}}, bytes(24)),
    "negative offset": safetensors({"x": {**ENTRY, "data_offsets": [-8, 8]}}),
    "float offset": safetensors({"x": {**ENTRY, "data_offsets": [0.0, 8.0]}}),
    "three offsets": safetensors({"x": {**ENTRY, "data_offsets": [0, 4, 8]}}),
    "negative shape": safetensors({"x": {**ENTRY, "shape": [-1, -2]}}),
    "float shape": safetensors({"x": {**ENTRY, "shape": [2.0]}}),
    "shape that overflows": safetensors({"x": {**ENTRY, "shape": [2**62, 8]}}),
    "shape of other size": safetensors({"x": {**ENTRY, "shape": [3]}}),
    "wrong dtype": safetensors({"x": {**ENTRY, "dtype": "F64"}}),
    "unknown dtype": safetensors({"x": {**ENTRY, "dtype": "F31"}}),
    "duplicate keys": safetensors(b'{"x":' + json.dumps(ENTRY).encode() + b',"x":' + json.dumps(ENTRY).encode() + b"}"),
    "metadata that is no text": safetensors({"__metadata__": {"a": {"b": 1}}, "x": ENTRY}),
    "list": safetensors([ENTRY]),
    "deep": safetensors(b'{"x":' + b"[" * 200_000),
    "not text": safetensors(b'{"\xff\xfe": 1}'),
    "NaN": safetensors(b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
}


def saved(content: object, *, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


# Contents of JSON and yaml files

ODD = [
    *(None, True, 0, -1, 1.5, 2**63, 10**400, math.nan, math.inf, "", "x", "nan", "../x", "\ud800", "\x00", [], {}),
    *([1], [[1]], ["x"], {"x": 1}, {"": {}}, [[[[]]]], {"name": "pattern"}, {"name": "chunk", "default": -1}, "row"),
]


def nodes(content, path=()):
    """Yield the path of every node of a JSON content."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from nodes(value, (*path, key))


def replaced(content, path, change, value):
    """Return a copy with one node replaced, removed, or renamed."""
    if not path:
        return value
    content = copy.deepcopy(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if change == "remove":
        del parent[path[-1]]
    elif change == "rename" and isinstance(parent, dict):
        parent[str(value)] = parent.pop(path[-1])
    else:
        parent[path[-1]] = value
    return content
