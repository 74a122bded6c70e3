"""The yaml files that ship: the choices of a group, presets, and rules with their options."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from adamerge.errors import InputError, did_you_mean
from adamerge.system.reading import read_yaml_text

CONFIG_MODULE = "adamerge.configs"
CONFIG_NAME = "adapt"


def shipped_folder(group: str) -> Path:
    """Return the folder of a group's yaml files."""
    return Path(str(importlib.resources.files(CONFIG_MODULE))) / group


def rule_names(group: str) -> list[str]:
    """Return the names of what ships in a group, such as ``merge`` or ``transform``."""
    return sorted(path.stem for path in shipped_folder(group).glob("*.yaml"))


def preset_file(group: str, preset: str) -> Path:
    """Return the file of a shipped preset of a group such as ``compare``, or the file that is named itself.

    Raises:
        InputError: If there is neither.
    """
    shipped = rule_names(group)
    if preset in shipped:
        return shipped_folder(group) / f"{preset}.yaml"
    if not Path(preset).is_file():
        raise InputError(
            f"--preset {preset}: no such file, and no shipped preset of that name; shipped: {', '.join(shipped)}."
            f"{did_you_mean(preset, shipped)}"
        )
    return Path(preset)


def preset_content(group: str, preset: str) -> tuple[Path, Any]:
    """Return a preset's file, see :func:`preset_file`, and what it holds as plain containers.

    Raises:
        InputError: If there is no such preset, or it is no yaml file.
    """
    path = preset_file(group, preset)
    text = read_yaml_text(path)
    try:
        return path, OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except Exception as error:  # whatever a yaml parser, a decoder or an interpolation finds wrong
        raise InputError(f"{path}: expected a yaml file, found: {' '.join(str(error).split())}.") from error


def rule_node(group: str, rule: str, settings: Sequence[str]) -> dict[str, Any]:
    """Return a rule's node: a shipped one by name, or any class by import path, with options set.

    Args:
        group: ``merge`` or ``transform``.
        rule: Such as ``tsvm``, or ``my_package.MyRule``.
        settings: ``option=value``; values are yaml.

    Raises:
        InputError: If there is no such rule, or a setting cannot be read.
    """
    shipped = rule_names(group)
    if rule in shipped:
        node = OmegaConf.load(shipped_folder(group) / f"{rule}.yaml")
    elif "." in rule:
        node = OmegaConf.create({"_target_": rule})
    else:
        raise InputError(
            f"--rule: expected one of {', '.join(shipped)}, or an import path such as my_package.MyRule, found "
            f"{rule!r}.{did_you_mean(rule, shipped)}"
        )
    for setting in settings:
        option, separator, value = setting.partition("=")
        if not separator or not option:
            raise InputError(f"--set {setting}: expected OPTION=VALUE.")
        try:
            OmegaConf.update(node, option, OmegaConf.create(f"value: {value}").value)
        except Exception as error:  # whatever a yaml parser finds wrong
            raise InputError(f"--set {setting}: the value is no yaml: {str(error).splitlines()[0]}.") from error
    missing = [str(key) for key in node if OmegaConf.is_missing(node, key)]
    if missing:
        raise InputError(f"--rule {rule}: {missing[0]} must be given: --set {missing[0]}=VALUE.")
    content = OmegaConf.to_container(node, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}
