"""The stack machine of pickles, over inert objects.

``pickletools.genops`` cuts the stream into opcodes. Python's own unpicklers are not used: they size their memo by a
number in the file, hash whatever stands as a key, and call methods of whatever lies on the stack.
"""

import pickletools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from adamerge.checkpoints.pickles.names import LOAD_FROM_BYTES, check_key, items_to_set, pairs_to_dict, resolve
from adamerge.checkpoints.pickles.records import (
    Budget,
    Damaged,
    Global,
    Rebuild,
    Record,
    Refused,
    Storage,
    StorageKind,
    TensorView,
)
from adamerge.errors import InputError

_MAX_LINE = 1 << 20  # bytes of one text argument of protocol 0

_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}


class Source:
    """The bytes of a file from some position on, as ``genops`` reads them."""

    def __init__(self, data: memoryview, position: int = 0) -> None:
        self.data = data
        self.position = position

    def read(self, count: int) -> bytes:
        """Return at most ``count`` bytes; no more is ever allocated than the file has."""
        start, self.position = self.position, min(len(self.data), self.position + max(count, 0))
        return bytes(self.data[start : self.position])

    def readline(self) -> bytes:
        """Return a line with its end."""
        length, stop = 256, 0  # most lines are short, and a window of the longest would be copied for each
        while not stop:
            window = bytes(self.data[self.position : self.position + length])
            stop = window.find(b"\n") + 1
            if not stop and (length >= _MAX_LINE or len(window) < length):
                raise Damaged("a line without an end")
            length = min(2 * length, _MAX_LINE)
        self.position += stop
        return window[:stop]

    def tell(self) -> int:
        """Return the position in the data."""
        return self.position


class Machine:
    """Reads one pickle after the other.

    Args:
        persistent: Turns the id of a storage (kind, key, count) into a storage.
        nested: Turns the bytes of a file inside of the pickle into a storage.
        budget: What it may cost, shared by all pickles of a file.

    Attributes:
        inert: Full names of the classes and functions met, and how often each made a record.
    """

    def __init__(
        self,
        persistent: Callable[[StorageKind, str, int], Storage],
        nested: Callable[[bytes], Storage],
        budget: Budget,
    ) -> None:
        self.inert: Counter[str] = Counter()
        self._persistent = persistent
        self._nested = nested
        self._budget = budget

    def read(self, source: Source) -> Any:
        """Read one pickle, leaving ``source`` behind it.

        Raises:
            Refused: If it asks for what :mod:`adamerge.checkpoints.pickles.names` does not admit.
            Damaged: If it is none.
        """
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of unknown escape sequences in damaged texts
                self._run(source)
            result = self._stack.pop()
        except InputError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise Damaged("its pickle is cut off or makes no sense") from error
        return result

    def _run(self, source: Source) -> None:
        for opcode, argument, _ in pickletools.genops(source):  # type: ignore[arg-type]  # all that it calls is there
            self._budget.spend(1)
            if opcode.name == "STOP":
                return
            self._step(opcode.name, argument)

    def _step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _FRESH:
            self._stack.append(_FRESH[name]())
        elif name in _STEPS:
            _STEPS[name](self, argument)
        else:  # EXT1, EXT2, EXT4: names from a table of the process; NEXT_BUFFER, READONLY_BUFFER: no buffers here
            raise Refused(f"its pickle uses the opcode {name}, which no checkpoint needs")

    def _pop(self) -> Any:
        if self._marks and self._marks[-1] == len(self._stack):
            raise Damaged("its pickle makes no sense")
        return self._stack.pop()

    def _top(self) -> Any:
        return self._stack[-1]

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _discard(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(pairs_to_dict(list(zip(items[::2], items[1::2], strict=True))))

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Record):  # the items of a list-like record matter to nobody
            raise Damaged("its pickle appends to something else than a list")

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Record):
            target = target.entries
        if not isinstance(target, dict):
            raise Damaged("its pickle sets items of something else than a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[check_key(key)] = value

    def _add(self, _: Any) -> None:
        items, target = self._since_mark(), self._top()
        if isinstance(target, set):
            target |= items_to_set(items)
        elif not isinstance(target, Record):
            raise Damaged("its pickle adds to something else than a set")

    def _global(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise Damaged("its pickle names a class by something else than a text")
        found = resolve(module, name)
        if isinstance(found, Global):
            self.inert[str(found)] += 0
        return found

    def _global_pair(self, argument: str) -> Any:
        """Return what a line "module name" stands for; more spaces make no name."""
        module, _, name = argument.partition(" ")
        return self._global(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self._stack.append(self._global(module, name))

    def _call(self, target: Any, arguments: Any) -> None:
        if not isinstance(arguments, (tuple, list)):
            raise Damaged("its pickle calls something without arguments")
        if isinstance(target, Rebuild):
            for argument in arguments:  # they may be copied
                if isinstance(argument, (str, bytes)):
                    self._budget.spend(0, len(argument))
                elif isinstance(argument, (list, tuple, dict, set, frozenset)):
                    self._budget.spend(len(argument))
            self._stack.append((self._nested if target is LOAD_FROM_BYTES else target.function)(*arguments))
        elif isinstance(target, Global) and target.makes_records:
            self.inert[str(target)] += 1
            self._stack.append(Record(target))
        else:
            name = str(target.kind if isinstance(target, Record) else target) if _named(target) else "a value"
            raise Refused(f"the pickle calls {name}; only tensors are rebuilt here, by functions of adamerge's own")

    def _reduce(self, _: Any) -> None:
        arguments, target = self._pop(), self._pop()
        self._call(target, arguments)

    def _instance(self, argument: str) -> None:
        self._call(self._global_pair(argument), self._since_mark())

    def _object(self, _: Any) -> None:
        items = self._since_mark()
        self._call(items[0], items[1:])

    def _new_object(self, with_names: bool) -> None:
        if with_names:
            self._pop()
        self._reduce(None)

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Record):
            parts = state if type(state) is tuple else (state,)
            self._budget.spend(len(parts))
            target.states += [part for part in parts if isinstance(part, dict)]  # attributes, those of __slots__
        elif isinstance(target, (Global, Rebuild)):
            name = target if isinstance(target, Global) else target.name
            raise Refused(f"the pickle changes {name}")
        elif not isinstance(target, (dict, TensorView)):  # _metadata of a state dict, attributes of a parameter
            raise Damaged("its pickle gives a state to something that has none")

    def _storage(self, key: Any) -> None:
        match key:
            case ("storage", StorageKind() as kind, str() as name, str(), int() as count, *rest) if rest in (
                [],
                [None],
            ):
                self._stack.append(self._persistent(kind, name, count))
            case ("module", Global() as kind, *_):
                self._stack.append(kind)
            case _:
                raise Damaged("its pickle names a storage in a way that torch does not")

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])


