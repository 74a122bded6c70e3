"""adamerge: test-time adaptive merging of expert models into one checkpoint.

The names below are imported when they are first used, so that what needs no tensors, such as the command line's help,
does not wait for torch.
"""

from typing import TYPE_CHECKING

from adamerge.system.lazy_names import lazy_names

if TYPE_CHECKING:
    from adamerge.checkpoints.checkpoint import load_state_dict as load_state_dict
    from adamerge.data.batch import Outputs as Outputs
    from adamerge.errors import GuardError as GuardError
    from adamerge.errors import InputError as InputError
    from adamerge.model.coefficients import Coefficients as Coefficients
    from adamerge.model.merge import merge as merge
    from adamerge.model.merged_model import MergedModel as MergedModel
    from adamerge.model.task_step import TaskStep as TaskStep
    from adamerge.pool.pool import ExpertPool as ExpertPool

__version__ = "0.1.0"

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Coefficients": "adamerge.model.coefficients",
        "ExpertPool": "adamerge.pool.pool",
        "GuardError": "adamerge.errors",
        "InputError": "adamerge.errors",
        "MergedModel": "adamerge.model.merged_model",
        "Outputs": "adamerge.data.batch",
        "TaskStep": "adamerge.model.task_step",
        "load_state_dict": "adamerge.checkpoints.checkpoint",
        "merge": "adamerge.model.merge",
    },
)
