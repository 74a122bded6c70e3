"""How coefficients move: LightningModules."""
