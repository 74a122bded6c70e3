"""How Lightning runs a sharded merged model."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from adamerge.errors import InputError
from adamerge.model.sharding import ShardedModel


class ShardedStrategy(DDPStrategy):
    """Several devices that each hold a part of base, task vectors and merged weights.

    Lightning's DDP for the coefficients, of which every device has all, and which alone are registered; the encoder is
    cut by FSDP2 when the fit begins. Takes the options of Lightning's ``DDPStrategy``.

    Raises:
        InputError: In ``setup``, if the method's model is no :class:`~adamerge.model.sharding.ShardedModel`.
    """

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model that is not sharded."""
        model = getattr(self.lightning_module, "model", None)
        if not isinstance(model, ShardedModel):
            raise InputError(
                f"trainer.strategy: ShardedStrategy needs a ShardedModel, found {type(model).__name__}. Make one of "
                "the same arguments, with a pool that is mapped=True; or set the strategy to ddp."
            )
        super().setup(trainer)
