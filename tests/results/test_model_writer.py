"""Folders that transformers loads, written around merged weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from adamerge.checkpoints.model_folder import find_model
from adamerge.results.model_writer import INDEX, WEIGHTS, folder_of, write_model
from tests.support.model_folders import new_model, save_model, save_tokenizer


def test_weights_above_the_limit_are_divided_and_read_as_one(tmp_path: Path) -> None:
    base = save_model(new_model("LlamaForCausalLM"), tmp_path / "base")
    (base / "modeling.py").write_text("raise SystemExit")
    (base / "trainer_state.json").write_text("{}")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling.Model"}}))
    files = write_model(base / WEIGHTS, base, tmp_path / "out", shard_bytes=9_000)
    shards = [name for name in files if name.startswith("model-")]
    assert len(shards) > 2
    assert all((tmp_path / "out" / name).stat().st_size < 12_000 for name in shards)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", INDEX, "config.json"} <= set(files)
    assert not {"modeling.py", "trainer_state.json"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    checkpoint = find_model(tmp_path / "out", lambda _: True).checkpoint
    expected = load_file(base / WEIGHTS)
    assert set(checkpoint.keys) == set(expected)
    assert all(torch.equal(checkpoint.get(key), tensor) for key, tensor in expected.items())
    from transformers import LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


def test_tokenizer_of_the_expert_with_further_tokens(tmp_path: Path) -> None:
    base = save_model(new_model("LlamaForCausalLM"), tmp_path / "base")
    save_tokenizer(tmp_path / "expert", words=["other"])
    changes = {"vocab_size": 66}
    write_model(base / WEIGHTS, base, tmp_path / "out", tokenizer=tmp_path / "expert", changes=changes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 66
    assert "other" in json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 has, too


def test_files_without_a_configuration_are_no_folder_of_the_library(tmp_path: Path) -> None:
    base = save_model(new_model("LlamaForCausalLM"), tmp_path / "base")
    assert folder_of(find_model(base, lambda _: True).checkpoint) == base
    (base / "config.json").unlink()
    assert folder_of(find_model(base / WEIGHTS, lambda _: True).checkpoint) is None