def _named(target: Any) -> bool:
    return isinstance(target, (Global, Record))


def _nothing(_machine: Machine, _argument: Any) -> None:
    pass


_STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "MARK": lambda m, _: m._marks.append(len(m._stack)),
    "POP": Machine._discard,
    "POP_MARK": lambda m, _: m._since_mark().clear(),
    "DUP": lambda m, _: m._stack.append(m._top()),
    "TUPLE": lambda m, _: m._stack.append(tuple(m._since_mark())),
    "TUPLE1": lambda m, _: m._tuple(1),
    "TUPLE2": lambda m, _: m._tuple(2),
    "TUPLE3": lambda m, _: m._tuple(3),
    "LIST": lambda m, _: m._stack.append(m._since_mark()),
    "DICT": Machine._dict,
    "FROZENSET": lambda m, _: m._stack.append(items_to_set(m._since_mark())),
    "APPEND": lambda m, _: m._append([m._pop()]),
    "APPENDS": lambda m, _: m._append(m._since_mark()),
    "SETITEM": lambda m, _: m._set([m._pop(), m._pop()][::-1]),
    "SETITEMS": lambda m, _: m._set(m._since_mark()),
    "ADDITEMS": Machine._add,
    "GLOBAL": lambda m, argument: m._stack.append(m._global_pair(argument)),
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "INST": Machine._instance,
    "OBJ": Machine._object,
    "NEWOBJ": lambda m, _: m._new_object(with_names=False),
    "NEWOBJ_EX": lambda m, _: m._new_object(with_names=True),
    "BUILD": Machine._build,
    "PERSID": Machine._storage,
    "BINPERSID": lambda m, _: m._storage(m._pop()),
    "PUT": Machine._put,
    "BINPUT": Machine._put,
    "LONG_BINPUT": Machine._put,
    "MEMOIZE": lambda m, _: m._put(len(m._memo)),
    "GET": Machine._get,
    "BINGET": Machine._get,
    "LONG_BINGET": Machine._get,
}
