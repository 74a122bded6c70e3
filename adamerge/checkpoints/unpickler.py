"""Python's own unpickler over inert objects: nothing that a pickle names is imported, nothing called but our stand-ins.

It is the one that is written in Python, as the one in C sizes its memo by a number in the file.
"""

import pickle
import struct
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.inert import (
    Budget,
    Global,
    Record,
    Storage,
    check_key,
    inner_file,
    items_to_set,
    pairs_to_dict,
    resolve,
)
from adamerge.errors import InputError
from adamerge.system.archives import Damaged, Refused

_MAX_LINE = 1 << 20  # bytes of one text argument of protocol 0
_OBJECT_STEPS = 3  # what an object costs besides, in reads of a few bytes
_NONSENSE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error),
)


class Stream:
    """The bytes of a file, as an unpickler reads them.

    Args:
        data: The bytes.
        budget: The budget of the file; every read takes a step.
    """

    def __init__(self, data: memoryview, budget: Budget) -> None:
        self.data, self.budget = data, budget
        self.position = 0

    def read(self, count: int) -> bytes:
        """Return at most ``count`` bytes; no more is ever allocated than the file has."""
        self.budget.spend(1)
        start, self.position = self.position, min(len(self.data), self.position + max(count, 0))
        return bytes(self.data[start : self.position])

    def readline(self) -> bytes:
        """Return a line with its end."""
        self.budget.spend(1)
        length, stop = 256, 0  # most lines are short, and a window of the longest would be copied for each
        while not stop:
            window = bytes(self.data[self.position : self.position + length])
            stop = window.find(b"\n") + 1
            if not stop and (length >= _MAX_LINE or len(window) < length):
                raise Damaged("a line without an end")
            length = min(2 * length, _MAX_LINE)
        self.position += stop
        return window[:stop]


class InertUnpickler(pickle._Unpickler):
    """Reads one pickle after the other.

    What its base would do to objects on the stack is done here where they could be anything else than plain
    containers: calls, states, items; so is what allocates by a number in the file.

    Args:
        stream: The pickles.
        storage: Turns the id of a storage (dtype, key, count) into a storage.
        nested: Turns the bytes of a file inside of the pickle into a storage.

    Attributes:
        inert: Import paths of the classes and functions met that have no stand-in.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(
        self,
        stream: Stream,
        storage: Callable[[torch.dtype, str, int], Storage],
        nested: Callable[[Any], Storage],
    ) -> None:
        super().__init__(stream, encoding="latin1")
        self.inert: set[str] = set()
        self._stream, self._storage, self._nested = stream, storage, nested

    def next(self) -> Any:
        """Read one pickle, leaving the stream behind it.

        Raises:
            Refused: If it asks for what this module does not admit.
            Damaged: If the stream holds no whole pickle.
        """
        self.memo: dict[int, Any] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of unknown escape sequences in damaged texts
                return self.load()
        except InputError:
            raise
        except _NONSENSE as error:
            raise Damaged("its pickle is cut off or makes no sense") from error

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands in for a name."""
        item = resolve(module, name)
        if isinstance(item, Global) and item.stand_in is None and item.dtype is None:
            self.inert.add(item.name)
        return item

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage, or the class of a module, that torch's id stands for."""
        match pid:
            case ("storage", Global(dtype=torch.dtype() as dtype), str() as key, str(), int() as count, *view) if (
                view in ([], [None])
            ):
                return self._storage(dtype, key, count)
            case ("module", Global() as kind, *_):
                return kind
        raise Damaged("its pickle names a storage in a way that torch does not")

    def _called(self, target: Any, arguments: Any) -> Any:
        if not isinstance(arguments, (tuple, list)):
            raise Damaged("its pickle calls something without arguments")
        budget = self._stream.budget
        budget.spend(_OBJECT_STEPS)
        if isinstance(target, Global) and target.stand_in is not None:
            for argument in arguments:  # they may be copied
                if isinstance(argument, (str, bytes)):
                    budget.spend(0, len(argument))
                elif isinstance(argument, (list, tuple, dict, set, frozenset)):
                    budget.spend(len(argument))
            return (self._nested if target.stand_in is inner_file else target.stand_in)(*arguments)
        if isinstance(target, Global) and target.makes_records:
            return Record(target)
        kind = target.kind if isinstance(target, Record) else target
        name = kind if isinstance(kind, Global) else "a value"
        raise Refused(f"the pickle calls {name}; only tensors are rebuilt here, by functions of adamerge's own")

    def _instantiate(self, klass: Any, args: Any) -> None:  # by INST and OBJ
        self.stack.append(self._called(klass, args))

    def load_reduce(self) -> None:
        """REDUCE and NEWOBJ: call."""
        arguments, target = self.stack.pop(), self.stack.pop()
        self.stack.append(self._called(target, arguments))

    def load_newobj_ex(self) -> None:
        """NEWOBJ_EX: call with names, which no stand-in needs."""
        self.stack.pop()
        self.load_reduce()

    def load_build(self) -> None:
        """BUILD: give a state."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            parts = state if type(state) is tuple else (state,)
            self._stream.budget.spend(len(parts))
            attributes = [part for part in parts if isinstance(part, dict)]  # and those of __slots__
            target.states += attributes or [{"": state}]  # what the class would make its attributes of
        elif isinstance(target, Global):
            raise Refused(f"the pickle changes {target}")
        elif not isinstance(target, (dict, Tensor)):  # _metadata of a state dict, attributes of a parameter
            raise Damaged("its pickle gives a state to something that has none")

    def load_append(self) -> None:
        """APPEND: one item of a list."""
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        """APPENDS: the items since the mark."""
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Record):  # the items of a list-like record matter to nobody
            raise Damaged("its pickle appends to something else than a list")

    def load_setitem(self) -> None:
        """SETITEM: one pair of a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        """SETITEMS: the pairs since the mark."""
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target = target.entries
        if not isinstance(target, dict):
            raise Damaged("its pickle sets items of something else than a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[check_key(key)] = value

    def load_additems(self) -> None:
        """ADDITEMS: to a set."""
        items, target = self.pop_mark(), self.stack[-1]
        if isinstance(target, set):
            target |= items_to_set(items)
        elif not isinstance(target, Record):
            raise Damaged("its pickle adds to something else than a set")

    def load_dict(self) -> None:
        """DICT: the pairs since the mark."""
        items = self.pop_mark()
        self.stack.append(pairs_to_dict(list(zip(items[::2], items[1::2], strict=True))))

    def load_frozenset(self) -> None:
        """FROZENSET: the items since the mark."""
        self.stack.append(items_to_set(self.pop_mark()))

    def load_bytearray8(self) -> None:
        """BYTEARRAY8: no more than the file has."""
        self.stack.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_frame(self) -> None:
        """FRAME: nothing is read ahead, so that the stream is left behind the pickle."""
        self.read(8)

    def _refuse_opcode(self) -> None:
        raise Refused("its pickle uses an extension code, or a buffer outside of it, which no checkpoint needs")

    load_newobj = load_reduce
    load_ext1 = load_ext2 = load_ext4 = load_next_buffer = load_readonly_buffer = _refuse_opcode


# Its base looks methods up in a table by opcode, not by name.
InertUnpickler.dispatch = {
    opcode: getattr(InertUnpickler, method.__name__) for opcode, method in pickle._Unpickler.dispatch.items()
}
