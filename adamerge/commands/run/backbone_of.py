"""The backbone of a merge, by what its own files say, or by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from adamerge.backbones import Backbone, OpenClip, Torchvision, Transformers
from adamerge.checkpoints.model_folder import HF_CONFIG, OPEN_CLIP_CONFIG
from adamerge.commands.run.build import build
from adamerge.commands.run.compose import compose
from adamerge.commands.run.folder import CONFIG_FILE, go_to, load_config
from adamerge.commands.run.imports import announce, check_listed
from adamerge.commands.run.recorded import check_config
from adamerge.errors import InputError
from adamerge.pool.pool_file import pool_files
from adamerge.results.export import RECIPE
from adamerge.results.model_writer import FOLDER


def backbone_of(folder: Path, recipe: Mapping[str, Any], *, trust_code: bool = False) -> Backbone:
    """Return the backbone that a merge's own files name: configuration, recipe, or open_clip's sidecar.

    Relative paths of a run's configuration start from the folder that it was launched in; this process moves there.

    Args:
        folder: The merge's.
        recipe: The content of its ``merge.json``.
        trust_code: Whether these files may import names beyond the list though nothing shows that this user wrote them.

    Raises:
        InputError: If the folder does not say what model it is.
    """
    stored, source = recipe.get("config"), None if trust_code else str(folder / RECIPE)
    if (folder / CONFIG_FILE).is_file():
        config = load_config(folder, trust_code=trust_code)
        check_config(config, folder)
    elif isinstance(stored, Mapping):  # of an export on request
        go_to(stored.get("cwd"))
        config = OmegaConf.create({"backbone": stored.get("backbone")})
        if source is not None:
            check_listed(config, source, "nothing shows that you wrote it")
    elif recipe.get("overrides"):  # of a merge that read data
        go_to(recipe.get("cwd"))
        config = compose([str(override) for override in recipe["overrides"]], stored_in=source)
        if recipe.get("files"):
            config.pool = pool_files(recipe["files"], f"{folder / 'merge.json'}: ", folder).node()
    elif (folder / "open_clip" / OPEN_CLIP_CONFIG).is_file():
        return OpenClip(str(folder / "open_clip"))
    elif (folder / FOLDER / HF_CONFIG).is_file():  # of a merge without data
        return _model_of_transformers(recipe)
    else:
        config = OmegaConf.create({})
    if config.get("backbone") is None:
        raise InputError(
            f"{folder}: does not say which model it is a merge of. Name it: --model NAME, or a folder with an "
            f"{OPEN_CLIP_CONFIG}."
        )
    announce({"backbone": config.backbone})
    backbone: Backbone = build(config, "backbone")
    return backbone


def _model_of_transformers(recipe: Mapping[str, Any]) -> Transformers:
    """Return the backbone of a merge whose base is a folder of transformers."""
    files = recipe.get("files") or {}
    base = files.get("base") or {}
    place = base.get("file") if isinstance(base, Mapping) else base
    return Transformers(model=place, pool={"base": place, "experts": files.get("experts") or {}})


def named_backbone(model: str, target: str) -> Backbone:
    """Return the backbone that ``--model`` names: open_clip's, but for torchvision's format."""
    if target != "torchvision":
        return OpenClip(model)
    name, _, head = model.partition(":")
    return Torchvision(name, **({"head": head} if head else {}))
