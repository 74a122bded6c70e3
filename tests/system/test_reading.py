"""What is read of a stranger's files: regular ones, bounded; and what is written stays where it belongs."""

import os
import time

import pytest
import yaml

from adamerge import InputError
from adamerge.system.files import check_inside, open_own
from adamerge.system.patterns import search_all
from adamerge.system.reading import (
    MAX_JSON,
    check_texts,
    open_regular,
    read_bytes,
    read_json,
    read_lines,
    read_text,
    read_yaml_text,
)
from tests.support.hostile import BOMB

READERS = [open_regular, read_bytes, read_text, read_json, read_yaml_text, lambda path: list(read_lines(path))]


@pytest.mark.parametrize("reader", READERS)
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "model.json").symlink_to("pipe")
    with pytest.raises(InputError, match=r"model\.json: expected a file, found a named pipe"):
        check_texts(tmp_path)
    for path, found in ((tmp_path / "pipe", "a named pipe"), (tmp_path / "link", "a device"), (tmp_path, "a folder")):
        with pytest.raises(InputError, match=f"{path}: expected a file, found {found}"):
            reader(path)
    with pytest.raises(FileNotFoundError):
        reader(tmp_path / "missing")


def test_texts_are_read_up_to_a_limit(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"a\r\nb\n")
    assert (read_text(path), list(read_lines(path)), read_bytes(path, 5)) == ("a\nb\n", ["a\r\n", "b\n"], b"a\r\nb\n")
    for reader in (lambda: read_bytes(path, 4), lambda: list(read_lines(path, 4))):
        with pytest.raises(InputError, match="expected"):
            reader()
    path.write_bytes(b"\xef\xbb\xbfa\n")  # some programs begin a file with a mark
    assert list(read_lines(path)) == ["a\n"]
    path.touch()
    os.truncate(path, 1 << 40)  # a sparse file
    for reader in READERS[1:]:
        with pytest.raises(InputError, match=f"{path}: expected"):
            reader(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * MAX_JSON, b"1" * 5000])
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json: not readable as JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "text", [BOMB, "a: &a [*a]", "[" * 60, "a: *b", "a: b: c", "a: \x1b", "- x\n" * 20_001, "a: !!binary eA=="]
)
def test_yaml_that_is_deep_or_doubles_is_refused_in_no_time(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(InputError, match=r"x\.yaml: not readable as yaml"):
        read_yaml_text(path)
    assert time.process_time() - start < 5


def test_yaml_with_a_few_aliases_is_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1, y: &y [1, 2]}\nb: {<<: *a, x: 2}\nc: *y\n")
    assert yaml.safe_load(read_yaml_text(path))["b"] == {"x": 2, "y": [1, 2]}


NAMES = [f"visual.transformer.resblocks.{n}.attn.{kind}" for n in range(12) for kind in ("weight", "bias")]


def test_search_all_finds_what_re_does():
    found = search_all({"one": r"blocks\.\d+", "two": "(attn.)+w", "none": "x"}, NAMES)
    assert found["one"] == {name: name.split("transformer.res")[1].rsplit(".", 2)[0] for name in NAMES}
    assert found["two"] == {name: "attn.w" for name in NAMES if name.endswith("weight")}
    assert found["none"] == {}


def test_search_all_gives_up_on_what_takes_for_ever():
    with pytest.raises(InputError, match=r"granularity\.pattern: .*takes too long"):
        search_all({"granularity.pattern": r"(\w+\.?)*!"}, NAMES)


@pytest.mark.parametrize("pattern", ["(", "(" * 400 + ")" * 400, "x" * 501, 3])
def test_search_all_of_no_expression_is_refused(pattern):
    with pytest.raises(InputError, match="regular expression"):
        search_all({"option": pattern}, NAMES)


def test_links_are_not_written_through(tmp_path):
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    (run / "metrics").mkdir(parents=True)
    (run / ".lock").symlink_to(victim)
    with pytest.raises(InputError, match=r"\.lock: expected a file to write to, found a link"):
        open_own(run / ".lock")
    with pytest.raises(InputError, match=r"\.lock: a link that leads out of"):
        check_inside(run)
    (run / ".lock").unlink()
    (run / "latest").symlink_to("metrics")  # as a logger keeps
    check_inside(run)
    os.close(open_own(run / ".lock"))
    with pytest.raises(InputError, match="found something else"):
        open_own(run / "metrics")
    assert victim.read_text() == "precious"
