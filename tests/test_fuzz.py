"""Damaged and invented files: a reader succeeds, or raises one InputError or OSError; nothing else.

The fast run tries some files of each format; ``pytest -m slow -s tests/test_fuzz.py`` tries tens of thousands.
"""

import json
import pickle
import resource
import time
from collections import Counter

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import save

from adamerge import Coefficients, InputError, load_state_dict
from adamerge.checkpoints.pickles import read_pickle
from adamerge.model.coefficients import load_coefficients, save_coefficients
from adamerge.pool.pool_file import load_pool_file
from tests.support import hostile
from tests.support.hostile import ODD, nodes, replaced
from tests.support.pools import large_pool
from tests.support.toy import make_toy

TRIED: Counter[str] = Counter()
SECONDS, KILOBYTES = 10, 500_000  # what one file may take; what the process may grow by

POOL = make_toy().pool()
LARGE = large_pool()
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor([1, 2])}
MODULE = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
FILES = {
    "safetensors": save(TENSORS, {"format": "pt"}),
    "zip": hostile.saved({"state_dict": TENSORS, "epoch": 3}, zipped=True),
    "legacy": hostile.saved(TENSORS, zipped=False),
    "module, zip": hostile.saved(MODULE, zipped=True),
    "module, legacy": hostile.saved(MODULE, zipped=False),
    "module, protocol 0": pickle.dumps(MODULE, 0),
    "module, protocol 5": pickle.dumps(MODULE, 5),
}
WORDS = [
    *(bytes([n]) for n in (0, 1, 127, 128, 255)),
    *(n.to_bytes(size, "little") for size in (4, 8) for n in (0, 1, 2**31 - 1, 2**31, 2**32 - 1)),
    *(n.to_bytes(8, "little") for n in (2**63 - 1, 2**63, 2**64 - 1)),
    *(b"[", b"{", b"-1", b"1e999", b"NaN", b"null", b'"', b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"..", b"/"),
]
OPCODES = [
    *(bytes([n]) for n in b"(.0125RabcdehijloqrstuBCJKMNQSTUVXGIFLgp]}\x85\x86\x87\x88\x89\x8a\x8f\x90\x91\x93\x94"),
    *(b"\x80\x02", b"\x80\x05", b"K\x01", b"q\x00", b"h\x00", b"U\x01x", b"X\x01\x00\x00\x00x", b"J\xff\xff\xff\xff"),
    *(b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"),
    *(b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ccopyreg\n_reconstructor\n", b"c_codecs\nencode\n"),
    *(b"ctorch.storage\n_load_from_bytes\n", b"cfoo\nBar\n", b"ctorch\nSize\n", b"cbuiltins\nset\n", b"ctorch\nint8\n"),
    *(b"cos\nsystem\n", b")", b"\x81", b"\x92", b")R", b"\x85R", b"tR", hostile.text("storage"), hostile.text("0")),
    *(hostile.text("_modules"), hostile.text("_parameters"), hostile.text("_buffers"), hostile.tensor()[2:-1]),
]


def attempt(reader, path) -> None:
    start = time.process_time()
    try:
        reader(path)
        TRIED["read"] += 1
    except (InputError, OSError) as error:
        TRIED["refused"] += 1
        assert str(error)  # noqa: PT017
    assert time.process_time() - start < SECONDS


def read_views(path) -> None:
    for tensor in read_pickle(path).tensors.values():
        tensor.clone()


def profiles(fast: int, slow: int):
    """Run a test with few cases, and, marked slow, with many."""
    return pytest.mark.parametrize("cases", [fast, pytest.param(slow, marks=pytest.mark.slow)])


def kinds(every, quick, fast: int, slow: int):
    """Run a test with few cases of the quick kinds, and, marked slow, with many of every kind."""
    many = [pytest.param(kind, slow, marks=pytest.mark.slow) for kind in every]
    return pytest.mark.parametrize(("kind", "cases"), [*((kind, fast) for kind in quick), *many])


def run(cases: int, strategy, check) -> None:
    """Check that many examples, and that the process stays small."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @hypothesis.settings(max_examples=cases, suppress_health_check=list(HealthCheck), deadline=None)
    @given(strategy)
    def every(example) -> None:
        TRIED["cases"] += 1
        check(example)

    every()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < KILOBYTES
    print(f"so far {dict(TRIED)}, other outcomes 0; {grown} kB more")


@st.composite
def edits(draw, content: bytes) -> bytes:
    """Return content with some bytes changed, removed, repeated or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        span = draw(st.sampled_from([1, 2, 4, 8, 30, len(data)]))
        kind = draw(st.sampled_from(["word", "insert", "remove", "repeat", "flip", "cut"]))
        if kind == "word":
            word = draw(st.sampled_from(WORDS))
            data[at : at + len(word)] = word
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8) | st.sampled_from(WORDS + OPCODES))
        elif kind == "remove":
            del data[at : at + min(span, 30)]
        elif kind == "repeat":
            data[at:at] = data[at : at + span]
        elif kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
    return bytes(data)


