"""Overrides as people write them."""

import pytest
from omegaconf import OmegaConf

from adamerge.commands.run.compose import compose
from adamerge.errors import InputError


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
