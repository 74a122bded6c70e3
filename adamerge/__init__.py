"""adamerge: test-time adaptive merging of expert models into one checkpoint."""

from adamerge.checkpoints import load_state_dict as load_state_dict
from adamerge.coefficients import Coefficients as Coefficients
from adamerge.errors import GuardError as GuardError
from adamerge.errors import InputError as InputError
from adamerge.merge import merge as merge
from adamerge.model import MergedModel as MergedModel
from adamerge.model import Outputs as Outputs
from adamerge.model import TaskStep as TaskStep
from adamerge.pool import ExpertPool as ExpertPool
from adamerge.version import __version__ as __version__

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
