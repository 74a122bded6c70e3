"""LoRA folders: what peft writes is what merges, and what is not understood is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamerge import Coefficients, ExpertPool, InputError, merge
from adamerge.checkpoints.checkpoint import open_checkpoint
from adamerge.pool.adapter_config import names_other_base
from adamerge.pool.lora import AdapterCheckpoint, change_of, open_expert
from adamerge.pool.low_rank import LowRank
from tests.support.adapters import random_adapter, write_adapter

GOLDEN = Path(__file__).parents[1] / "golden" / "lora"
ADAPTERS = ["plain", "patterns", "kinds", "biases", "turned", "lora_bias"]
BASE = {"w.weight": torch.arange(12.0).view(4, 3), "w.bias": torch.ones(4), "v.weight": torch.ones(3, 3)}
A, B = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]), torch.arange(8.0).view(4, 2)
PLAIN = {"w.lora_A.weight": A, "w.lora_B.weight": B}


@pytest.fixture
def base(tmp_path):
    save_file(BASE, tmp_path / "base.safetensors")
    return open_checkpoint(tmp_path / "base.safetensors")


def adapter(tmp_path, base, tensors=PLAIN, prefix="", **config) -> AdapterCheckpoint:
    return AdapterCheckpoint(write_adapter(tmp_path / "lora", tensors, **config), base, prefix)


# Against peft


@pytest.fixture(scope="module")
def merged_by_peft():
    result = {name: {} for name in ADAPTERS}
    for key, tensor in load_file(GOLDEN / "merged.safetensors").items():
        name, key = key.split(".", 1)
        result[name][key] = tensor
    return result


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_is_the_checkpoint_that_peft_merges_it_into(name, merged_by_peft):
    state = load_file(GOLDEN / "base.safetensors")
    expert = open_expert(GOLDEN / name, open_checkpoint(GOLDEN / "base.safetensors"))
    assert set(expert.keys) == set(state)
    assert merged_by_peft[name]
    for key, tensor in {**state, **merged_by_peft[name]}.items():
        # float32 products of at most three ranks, in another order: a few ulps of values around 1
        torch.testing.assert_close(expert.get(key), tensor, rtol=1e-6, atol=1e-6)
        assert (expert.spec(key)[0], expert.get(key).shape) == (tuple(tensor.shape), tensor.shape)
        assert torch.equal(expert.get(key), state[key]) == (key not in merged_by_peft[name])


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("storage", ["ram", "stream"])
def test_merge_with_coefficient_one_is_what_peft_merges(name, storage, merged_by_peft):
    pool = ExpertPool.from_files(GOLDEN / "base.safetensors", {"a": GOLDEN / name}, storage=storage)
    assert set(pool.names) == set(merged_by_peft[name])
    for merged in (merge(pool, Coefficients(pool, "row", 1.0)), merge(pool, Coefficients(pool, init=1.0), detach=True)):
        for key, tensor in merged_by_peft[name].items():
            torch.testing.assert_close(merged[key].detach(), tensor, rtol=1e-6, atol=1e-6)
    teacher = pool.expert_parameters("a")
    for key, tensor in merged_by_peft[name].items():
        torch.testing.assert_close(teacher[key], tensor, rtol=1e-6, atol=1e-6)


# What an adapter says


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 6}, 3.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"w": 1}}, 0.5),
        ({"r": 5, "rank_pattern": {"w": 2}, "lora_alpha": 3}, 1.5),
        ({"r": 2, "rank_pattern": {"v": 9, "other.w": 3}, "alpha_pattern": {"xw": 7}}, 1.0),
    ],
)
def test_scale_is_alpha_over_rank_by_the_patterns(tmp_path, base, config, scale):
    product = change_of(adapter(tmp_path, base, **config), "w.weight")
    assert isinstance(product, LowRank)
    torch.testing.assert_close(product.up @ product.down, scale * B @ A)


def test_untouched_tensors_are_the_bases_and_cost_nothing(tmp_path, base):
    expert = adapter(tmp_path, base)
    assert torch.equal(expert.get("w.bias"), BASE["w.bias"])
    assert change_of(expert, "w.bias").nbytes == 0 < change_of(expert, "w.weight").nbytes


def test_modules_to_save_and_biases_are_the_adapters_own(tmp_path, base):
    own = {"v.modules_to_save.default.weight": torch.zeros(3, 3), "w.base_layer.bias": torch.zeros(4)}
    expert = adapter(tmp_path, base, PLAIN | own, modules_to_save=["v"], bias="all")
    assert torch.equal(change_of(expert, "v.weight"), torch.zeros(3, 3))
    assert torch.equal(expert.get("w.bias"), torch.zeros(4))


def test_replaced_and_adapted_tensor_gets_both(tmp_path, base):
    expert = adapter(tmp_path, base, PLAIN | {"w.base_layer.weight": torch.ones(4, 3)})
    torch.testing.assert_close(expert.get("w.weight"), 1 + B @ A)
    torch.testing.assert_close(change_of(expert, "w.weight"), 1 + B @ A)


def test_head_of_the_adapters_own_is_kept_and_left_out_by_exclude(tmp_path, base):
    folder = write_adapter(tmp_path / "lora", PLAIN | {"fc.weight": torch.ones(9, 3)}, modules_to_save=["fc"])
    with pytest.raises(InputError, match=r"1 tensors that the base lacks: 'fc.weight'.*exclude"):
        ExpertPool.from_files(base.path, {"a": folder})
    pool = ExpertPool.from_files(base.path, {"a": folder}, exclude=["fc.*"])
    assert torch.equal(pool.checkpoint("a").get("fc.weight"), torch.ones(9, 3))


def test_adapter_of_the_encoder_alone_fits_a_base_with_a_prefix(tmp_path):
    save_file({f"visual.{key}": tensor for key, tensor in BASE.items()}, tmp_path / "base.safetensors")
    folder = write_adapter(tmp_path / "lora", PLAIN)
    pool = ExpertPool.from_files(tmp_path / "base.safetensors", {"a": folder}, key_map="visual.")
    assert pool.names == ("w.weight",)
    assert ExpertPool.from_files(tmp_path / "base.safetensors", {"a": folder}).names == ("visual.w.weight",)


def test_half_precision_adapter_is_computed_in_float32(tmp_path, base):
    product = change_of(adapter(tmp_path, base, {key: t.bfloat16() for key, t in PLAIN.items()}), "w.weight")
    assert product.up.dtype == product.down.dtype == torch.float32


def test_torch_file_is_read_without_unpickling_objects(tmp_path, base):
    folder = write_adapter(tmp_path / "lora", PLAIN)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    torch.testing.assert_close(AdapterCheckpoint(folder, base).get("w.weight"), BASE["w.weight"] + B @ A)
    torch.save(torch.nn.Linear(1, 1), folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin: holds pickled Python objects"):
        AdapterCheckpoint(folder, base)


def test_hash_follows_both_files(tmp_path, base):
    hashes = {
        adapter(tmp_path, base).sha256(),
        adapter(tmp_path, base, lora_alpha=4).sha256(),
        adapter(tmp_path, base, PLAIN | {"w.lora_B.weight": B + 1}).sha256(),
    }
    assert len(hashes) == 3
    assert adapter(tmp_path, base).sha256() in hashes


def test_copy_of_an_adapted_tensor_of_the_base_leaves_its_change_a_product(tmp_path, base):
    copied = adapter(tmp_path, base, PLAIN | {"w.weight": BASE["w.weight"]})
    assert torch.equal(copied.get("w.weight"), adapter(tmp_path, base).get("w.weight"))
    assert isinstance(copied.change("w.weight"), LowRank)
    trained = adapter(tmp_path, base, PLAIN | {"w.weight": BASE["w.weight"] + 1})
    assert torch.equal(trained.get("w.weight"), copied.get("w.weight") + 1)


class Modules(torch.nn.Module):
    """A module of each kind whose weights adapters change."""

    def __init__(self):
        super().__init__()
        self.words, self.linear = torch.nn.Embedding(7, 5), torch.nn.Linear(5, 5)
        self.turned, self.images = (
            pytest.importorskip("transformers").pytorch_utils.Conv1D(6, 5),
            torch.nn.Conv2d(3, 4, 2),
        )

    def forward(self, ids, images):
        return self.turned(self.linear(self.words(ids))), self.images(images)


@pytest.mark.parametrize("kind", ["words", "linear", "turned", "images"])
def test_dora_is_what_peft_merges(tmp_path, kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    network = Modules()
    save_file(network.state_dict(), tmp_path / "base.safetensors")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=[kind],
        use_dora=True,
        init_lora_weights=False,
        fan_in_fan_out=kind == "turned",
    )
    adapted = peft.get_peft_model(network, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter *= torch.rand_like(parameter) + 0.5
    adapted.save_pretrained(tmp_path / "dora", save_embedding_layers=False)
    base = open_checkpoint(tmp_path / "base.safetensors")
    expert = AdapterCheckpoint(tmp_path / "dora", base)
    expected = adapted.merge_and_unload().state_dict()
    for key in base.keys:
        torch.testing.assert_close(expert.get(key), expected[key], rtol=1e-6, atol=1e-6)
    assert isinstance(change_of(expert, f"{kind}.weight"), torch.Tensor)  # no product says it
    assert not torch.equal(expected[f"{kind}.weight"], base.get(f"{kind}.weight"))


# What is refused

BAD = {
    "dora": ({}, {"use_dora": True}, r"w\.lora_A\.weight'.*has no lora_magnitude_vector, but .*use_dora = True"),
    "norms": ({"w.lora_magnitude_vector": B[:2, 0]}, {"use_dora": True}, r"expected 4 numbers, one per output"),
    "kind": ({}, {"peft_type": "IA3"}, r"adapter_config\.json: peft_type: expected 'LORA', found 'IA3'"),
    "pissa": ({}, {"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights: 'pissa_niter_4' moved part of the base"),
    "tokens": ({"w.token_adapter.trainable_tokens_delta": B}, {}, r"trainable_tokens_delta' belongs to a variant"),
    "magnitude": ({"w.lora_magnitude_vector": B[:, 0]}, {}, r"has lora_magnitude_vector, but .*use_dora = False"),
    "rank": ({}, {"r": 4}, r"w\.lora_A\.weight' has rank 2, but .*adapter_config\.json says r = 4.*rank_pattern"),
    "alpha": ({}, {"lora_alpha": None}, r"lora_alpha: expected a number above 0, found None"),
    "pattern": ({}, {"rank_pattern": {"(": 2}}, r"rank_pattern\['\('\]: '\(' is not a regular expression"),
    "partner": ({"v.lora_A.weight": A}, {}, r"'base_model.model.v.lora_A.weight': its partner lora_B is missing"),
    "unknown": ({"x.lora_A.weight": A, "x.lora_B.weight": B}, {}, r"adapts 'x.weight', which .* lacks.*on this base"),
    "shape": ({"w.lora_A.weight": A[:, :2]}, {}, r"expected factors of the base's 'w.weight' \(4, 3\), found \(2, 2\)"),
    "bias": ({"x.lora_B.bias": B[:, 0]}, {"lora_bias": True}, r"adapts 'x.bias', which .* lacks"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapter_is_refused_with_file_and_key(tmp_path, base, case):
    tensors, config, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        adapter(tmp_path, base, PLAIN | tensors, **config)
    assert "lora" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_without_an_adapter_or_its_files_is_refused(tmp_path, base):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: expected a checkpoint file, or .*adapter_config\.json"):
        open_expert(tmp_path / "empty", base)
    folder = write_adapter(tmp_path / "lora", PLAIN)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors: no such file"):
        open_expert(folder, base)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json: not readable as JSON"):
        open_expert(folder, base)


def test_adapter_without_lora_weights_or_pefts_prefix_is_refused(tmp_path, base):
    with pytest.raises(InputError, match="no LoRA weights"):
        adapter(tmp_path, base, {"v.weight": torch.ones(3, 3)})
    save_file({"w.lora_A.weight": A}, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"'w.lora_A.weight': expected a key that begins with 'base_model.model.'"):
        AdapterCheckpoint(tmp_path / "lora", base)


def test_untrained_adapter_and_one_folder_twice_are_refused(tmp_path, base):
    folder = write_adapter(tmp_path / "lora", PLAIN | {"w.lora_B.weight": 0 * B})
    with pytest.raises(InputError, match="identical to the base"):
        ExpertPool.from_files(base.path, {"a": folder})
    folder = random_adapter(tmp_path / "one", {"w": (4, 3)})
    with pytest.raises(InputError, match="the same file"):
        ExpertPool.from_files(base.path, {"a": folder, "b": folder})
    shutil.copytree(folder, tmp_path / "two")
    with pytest.raises(InputError, match="identical weights"):
        ExpertPool.from_files(base.path, {"a": folder, "b": tmp_path / "two"})


def test_golden_adapters_say_which_peft_wrote_them():
    for name in ADAPTERS:
        content = json.loads((GOLDEN / name / "adapter_config.json").read_text())
        assert content["peft_version"] in (GOLDEN.parent / "README.md").read_text()


def test_adapter_of_another_base_of_the_same_shape_is_told(tmp_path, caplog):
    folder = tmp_path / "llama-7b"
    folder.mkdir()
    save_file({"fc.weight": torch.randn(4, 3)}, folder / "model.safetensors")
    for recorded, is_told in (("org/Llama-7B", False), ("org/llama-7b-chat", True), (None, False)):
        random_adapter(tmp_path / "one", {"fc": (4, 3)}, base_model_name_or_path=recorded)
        caplog.clear()
        ExpertPool.from_files(folder / "model.safetensors", {"one": tmp_path / "one"})
        assert (f"was trained on {recorded!r}, and the base is {folder}" in caplog.text) == is_told
    assert not names_other_base("org/llama-7b-chat", str(tmp_path / "base" / "model-00001-of-2.safetensors"))
    assert not names_other_base("/home/me/base", str(folder))
