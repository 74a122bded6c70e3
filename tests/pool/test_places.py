"""Where the names of an adapter lead: what peft itself merges, and no tensor that ends up nowhere."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adamerge import Coefficients, ExpertPool, InputError, merge
from adamerge.pool.places import BIAS, WEIGHT, Place, places_of
from tests.support.adapters import write_adapter

GOLDEN = Path(__file__).parents[1] / "golden" / "lora_clip"
BASE = GOLDEN / "base.safetensors"


def merged_by_peft(adapter: str) -> dict[str, torch.Tensor]:
    start = f"{adapter}."
    return {
        k.removeprefix(start): v for k, v in load_file(GOLDEN / "merged.safetensors").items() if k.startswith(start)
    }


def of_class(tmp_path, adapter: str, name: str | None) -> Path:
    """Copy an adapter that says that it was trained on a class, or nothing of it."""
    folder = Path(shutil.copytree(GOLDEN / adapter, tmp_path / f"{adapter}{name}"))
    config = json.loads((folder / "adapter_config.json").read_text())
    trained = None if name is None else {"base_model_class": name}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": trained}))
    return folder


@pytest.mark.parametrize(
    ("adapter", "prefix"),
    [("visual", "visual."), ("visual", ""), ("blocks", "visual."), ("blocks", ""), ("both", ""), ("text", ""),
     ("wrapped", "visual."), ("wrapped", "")],
)  # fmt: skip
def test_merge_with_coefficient_one_is_what_peft_merges(adapter, prefix):
    base, expected = load_file(BASE), merged_by_peft(adapter)
    pool = ExpertPool.from_files(BASE, {"a": GOLDEN / adapter}, key_map=prefix or None)
    assert {prefix + name for name in pool.names} == set(expected)
    assert len(expected) == {"visual": 6, "blocks": 4, "both": 8, "text": 2, "wrapped": 2}[adapter]
    for key, tensor in merge(pool, Coefficients(pool, init=1.0), detach=True).items():
        # float32 products of two ranks, in another order: a few ulps of values around 1
        torch.testing.assert_close(tensor, {**base, **expected}[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adapter", ["both", "text"])
def test_adapter_that_changes_more_than_the_encoder_is_refused_by_name(adapter, caplog):
    lost = [key for key in merged_by_peft(adapter) if not key.startswith("visual.")]
    with pytest.raises(InputError, match=rf"{len(lost)} tensors have no place .*'{lost[0]}'.*unplaced=list"):
        ExpertPool.from_files(BASE, {"a": GOLDEN / adapter}, key_map="visual.")
    if adapter == "both":
        with caplog.at_level(logging.WARNING):
            pool = ExpertPool.from_files(BASE, {"a": GOLDEN / adapter}, key_map="visual.", unplaced="list")
        assert len(pool.names) == 4
        assert lost[0] in caplog.text


def test_names_of_both_towers_go_by_the_encoders_prefix_or_are_refused(tmp_path):
    folder = of_class(tmp_path, "blocks", None)
    pool = ExpertPool.from_files(BASE, {"a": folder}, key_map="visual.")
    assert {f"visual.{name}" for name in pool.names} == set(merged_by_peft("blocks"))
    with pytest.raises(InputError, match=r"fit .*base\.safetensors behind '', 'visual\.'.*--key-prefix visual\."):
        ExpertPool.from_files(BASE, {"a": folder})
    with pytest.raises(InputError, match="behind '', 'visual"):  # no tower of texts lands in the one of images
        ExpertPool.from_files(BASE, {"a": of_class(tmp_path, "blocks", "SomeTextModel")}, key_map="visual.")


def test_head_of_an_adapter_of_the_encoder_is_named_with_a_prefix_too(tmp_path):
    factors = {"transformer.resblocks.0.mlp.c_fc.lora_A.weight": torch.ones(2, 8),
               "transformer.resblocks.0.mlp.c_fc.lora_B.weight": torch.ones(32, 2)}  # fmt: skip
    folder = write_adapter(tmp_path / "lora", {**factors, "fc.weight": torch.ones(3, 8)}, modules_to_save=["fc"])
    with pytest.raises(InputError, match=r"1 tensors that the base lacks: 'visual\.fc\.weight'.*--exclude"):
        ExpertPool.from_files(BASE, {"a": folder}, key_map="visual.")
    assert ExpertPool.from_files(BASE, {"a": folder}, key_map="visual.", exclude=["fc.*"]).expert_names == ("a",)


def test_places_of_names_are_all_starts_where_the_base_has_them():
    keys = {"a.w.weight", "b.w.weight", "b.w.bias", "c.b.w.in_proj_weight"}

    def starts(names):
        return [place.start for place in places_of(names, keys, lambda _: True)]

    assert starts([("w", WEIGHT)]) == ["a.", "b.", "c.b."]
    assert starts([("w", WEIGHT), ("w", BIAS)]) == ["b."]
    assert starts([("module.model.w", WEIGHT), ("module.model.w", BIAS)]) == ["b."]
    assert starts([("x", WEIGHT)]) == []
    assert Place(keys, "module.", "b.").key("module.w.base_layer", BIAS) == "b.w.bias"
    fitting = places_of([("w", WEIGHT)], keys, lambda place: place.start == "b.")
    assert [place.start for place in fitting] == ["b."]
