"""References to the Hub, on a cache in its client's layout; the network is never asked."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from adamerge import ExpertPool, InputError
from adamerge.checkpoints.hub import HubReference, located, reference_of
from adamerge.pool.headers import read_headers
from adamerge.pool.options import PoolOptions
from tests.support.hub_cache import add_model, commit_of
from tests.support.toy import make_toy, save_files

CARD = b"---\nlicense: mit\ntags: [clip]\n---\n# A model\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; whatever would call the network fails."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def models(cache, tmp_path):
    """The toy's base and experts as repositories ``org/base``, ``org/red``, ..."""
    toy = make_toy()
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    for name, path in {"base": base, **experts}.items():
        files = {"config.json": b"{}", "model.safetensors": path.read_bytes(), "README.md": CARD}
        add_model(cache, f"org/{name}", files)
    return toy


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://org/name", ("org/name", None, None)),
        ("hf://org/name@v1.0", ("org/name", "v1.0", None)),
        ("hf://org/name/sub/model.safetensors", ("org/name", None, "sub/model.safetensors")),
        ("hf://o-r.g/na_me@main/x.bin", ("o-r.g/na_me", "main", "x.bin")),
    ],
)
def test_reference_of_text_and_path_and_back(text, parts):
    found = reference_of(text)
    assert (found.repository, found.revision, found.file) == parts
    assert str(found) == text
    assert reference_of(Path(text)) == found  # a Path joins the slashes


def test_reference_of_paths_and_wrong_references():
    assert reference_of("base.safetensors") is None
    assert reference_of(Path("/hf/org/name")) is None
    for wrong in ("hf://org/na..me", "hf://org/name-", "hf://o/n/../../x", "hf://o/n@..", "hf://o/n/a/../../../x"):
        with pytest.raises(InputError, match=r"no name of a model of the Hub|inside the repository"):
            reference_of(wrong)
    for wrong in ("hf://name", "hf://", "hf://org/name@", "hf://org//name", "hf://o/n/"):
        with pytest.raises(InputError, match=r"expected hf://ORG/NAME"):
            reference_of(wrong)


def test_located_reads_branch_commit_and_file_from_the_cache(cache, models):
    commit = commit_of("org/red")
    folder = located("hf://org/red")
    assert folder.name == commit
    assert located(f"hf://org/red@{commit}") == folder
    assert located("hf://org/red/model.safetensors") == folder / "model.safetensors"
    assert HubReference("org/red").pinned() == HubReference("org/red", commit)
    assert HubReference("org/red").licence() == "mit"
    assert located("some/file") == Path("some/file")


def test_pool_from_the_hub_is_the_pool_of_the_files(models):
    names = list(models.experts)
    pool = ExpertPool.from_files("hf://org/base", {name: f"hf://org/{name}" for name in names})
    assert pool.expert_names == tuple(names)
    assert set(pool.names) == set(models.pool().names)
    with pytest.raises(InputError, match="are the same file"):
        ExpertPool.from_files("hf://org/base", {"one": "hf://org/red", "two": "hf://org/red@main"})


def test_missing_models_are_one_error_that_says_how_to_get_them(cache, models):
    experts = {"red": "hf://org/red", "far": "hf://org/far@v2", "away": "hf://org/away"}
    with pytest.raises(
        InputError, match=r"^Not in .*: 2 models of .*: adamerge pool fetch hf://org/far@v2 hf://org/away\. .*HF_HOME"
    ) as caught:
        ExpertPool.from_files("hf://org/base", experts)
    assert str(cache) in str(caught.value)
    assert "hf://org/red" not in str(caught.value)
    problems = read_headers("hf://org/base", experts, PoolOptions()).problems
    assert problems == (str(caught.value),)
    with pytest.raises(InputError, match=r"hf://org/red/none\.bin"):
        located("hf://org/red/none.bin")


@pytest.mark.parametrize(
    ("files", "is_whole"),
    [
        ({}, False),
        ({"model.safetensors.index.json": ("one.safetensors", "two.safetensors"), "one.safetensors": None}, False),
        ({"model.safetensors.index.json": ("one.safetensors",), "one.safetensors": None}, True),
        ({"pytorch_model.bin.index.json": ("one.bin", "two.bin"), "one.bin": None}, False),
        ({"pytorch_model.bin.index.json": ("one.bin",), "model.safetensors": None}, True),  # as fetched: the safe ones
        ({"pytorch_model.bin": None}, True),
    ],
)
def test_model_without_all_its_weights_is_not_in_the_cache(cache, files, is_whole):
    content = {
        name: b"x" if shards is None else json.dumps({"weight_map": {shard: shard for shard in shards}}).encode()
        for name, shards in files.items()
    }
    add_model(cache, "org/part", {"config.json": b"{}", **content})
    reference = HubReference("org/part")
    assert (reference.cached() is not None) == is_whole
    if not is_whole:
        with pytest.raises(InputError, match="Not in the Hugging Face cache"):
            located("hf://org/part")
        with pytest.raises(InputError, match="all that an index names"):
            reference.fetch()


def test_fetch_without_network_is_one_error_and_with_it_takes_safe_weights(cache, models, monkeypatch):
    assert HubReference("org/red").fetch() == located("hf://org/red")  # it is here already
    with pytest.raises(InputError, match=r"hf://org/far: cannot be downloaded: .*HF_HUB_OFFLINE"):
        HubReference("org/far").fetch()
    asked = []

    def download(repository, **options):
        asked.append(options["allow_patterns"])
        weights = "model.safetensors" if repository == "org/safe" else "pytorch_model.bin"
        content = {"config.json": b"{}"} | (
            {weights: b"x"} if weights.endswith("safetensors") or len(asked) > 1 else {}
        )
        add_model(cache / str(len(asked)), repository, content)
        return str(
            cache / str(len(asked)) / f"models--{repository.replace('/', '--')}/snapshots/{commit_of(repository)}"
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert (HubReference("org/safe").fetch() / "model.safetensors").exists()
    assert len(asked) == 1
    assert "*.safetensors" in asked[0]
    assert "*.bin" not in asked[0]
    asked.clear()
    assert (HubReference("org/old").fetch() / "pytorch_model.bin").exists()
    assert len(asked) == 2
