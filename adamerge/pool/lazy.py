"""Named tensors that are read when they are asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping

from torch import Tensor


class LazyTensors(MutableMapping[str, Tensor]):
    """A mapping that holds names and reads tensors, so that a model's worth of them never is in memory at once.

    The last tensor read is kept, because callers ask for the same one several times.

    Args:
        read: Name to tensor.
        names: In order.
    """

    def __init__(self, read: Callable[[str], Tensor], names: Iterable[str] = ()) -> None:
        self._read = read
        self._names = dict.fromkeys(names)
        self._latest: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._latest is None or self._latest[0] != name:
            self._latest = None  # freed before the next is read
            self._latest = name, self._read(name)
        return self._latest[1]

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Add a name; the value is what reading it gives, and is kept until another is asked for."""
        self._names[name] = None
        self._latest = name, value

    def __delitem__(self, name: str) -> None:
        del self._names[name]
        self.forget()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __or__(self, others: Mapping[str, Tensor]) -> "LazyTensors":
        """Return a mapping of both; tensors of ``others`` take precedence."""
        return LazyTensors(lambda name: others[name] if name in others else self[name], (*self, *others))

    def forget(self) -> None:
        """Drop the tensor read last, as after a move to another device."""
        self._latest = None
