"""Lightning callbacks: export of the merged weights, graceful stops, a guard against collapse, the best of a run."""

from adamerge.callbacks.collapse import CollapseGuard as CollapseGuard
from adamerge.callbacks.export import ExportMergedWeights as ExportMergedWeights
from adamerge.callbacks.keep_best import KeepBest as KeepBest
from adamerge.callbacks.stop import GracefulStop as GracefulStop
