"""Hidden layers: which modules a path or glob selects, and what they put out when the encoder runs."""

import fnmatch
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from adamerge.errors import InputError, did_you_mean


def select(names: Iterable[str], pattern: str, option: str) -> list[str]:
    """Return the module paths that match a path or glob; of those inside each other the outermost.

    Raises:
        InputError: If no module matches.

    >>> select(["blocks.0", "blocks.0.mlp", "blocks.10"], "blocks.*", "hidden_layers")
    ['blocks.0', 'blocks.10']
    """
    return outermost(matching(names, pattern, option))


def matching(names: Iterable[str], pattern: str, option: str) -> list[str]:
    """Return the module paths that match a path or glob.

    Raises:
        InputError: If no module matches.
    """
    names = list(names)
    matches = fnmatch.filter(names, pattern)
    if not matches:
        raise InputError(f"{option}: {pattern!r} matches no module of the encoder.{did_you_mean(pattern, names)}")
    return matches


def outermost(names: Sequence[str]) -> list[str]:
    """Return the module paths that lie in none of the others."""
    return [name for name in names if not any(is_inside(name, container) for container in names)]


class Hooks:
    """Collects outputs of modules. The same hooks are attached again and again: compiled code holds on to them.

    Args:
        by_pattern: Path or glob to the modules that match it. Which of a glob's count is known after the first run.
    """

    def __init__(self, by_pattern: Mapping[str, Sequence[str]]) -> None:
        self._by_pattern = by_pattern
        self.outputs: dict[str, Any] = {}
        self._set(name for names in by_pattern.values() for name in names)
        self._is_chosen = False

    def _set(self, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._keep = {name: functools.partial(_keep, self.outputs, name) for name in self.names}

    def chosen(self, hidden: Mapping[str, Any], count: int) -> dict[str, Tensor]:
        """Return the outputs (count, ...) that the patterns select, and keep only those modules from now on.

        Raises:
            InputError: If a pattern selects none.
        """
        if not self._is_chosen:
            giving = {
                name for name, output in hidden.items() if isinstance(output, Tensor) and output.shape[:1] == (count,)
            }
            chosen = {p: outermost([name for name in names if name in giving]) for p, names in self._by_pattern.items()}
            for pattern, names in chosen.items():
                if not names:
                    raise InputError(
                        f"hidden_layers: {pattern!r} gives no tensor (B, ...) when the encoder runs, as it is a "
                        "container, is not called itself, or gives something else. Name modules whose output is a "
                        f"tensor with an axis of samples, such as its members: {pattern.removesuffix('.*')}.*."
                    )
            self._set(name for names in chosen.values() for name in names)
            self._is_chosen = True
        return {name: hidden[name] for name in self.names}

    @contextmanager
    def attached(self, encoder: nn.Module) -> Iterator[None]:
        """Collect the outputs of an encoder's modules while a block lasts."""
        with ExitStack() as stack:
            for name, keep in self._keep.items():
                stack.enter_context(encoder.get_submodule(name).register_forward_hook(keep))
            stack.callback(self.outputs.clear)
            yield


def _keep(outputs: dict[str, Any], name: str, _: nn.Module, __: Any, output: Any) -> None:
    if not isinstance(output, Tensor):
        values = tuple(output.values()) if isinstance(output, Mapping) else output
        output = values[0] if isinstance(values, (tuple, list)) and values else None
    outputs[name] = output


def is_inside(name: str, container: str) -> bool:
    """Whether a module lies in another, by their paths."""
    return name != container and (not container or name.startswith(f"{container}."))
