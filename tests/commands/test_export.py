"""Replay: the same merged file again, from coefficients and expert files alone."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from adamerge import Coefficients, ExpertPool, InputError, MergedModel, load_state_dict
from adamerge.callbacks import ExportMergedWeights
from adamerge.commands import export as export_command
from adamerge.commands.export import export_run
from adamerge.commands.run.folder import CONFIG_FILE, LAST, save_config
from adamerge.model.granularity import Chunk
from adamerge.pool.pool_file import PoolFile, PoolFiles
from adamerge.results.export import export, load_heads
from tests.support.fits import QUIET, fit, make_data, make_method
from tests.support.toy import EXPERTS, make_toy, save_files

pytestmark = QUIET


def export_files(base, experts, coefficients, output, prefix):
    files = {name: PoolFile(path) for name, path in experts.items()}
    pool = PoolFiles(PoolFile(base), files, key_prefix=prefix or None)
    return export_command.export_files(pool, coefficients, output)


class ToyBackbone:
    """A backbone of the user's own."""

    prefix = "visual."
    exclude = ("stem.*",)

    def encoder(self):
        return make_toy().encoder

    def preprocess(self):
        return torch.as_tensor

    def heads(self, base, experts, tasks):
        return {task: make_toy().heads[task] for task in tasks}

    def sidecar(self):
        return None


def toy_data(preprocess, collate):
    return make_data()


def made(pool, granularity, constraint="box"):
    coefficients = Coefficients(pool, granularity, constraint=constraint)
    coefficients.assign(torch.rand(coefficients.raw.shape, generator=torch.Generator().manual_seed(1)))
    return coefficients


@pytest.mark.parametrize("prefix", ["", "visual."])
@pytest.mark.parametrize("granularity", ["task", "block", "layer", "row", "column", Chunk({"proj": 0}, default=3)])
def test_export_files_gives_the_same_bytes(toy, tmp_path, granularity, prefix):
    base, experts = save_files(tmp_path, toy.base, toy.experts, prefix)
    pool = ExpertPool.from_files(base, experts, key_map=prefix or None)
    first = export(pool, made(pool, granularity, "sigmoid"), tmp_path / "first")
    second = export_files(base, experts, first["coefficients"], tmp_path / "second", prefix)
    assert second["merged"].read_bytes() == first["merged"].read_bytes()
    assert json.loads(second["recipe"].read_text())["replayed"] == str(first["coefficients"])


def test_export_files_of_more_than_10000_coefficients_gives_the_same_bytes(tmp_path):
    base = {"bias": torch.zeros(4000), "weight": torch.zeros(3, 2)}
    experts = {name: {key: torch.randn_like(tensor) for key, tensor in base.items()} for name in EXPERTS}
    path, paths = save_files(tmp_path, base, experts)
    pool = ExpertPool.from_files(path, paths)
    coefficients = made(pool, "row")
    assert coefficients.raw.numel() > 10_000
    first = export(pool, coefficients, tmp_path / "first")
    assert (tmp_path / "first" / "coefficients.safetensors").is_file()
    second = export_files(path, paths, first["coefficients"], tmp_path / "second", "")
    assert second["merged"].read_bytes() == first["merged"].read_bytes()


def test_export_files_of_rounded_task_vectors_is_refused_with_the_remedy(toy, tmp_path):
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    pool = ExpertPool.from_files(base, experts, dtype=torch.bfloat16, storage="ram")
    path = export(pool, made(pool, "layer"), tmp_path / "first")["coefficients"]
    with pytest.raises(InputError, match=r"made for the task vectors .*bfloat16.* but the pool's .*naming the run's"):
        export_files(base, experts, path, tmp_path / "second", "")


def test_export_files_after_a_fit_gives_the_same_bytes(toy, tmp_path):
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    pool = ExpertPool.from_files(base, experts)
    method = make_method(toy)
    method.model = MergedModel(toy.encoder, pool, Coefficients(pool, "row", 0.3, "clamp"), toy.heads)
    callback = ExportMergedWeights(tmp_path / "first")
    fit(method, make_data(), tmp_path, steps=3, callbacks=[callback])
    second = export_files(base, experts, callback.files["coefficients"], tmp_path / "second", "")
    assert second["merged"].read_bytes() == callback.files["merged"].read_bytes()
    merged = load_state_dict(second["merged"])
    assert not torch.equal(merged["proj"], toy.base["proj"])


def test_export_files_experts_in_another_order_merge_the_same_values(toy, tmp_path):
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    pool = ExpertPool.from_files(base, experts)
    first = export(pool, made(pool, "layer"), tmp_path / "first")
    turned = dict(reversed(experts.items()))
    second = export_files(base, turned, first["coefficients"], tmp_path / "second", "")
    expected = load_state_dict(first["merged"])
    for key, tensor in load_state_dict(second["merged"]).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-7)


def test_export_files_coefficients_of_another_pool_are_refused(toy, tmp_path):
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    pool = ExpertPool.from_files(base, experts)
    path = export(pool, made(pool, "layer"), tmp_path / "first")["coefficients"]
    save_file({key: tensor + 1.0 if key == "proj" else tensor for key, tensor in toy.base.items()}, base)
    with pytest.raises(InputError, match=r"coefficients\.json: belongs to another pool: the content of 'base' differs"):
        export_files(base, experts, path, tmp_path / "second", "")
    with pytest.raises(InputError, match="made for the experts 'red', 'green', 'blue', but the pool has 'red', 'blue'"):
        export_files(base, {name: experts[name] for name in ("red", "blue")}, path, tmp_path / "second", "")
    assert not (tmp_path / "second").exists()


