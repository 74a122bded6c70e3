"""Overrides as people write them."""

import pytest
import torch
from omegaconf import OmegaConf

from adamerge.commands.run.compose import compose
from adamerge.commands.run.precision import settled
from adamerge.errors import InputError
from tests.support.hostile import BOMB


@pytest.mark.parametrize(
    ("override", "option", "value"),
    [
        ("run_dir=runs/2026_lr=0.1", "run_dir", "runs/2026_lr=0.1"),
        ("run_dir=runs/a#b", "run_dir", "runs/a#b"),
        ("run_dir=/data/Läufe (1)/x", "run_dir", "/data/Läufe (1)/x"),
        ("run_dir=it's", "run_dir", "it's"),
        ("run_dir=runs/a=1,b=2", "run_dir", "runs/a=1,b=2"),
        ("name=日本", "name", "日本"),
        ("pool.experts.digits=epoch=3-step=10.ckpt", "pool.experts.digits", "epoch=3-step=10.ckpt"),
        ("pool.experts={digits: epoch=3.ckpt}", "pool.experts.digits", "epoch=3.ckpt"),
        ("+pool.include=[proj, größe=1]", "pool.include", ["proj", "größe=1"]),
        ("run_dir='runs/a b'", "run_dir", "runs/a b"),
        ("experiment=null", "steps", 150),
        ("transform=null", "transform._target_", None),
    ],
)
def test_text_that_hydra_cannot_read_is_taken_as_it_stands(override, option, value):
    found = OmegaConf.select(compose([override]), option)
    assert (OmegaConf.to_container(found) if isinstance(value, list) else found) == value


def test_experts_of_a_new_pool_are_named_one_by_one():
    config = compose(["pool=files", "pool.base=base.ckpt", "pool.experts.pets=epoch=3-step=10.ckpt"])
    assert dict(config.pool.experts) == {"pets": "epoch=3-step=10.ckpt"}
    with pytest.raises(InputError, match=r"pool\.experts\.digts.*Did you mean 'pool\.experts\.digits'"):
        compose(["pool.experts.digts=a.ckpt"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pool.experts.größe=a.ckpt", ["pool.experts.größe=a.ckpt: cannot be read", "yaml file"]),
        ("run_dir=[x", ["run_dir=[x: cannot be read"]),
        ("name='a", ["name='a: cannot be read", "quotes"]),
        ("objective=null", ["objective=null", "entropy"]),
    ],
)
def test_override_that_nothing_can_be_made_of_is_named(override, words):
    with pytest.raises(InputError) as caught:
        compose([override])
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_option_beside_a_pool_file_goes_before_the_file_also_where_it_is_the_default(tmp_path):
    path = tmp_path / "pool.yaml"
    options = {"storage": "stream", "duplicates": "allow", "unplaced": "list"}
    path.write_text("base: a\nexperts: {b: b}\n" + "".join(f"{key}: {value}\n" for key, value in options.items()))
    of_file = compose(["pool=files", f"pool.file={path}"]).pool
    assert {key: of_file[key] for key in options} == options
    defaults = {"storage": "auto", "duplicates": "refuse", "unplaced": "auto"}
    chosen = compose(["pool=files", f"pool.file={path}", *(f"pool.{key}={value}" for key, value in defaults.items())])
    assert {key: chosen.pool[key] for key in options} == defaults


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_compose_of_a_sweep_says_that_a_job_is_checked_alone(flag):
    with pytest.raises(InputError, match=f"{flag}: a sweep is checked job by job"):
        compose([flag, "seed=0,1"])


def test_yaml_files_of_a_folder_are_read_within_bounds(tmp_path):
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "bomb.yaml").write_text(BOMB)
    with pytest.raises(InputError, match=r"bomb\.yaml: not readable as yaml"):
        compose(["--config-dir", str(tmp_path), "objective=bomb"])


@pytest.mark.parametrize(
    ("accelerator", "has_gpu", "units", "precision"),
    [
        ("cpu", True, {}, "32-true"),
        ("cpu", False, {"avx512_bf16": True}, "bf16-mixed"),
        ("auto", False, {"amx_bf16": True}, "bf16-mixed"),
        ("auto", True, {}, "bf16-mixed"),
        ("mps", False, {"amx_bf16": True}, "32-true"),
    ],
)
def test_precision_auto_is_mixed_where_the_machine_has_units(monkeypatch, accelerator, has_gpu, units, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    config = OmegaConf.create({"trainer": {"precision": "auto", "accelerator": accelerator}})
    assert settled(config).trainer.precision == precision
