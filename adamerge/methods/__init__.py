"""How coefficients move: LightningModules."""

from adamerge.methods.distillation import Distillation as Distillation
from adamerge.methods.frank_wolfe import FrankWolfeMerging as FrankWolfeMerging
from adamerge.methods.gradient import GradientMerging as GradientMerging
from adamerge.methods.sharded_strategy import ShardedStrategy as ShardedStrategy
