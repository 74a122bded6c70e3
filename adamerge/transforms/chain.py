"""Several transforms, one after the other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adamerge.errors import InputError
from adamerge.transforms.protocol import Prepared, Source, TransformFunction, check_transform


@dataclass(frozen=True)
class Chain:
    """Apply transforms in order; each takes its statistics of what the ones before it give.

    Cost: the sum of theirs, where each pass of a later one repeats the earlier ones.

    Args:
        transforms: At least one.
    """

    transforms: Sequence[Any]

    def __post_init__(self) -> None:
        if not isinstance(self.transforms, Sequence) or isinstance(self.transforms, str) or not self.transforms:
            raise InputError(f"transform.transforms: expected a list of transforms, found {self.transforms!r}.")
        for transform in self.transforms:
            check_transform(transform)

    @property
    def elementwise(self) -> bool:
        """Whether all transforms of the chain are."""
        return all(getattr(transform, "elementwise", False) for transform in self.transforms)

    def prepare(self, source: Source) -> TransformFunction:
        """Return the rule, after preparing the transforms in order."""
        steps: list[Prepared] = []
        current = source
        for transform in self.transforms:
            steps.append(Prepared(transform, current))
            current = Transformed(source, current, steps[-1])

        def rule(name: str, task_vectors: Tensor) -> Tensor:
            for step in steps:
                task_vectors = step(name, task_vectors)
            return task_vectors

        return rule


class Transformed:
    """A source as a transform leaves it; formed anew in every pass, nothing is kept.

    Attributes:
        original: The source before the first transform.
    """

    def __init__(self, original: Source, source: Source, step: Prepared) -> None:
        self.original = original
        self.expert_names = source.expert_names
        self._source = source
        self._step = step

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the parameters by name."""
        return self._source.shapes

    def task_vectors(self, name: str) -> Tensor:
        """Return one parameter's transformed task vectors, (E, *S)."""
        return self._step(name, self._source.task_vectors(name).clone())

    def tiles(self) -> Iterator[tuple[str, Tensor]]:
        """Pass over the transformed task vectors: tiles where the transform is elementwise, else whole parameters."""
        if self._step.elementwise:
            for name, tile in self._source.tiles():
                yield name, self._step(name, tile.clone())
            return
        for name in self.shapes:
            stack = self.task_vectors(name)
            yield name, stack.reshape(len(stack), -1)
