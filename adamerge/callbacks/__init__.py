"""Lightning callbacks: export of the merged weights, graceful stops, guards, the best of a run, loggers."""

from adamerge.callbacks.export import ExportMergedWeights as ExportMergedWeights
from adamerge.callbacks.keep_best import KeepBest as KeepBest
from adamerge.callbacks.labels import HandOverLabels as HandOverLabels
from adamerge.callbacks.log_coefficients import LogCoefficients as LogCoefficients
from adamerge.callbacks.never_worse import NeverWorse as NeverWorse
from adamerge.callbacks.stop import GracefulStop as GracefulStop
from adamerge.callbacks.unlabeled import CollapseGuard as CollapseGuard
from adamerge.callbacks.unlabeled import UnlabeledCriteria as UnlabeledCriteria
