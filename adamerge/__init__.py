"""adamerge: test-time adaptive merging of expert models into one checkpoint.

The names below are imported when they are first used, so that what needs no tensors, such as the command line's help,
does not wait for torch.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from adamerge.version import __version__ as __version__

if TYPE_CHECKING:
    from adamerge.checkpoints import load_state_dict as load_state_dict
    from adamerge.coefficients import Coefficients as Coefficients
    from adamerge.errors import GuardError as GuardError
    from adamerge.errors import InputError as InputError
    from adamerge.merge import merge as merge
    from adamerge.model import MergedModel as MergedModel
    from adamerge.model import Outputs as Outputs
    from adamerge.model import TaskStep as TaskStep
    from adamerge.pool import ExpertPool as ExpertPool

__all__ = [
    "Coefficients",
    "ExpertPool",
    "GuardError",
    "InputError",
    "MergedModel",
    "Outputs",
    "TaskStep",
    "load_state_dict",
    "merge",
]

_HOMES = {
    "Coefficients": "adamerge.coefficients",
    "ExpertPool": "adamerge.pool",
    "GuardError": "adamerge.errors",
    "InputError": "adamerge.errors",
    "MergedModel": "adamerge.model",
    "Outputs": "adamerge.model",
    "TaskStep": "adamerge.model",
    "load_state_dict": "adamerge.checkpoints",
    "merge": "adamerge.merge",
}


class _Package(types.ModuleType):
    """The package, whose ``merge`` is the function: Python would set it to the module of that name on its import."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name == "merge" and isinstance(value, types.ModuleType)
        super().__setattr__(name, value.merge if is_module else value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules[__name__].__class__ = _Package
