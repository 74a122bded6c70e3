"""Lightning callbacks: export of the merged weights, graceful stops."""

from adamerge.callbacks.export import ExportMergedWeights as ExportMergedWeights
from adamerge.callbacks.stop import GracefulStop as GracefulStop
from adamerge.callbacks.stop import Interrupted as Interrupted