def test_export_files_missing_coefficients_are_named(toy, tmp_path):
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        export_files(base, experts, tmp_path / "nowhere.json", tmp_path / "out", "")
    assert not (tmp_path / "out").exists()


# From a run's folder


def run_folder(toy, folder, granularity):
    """A run with a checkpoint of trained coefficients, and what its own export wrote."""
    base, experts = save_files(folder, toy.base, toy.experts, "visual.")
    pool = ExpertPool.from_files(base, experts, key_map="visual.", exclude=["stem.*"])
    method = make_method(toy)
    coefficients = Coefficients(pool, granularity, 0.3, "clamp")
    method.model = MergedModel(toy.encoder, pool, coefficients, toy.heads)
    callback = ExportMergedWeights(folder / "own")
    trainer = fit(method, make_data(), folder, steps=3, callbacks=[callback])
    run = folder / "run"
    trainer.save_checkpoint(run / LAST)
    config = {
        "backbone": {"_target_": f"{__name__}.ToyBackbone"},
        "data": {"_target_": f"{__name__}.toy_data"},
        "pool": {"base": str(base), "experts": {name: str(path) for name, path in experts.items()}},
        "granularity": {"_target_": f"adamerge.model.granularity.{type(coefficients.granularity).__name__}"},
        "constraint": {"_target_": "adamerge.model.constraints.Clamp"},
        "batch_norm": {"_target_": "adamerge.model.batch_norm.BatchNormPolicy", "policy": "base"},
        "init": 0.3,
    }
    if isinstance(granularity, Chunk):
        config["granularity"] |= {"pieces": dict(granularity.pieces), "default": granularity.default}
    save_config(OmegaConf.create(config), run / CONFIG_FILE)
    return run, callback.files


@pytest.mark.parametrize("granularity", ["task", "row", Chunk({"proj": 0}, default=3)])
def test_export_run_from_its_checkpoint_or_coefficients_gives_the_same_bytes(toy, tmp_path, granularity):
    run, own = run_folder(toy, tmp_path, granularity)
    expected = own["merged"].read_bytes()
    files = export_run(run, None, tmp_path / "a")
    assert files["merged"].read_bytes() == expected
    heads, _ = load_heads(files["heads"])
    assert torch.equal(heads["red"]["weight"], toy.heads["red"].weight)
    assert export_run(run, own["coefficients"], tmp_path / "b")["merged"].read_bytes() == expected


def no_data(preprocess, collate):
    raise AssertionError("data was built")


@pytest.mark.parametrize("policy", ["recalibrate", "average", "base"])
def test_export_run_of_coefficients_opens_no_data_where_there_is_nothing_to_recalibrate(toy, tmp_path, policy):
    run, own = run_folder(toy, tmp_path, "layer")
    config = OmegaConf.load(run / CONFIG_FILE)
    config.data = {"_target_": f"{__name__}.no_data"}
    config.batch_norm = {"_target_": "adamerge.model.batch_norm.BatchNormPolicy", "policy": policy}
    save_config(config, run / CONFIG_FILE)
    files = export_run(run, own["coefficients"], tmp_path / "b")
    assert files["merged"].read_bytes() == own["merged"].read_bytes()


def test_pool_of_builds_no_code_of_others(toy, tmp_path, monkeypatch):
    run, _ = run_folder(toy, tmp_path, "layer")
    touched = tmp_path / "touched"
    for target in (
        "os.mkdir",
        "adamerge.backbones.open_clip.os.mkdir",
        "adamerge.commands.cli.main",
        f"{__name__}.ToyBackbone",
    ):
        config = OmegaConf.load(run / CONFIG_FILE)
        config.backbone = {"_target_": target, "path": str(touched)}
        save_config(config, run / CONFIG_FILE)
        with pytest.raises(InputError, match="backbone: expected a class of adamerge's own, found"):
            export_command.pool_of(run)
    assert not touched.exists()


def test_export_run_into_its_own_folder_replaces_no_export(toy, tmp_path):
    run, own = run_folder(toy, tmp_path, "layer")
    files = export_run(run, None, run)
    assert files["merged"].read_bytes() == own["merged"].read_bytes()
    with pytest.raises(InputError, match=r"has an export already, which would be replaced\. Give --out"):
        export_run(run, own["coefficients"], run)
    again = export_run(run, own["coefficients"], tmp_path / "again")
    assert again["heads"].read_bytes() == files["heads"].read_bytes()


def test_export_run_without_checkpoint_or_configuration_is_named(toy, tmp_path):
    run, _ = run_folder(toy, tmp_path, "layer")
    (run / LAST).unlink()
    with pytest.raises(InputError, match=r"last\.ckpt: no such checkpoint.*Give --coefficients instead"):
        export_run(run, None, tmp_path / "a")
    with pytest.raises(InputError, match=r"not a run folder: it has no config\.yaml\. Name a folder"):
        export_run(tmp_path / "nothing", None, tmp_path / "a")
    (run / "config.yaml").unlink(missing_ok=True)
    (run / "merged.safetensors").touch()
    (run / "merge.json").touch()
    with pytest.raises(
        InputError, match=r"`adamerge merge` made it.*--checkpoint \S+/merged\.safetensors; or .*--rows"
    ):
        export_run(run, None, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_export_run_checkpoint_of_another_granularity_is_refused(toy, tmp_path):
    run, _ = run_folder(toy, tmp_path, "layer")
    config = OmegaConf.load(run / CONFIG_FILE)
    config.granularity = {"_target_": "adamerge.model.granularity.TaskWise"}
    save_config(config, run / CONFIG_FILE)
    with pytest.raises(InputError, match=r"last\.ckpt: expected coefficients of shape \(3, 1\), found \(3, \d+\)"):
        export_run(run, None, tmp_path / "a")
