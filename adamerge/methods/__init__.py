"""How coefficients move: LightningModules."""

from typing import TYPE_CHECKING

from adamerge.system.lazy_names import lazy_names

if TYPE_CHECKING:
    from adamerge.methods.frank_wolfe import FrankWolfeMerging as FrankWolfeMerging
    from adamerge.methods.gradient import GradientMerging as GradientMerging
    from adamerge.methods.sharded_strategy import ShardedStrategy as ShardedStrategy

__all__ = ["FrankWolfeMerging", "GradientMerging", "ShardedStrategy"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FrankWolfeMerging": "adamerge.methods.frank_wolfe",
        "GradientMerging": "adamerge.methods.gradient",
        "ShardedStrategy": "adamerge.methods.sharded_strategy",
    },
)
