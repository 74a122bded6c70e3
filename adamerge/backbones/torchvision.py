"""torchvision's classifiers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adamerge.backbones.protocol import expert_of
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.data.task import Task
from adamerge.errors import InputError, did_you_mean, shorten


@dataclass(frozen=True)
class Torchvision:
    """A torchvision classifier; each expert's own classifier becomes its task's head.

    Args:
        model: A name that ``torchvision.models.get_model`` knows.
        head: Path of the final Linear layer: ``fc`` (ResNet), ``heads.head`` (ViT), ``classifier.2`` (ConvNeXt).

    Raises:
        InputError: If there is no such model or layer.
    """

    model: str
    head: str = "fc"
    prefix: str = ""

    def __post_init__(self) -> None:
        from torchvision import models

        names = models.list_models()
        if self.model not in names:
            raise InputError(
                f"backbone.model: torchvision knows no model {self.model!r}.{did_you_mean(self.model, names)}"
            )

    @property
    def exclude(self) -> tuple[str, ...]:
        """The classifier's tensors."""
        return (f"{self.head}.*",)

    def encoder(self) -> nn.Module:
        """Return the model with its classifier taken off."""
        from torchvision import models

        model: nn.Module = models.get_model(self.model, weights=None)
        try:
            layer = model.get_submodule(self.head)
        except AttributeError as error:
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            hint = f"; its last Linear layer is {linear[-1]!r}" if linear else ", and no Linear layer at all"
            raise InputError(f"backbone.head: {self.model} has no layer {self.head!r}{hint}.") from error
        if not isinstance(layer, nn.Linear):
            raise InputError(
                f"backbone.head: {self.head!r} of {self.model} is {type(layer).__name__}, expected Linear."
            )
        model.set_submodule(self.head, nn.Identity())
        return model

    def preprocess(self) -> Callable[[Any], Tensor]:
        """Return the transform of the model's default weights (nothing is downloaded)."""
        from torchvision import models

        transform: Callable[[Any], Tensor] = models.get_model_weights(self.model).DEFAULT.transforms()
        return transform

    def heads(
        self, base: Checkpoint, experts: Mapping[str, Checkpoint], tasks: Mapping[str, Task]
    ) -> dict[str, nn.Module]:
        """Split each expert's own classifier off its file.

        Raises:
            InputError: If a task has no expert, or the expert's file has no classifier.
        """
        heads: dict[str, nn.Module] = {}
        for name, task in tasks.items():
            source = expert_of(name, task, experts, "classifier")
            keys = [f"{self.head}.weight", f"{self.head}.bias"]
            missing = [key for key in keys if key not in source.keys]
            if missing:
                raise InputError(f"{source.name}: no classifier: {shorten(missing)} missing. Is backbone.head right?")
            weight, bias = (source.get(key).float() for key in keys)
            head = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
            head.load_state_dict({"weight": weight, "bias": bias})
            heads[name] = head
        return heads

    def sidecar(self) -> None:
        """Torchvision checkpoints need no configuration beside them."""
