"""How coefficients move: LightningModules."""

from adamerge.methods.gradient import GradientMerging as GradientMerging
