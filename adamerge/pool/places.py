"""Where the names of an adapter's model are in its base: behind which prefix, without which wrapper."""

import itertools
import re
from collections.abc import Callable, Collection, Sequence

from adamerge.checkpoints.composed import wrappers

WEIGHT, BIAS = (".weight", ".in_proj_weight"), (".bias",)  # what a module's factors, and the bias of one, add to
Names = Sequence[tuple[str, tuple[str, ...]]]  # modules, each with endings of which one is there


class Place:
    """What is taken off all of an adapter's names, and what the base has before them in its place."""

    def __init__(self, keys: Collection[str], wrapper: str = "", start: str = "") -> None:
        self._keys, self._wrapper, self.start = keys, wrapper, start

    def name(self, name: str) -> str:
        """Return what the base would call a tensor or module."""
        return self.start + name.removeprefix(self._wrapper).replace(".base_layer", "")

    def key(self, name: str, endings: tuple[str, ...] = ("",)) -> str | None:
        """Return the base's key of a tensor, or of a module's parameter; None where it has none."""
        return next((self.name(name) + ending for ending in endings if self.name(name) + ending in self._keys), None)


def places_of(names: Names, keys: Collection[str], fits: Callable[[Place], bool]) -> list[Place]:
    """Return where the base has all of an adapter's names.

    Args:
        names: That the adapter's factors belong to.
        keys: Keys of the base.
        fits: Whether shapes agree in a place; where they do in none, all are returned.
    """
    starts = {"", *(key[: dot.end()] for key in keys for dot in re.finditer(r"\.", key))}
    whole = [name for name, _ in names]
    usual = itertools.product(wrappers(whole), sorted(starts))
    for candidates in (usual, ((module, "") for module in _modules(whole))):
        places: dict[str | None, Place] = {}  # by where the first name leads
        for wrapper, start in candidates:
            place = Place(keys, wrapper, start)
            if all(place.key(*name) for name in names):
                places.setdefault(place.key(*names[0]), place)
        if places:
            return [place for place in places.values() if fits(place)] or list(places.values())
    return []


def _modules(names: Sequence[str]) -> list[str]:
    """Return the modules, each with its dot, that contain all of the names: a bare base lacks their prefix."""
    starts = [names[0][: dot.end()] for dot in re.finditer(r"\.", names[0])]
    return list(itertools.takewhile(lambda start: all(name.startswith(start) for name in names), starts))