@kinds(FILES, ["safetensors", "zip", "legacy"], 40, 1500)
def test_readers_of_checkpoints_damaged_file_loads_or_is_refused(tmp_path, kind, cases):
    path = tmp_path / "x"
    readers = [load_state_dict] if kind == "safetensors" else [load_state_dict, read_views]
    for reader in readers:
        path.write_bytes(FILES[kind])
        if "module" not in kind or reader is read_views:
            reader(path)  # whole, it can be read

    def check(content: bytes) -> None:
        path.write_bytes(content)
        for reader in (load_state_dict, read_views):
            attempt(reader, path)

    run(cases, edits(FILES[kind]), check)


@kinds(["zip", "legacy", "plain"], ["plain"], 60, 4000)
def test_readers_of_pickles_invented_opcodes_are_read_or_refused(tmp_path, kind, cases):
    path = tmp_path / "x"

    def check(parts: list[bytes]) -> None:
        content = b"".join(parts) + b"."
        if kind == "zip":
            hostile.archive(path, content, {"0": bytes(16)})
        else:
            path.write_bytes(hostile.legacy(content) if kind == "legacy" else content)
        for reader in (load_state_dict, read_views):
            attempt(reader, path)

    run(cases, st.lists(st.sampled_from(OPCODES) | st.binary(max_size=3), max_size=40), check)


TEXTS = st.text("ab\0\x7f\u00e9", max_size=4)
HEADER_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "", 1]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, -1, 2**31, 2**32, 2**62, 2**63, 1.0]), max_size=4),
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 24, -8, 2**63, 2**64 - 8, 0.0, "8"]), max_size=3),
    }
)


@pytest.mark.slow
def test_load_state_dict_invented_header_is_read_or_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    headers = st.dictionaries(TEXTS | st.just("__metadata__"), ENTRIES | HEADER_VALUES, max_size=3)

    def check(example: tuple[object, int]) -> None:
        header, body = example
        path.write_bytes(hostile.safetensors(header, bytes(body)))
        attempt(load_state_dict, path)

    run(4000, st.tuples(headers | HEADER_VALUES, st.sampled_from([0, 4, 8, 16, 24])), check)


def coefficient_files(tmp_path):
    """Write a coefficients file of each kind, with its pool."""
    for name, pool, granularity in (("task", POOL, "task"), ("chunk", POOL, "chunk"), ("large", LARGE, "row")):
        path = tmp_path / f"{name}.json"
        save_coefficients(Coefficients(pool, granularity, init=0.1), path, pool)
        yield path, pool


@profiles(60, 1500)
def test_load_coefficients_changed_content_is_read_or_refused(tmp_path, cases):
    for path, pool in coefficient_files(tmp_path):
        content = json.loads(path.read_text())
        load_coefficients(path, pool)
        places = list(nodes(content))[:400]
        choices = st.lists(
            st.tuples(st.sampled_from(places), st.sampled_from(["replace", "remove", "rename"]), st.sampled_from(ODD)),
            min_size=1,
            max_size=2,
        )

        def check(changes, path=path, pool=pool, content=content) -> None:
            changed = content
            for place, change, value in changes:
                try:
                    changed = replaced(changed, place, change, value)
                except (KeyError, IndexError, TypeError, AttributeError):  # the first change took the place away
                    continue
            path.write_text(json.dumps(changed))
            attempt(lambda p: load_coefficients(p, pool), path)

        run(cases, choices, check)


@pytest.mark.slow
def test_load_coefficients_damaged_bytes_are_read_or_refused(tmp_path):
    for path, pool in coefficient_files(tmp_path):
        targets = [path] + ([path.with_suffix(".safetensors")] if pool is LARGE else [])
        for target in targets:
            content = target.read_bytes()

            def check(changed: bytes, path=path, pool=pool, target=target) -> None:
                target.write_bytes(changed)
                attempt(lambda p: load_coefficients(p, pool), path)

            run(1000, edits(content), check)
            target.write_bytes(content)


POOL_FILE = b"base: base.safetensors\nexperts:\n  cars: cars.safetensors\n  dtd: ${zoo:experts/x}\ninclude: ['a.*']\n"
YAML = [
    *(b": ", b"- ", b"${", b"${oc.env:HOME}", b"&a ", b"*a", b"\t", b"? ", b"[", b"???"),
    b"!!python/object/apply:os.system ['true']",
]


@profiles(60, 2000)
def test_load_pool_file_damaged_file_is_read_or_refused(tmp_path, cases):
    path = tmp_path / "pool.yaml"
    pieces = st.sampled_from(YAML + [line + b"\n" for line in POOL_FILE.splitlines()])
    invented = st.lists(pieces | st.binary(max_size=3), max_size=12).map(b"".join)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        attempt(load_pool_file, path)

    run(cases, edits(POOL_FILE) | invented, check)
