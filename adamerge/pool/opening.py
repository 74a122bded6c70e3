"""A pool's files, opened: base and experts as named tensors."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.composed import ComposedCheckpoint, Piece
from adamerge.checkpoints.hub import HubReference, located_all
from adamerge.checkpoints.model_folder import open_model
from adamerge.errors import InputError
from adamerge.pool import vocabulary
from adamerge.pool.adapter_config import CONFIG as ADAPTER
from adamerge.pool.lora import AdapterCheckpoint, open_expert
from adamerge.pool.options import PoolOptions

_BASE = ""  # of the base among the experts' names, here where an expert may have any
ModelPlace = str | Path | HubReference


def check_names(experts: Mapping[str, object]) -> None:
    """Refuse an empty pool, the reserved name ``base``, and one file under two names."""
    if not experts:
        raise InputError("experts: expected at least one expert (name to file), found none.")
    if "base" in experts:
        raise InputError("experts: the name 'base' is reserved for the pretrained model; rename that expert.")
    by_file: dict[str, str] = {}
    for name, path in experts.items():
        if isinstance(path, (str, Path)) and os.path.exists(path):
            first = by_file.setdefault(os.path.realpath(path), name)
            if first != name:
                raise InputError(
                    f"Experts {first!r} and {name!r} are the same file: {path}. Remove one or name its own file."
                )


def open_files(
    base: ModelPlace | None, experts: Mapping[str, ModelPlace], options: PoolOptions
) -> tuple[Checkpoint | None, dict[str, Checkpoint], list[InputError | OSError]]:
    """Open a pool's base and experts; what cannot be opened is left out, and the errors are returned.

    A base of None is one that is yet to be downloaded.
    """
    keys, prefix = options.key_map or "visual.", options.key_map if isinstance(options.key_map, str) else ""

    def fits(names: Collection[str]) -> bool:
        return any(name.startswith(keys) if isinstance(keys, str) else name in keys for name in names)

    errors: list[InputError | OSError] = []
    places: dict[str, Path] = {}
    try:
        places = located_all({**experts, **({} if base is None else {_BASE: base})})
        check_names({name: path for name, path in places.items() if name != _BASE})
    except InputError as error:
        if not places:
            return None, {}, [error]
        errors.append(error)
    source: Checkpoint | None = None
    if base is not None:
        try:
            source = open_model(places.pop(_BASE), fits=fits)
        except (InputError, OSError) as error:
            errors.append(error)
    names = options.key_map if isinstance(options.key_map, Mapping) else {}
    opened = _open_experts(places, source, prefix, names, errors)
    if source is None or not options.extended:
        return source, opened, errors
    try:
        return *_with_one_vocabulary(source, opened, options, places, prefix), errors
    except InputError as error:
        return source, opened, [*errors, error]


def _open_experts(
    places: Mapping[str, Path],
    base: Checkpoint | None,
    prefix: str,
    names: Mapping[str, str],
    errors: list[InputError | OSError],
) -> dict[str, Checkpoint]:
    """Open experts; adapters are left out where there is no base to hold them against."""
    opened = {}
    for name, path in places.items():
        try:
            if base is not None:
                opened[name] = _open_expert(path, base, prefix, names)
            elif not (path / ADAPTER).is_file():
                opened[name] = open_model(path)
        except (InputError, OSError) as error:
            errors.append(error)
    return opened


def _open_expert(path: Path, base: Checkpoint, prefix: str, names: Mapping[str, str]) -> Checkpoint:
    """Open an expert; an adapter may have been trained on the network, whose names are not those of the base's file."""
    try:
        return open_expert(path, base, prefix)
    except InputError as error:
        renamed = {key: name for key, name in names.items() if key in set(base.keys)}
        if not (path / ADAPTER).is_file() or all(key == name for key, name in renamed.items()):
            raise
        network = ComposedCheckpoint(base.name, {n: Piece(base, (key,)) for key, n in renamed.items()}, {"": base})
        try:
            adapter = AdapterCheckpoint(path, network)
        except InputError:
            raise error from None
        keys = {name: key for key, name in renamed.items()}
        pieces = {key: Piece(base, (key,)) for key in base.keys if key not in renamed}
        pieces |= {keys.get(name, name): Piece(adapter, (name,)) for name in adapter.keys}
        return ComposedCheckpoint(adapter.name, pieces, {"": adapter})


def _with_one_vocabulary(
    base: Checkpoint, experts: Mapping[str, Checkpoint], options: PoolOptions, places: Mapping[str, Path], prefix: str
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Give base and experts the further rows of the one expert that has some; adapters get those of the base."""
    of_name = options.key_map if isinstance(options.key_map, Mapping) else {key: key for key in base.keys}
    keys = [key for key, name in of_name.items() if name in {*(options.extended or ())}]
    longest = vocabulary.longest(base, experts, keys)
    if longest is None:
        return base, dict(experts)
    longer = experts[longest]
    source = vocabulary.with_further_rows(base, longer, keys)
    opened = {}
    for name, checkpoint in experts.items():
        is_adapter = (places[name] / ADAPTER).is_file()
        again = _open_expert(places[name], source, prefix, of_name) if is_adapter else checkpoint
        opened[name] = vocabulary.with_further_rows(again, longer, keys)
    return source, opened
