"""Lightning callbacks: export of the merged weights, graceful stops, guards, the best of a run, loggers."""

from typing import TYPE_CHECKING

from adamerge.system.lazy_names import lazy_names

if TYPE_CHECKING:
    from adamerge.callbacks.export import ExportMergedWeights as ExportMergedWeights
    from adamerge.callbacks.keep_best import KeepBest as KeepBest
    from adamerge.callbacks.labels import HandOverLabels as HandOverLabels
    from adamerge.callbacks.log_coefficients import LogCoefficients as LogCoefficients
    from adamerge.callbacks.stop import GracefulStop as GracefulStop
    from adamerge.callbacks.unlabeled import CollapseGuard as CollapseGuard
    from adamerge.callbacks.unlabeled import UnlabeledCriteria as UnlabeledCriteria

__all__ = [
    "CollapseGuard",
    "ExportMergedWeights",
    "GracefulStop",
    "HandOverLabels",
    "KeepBest",
    "LogCoefficients",
    "UnlabeledCriteria",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CollapseGuard": "adamerge.callbacks.unlabeled",
        "UnlabeledCriteria": "adamerge.callbacks.unlabeled",
        "ExportMergedWeights": "adamerge.callbacks.export",
        "KeepBest": "adamerge.callbacks.keep_best",
        "HandOverLabels": "adamerge.callbacks.labels",
        "LogCoefficients": "adamerge.callbacks.log_coefficients",
        "GracefulStop": "adamerge.callbacks.stop",
    },
)
