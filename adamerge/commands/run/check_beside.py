"""Check that a network can have its experts' updates beside the base, before a weight is read."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from adamerge.data.batch import of_network
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import InputError
from adamerge.model.beside_modules import Watch, updated_modules
from adamerge.model.encoder import swapped
from adamerge.model.groups import GroupIndex

log = logging.getLogger(__name__)


def check_beside(parts: Mapping[str, Any]) -> None:
    """Refuse experts, groups and networks that ``encoder.engine=beside`` cannot follow.

    Args:
        parts: What has been built of the run: encoder's options, headers, index, backbone and data.

    Raises:
        InputError: If there is anything of these.
    """
    options, headers, backbone = parts.get("encoder"), parts.get("headers"), parts.get("backbone")
    if options is None or options.engine != "beside" or backbone is None or headers is None or headers.problems:
        return
    index: GroupIndex | None = parts.get("index")
    products = {*headers.products, *(index.directions if index is not None else ())}
    encoder = backbone.encoder()
    updated = updated_modules(encoder, headers.shapes, products, index)
    data: Any = parts.get("data")
    if isinstance(data, UnlabeledTasks):
        modules = {name: [module for module, _ in forms] for name, forms in updated.items()}
        _run(encoder, {name: modules[name] for name in modules if name in headers.products}, data)


def _run(encoder: nn.Module, modules: Mapping[str, Sequence[nn.Module]], data: UnlabeledTasks) -> None:
    """Run the network on one sample under the eyes of a watch, with tensors that have shapes and no values.

    A network that needs values is taken on trust: the run's first step refuses it.
    """
    inputs = data.collate([next(iter(data.streams.values()))[0].inputs])
    tensors = (*encoder.named_parameters(), *encoder.named_buffers())
    try:
        with torch.no_grad(), FakeTensorMode() as mode:
            fake = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors}
            inputs = tree_map(mode.from_tensor, inputs)
            with swapped(encoder, fake), closing(Watch(modules)) as watch, watch:
                encoder(inputs) if isinstance(inputs, Tensor) else encoder(**of_network(inputs))
    except InputError:
        raise
    except Exception as error:
        log.debug("The network does not run without values: %s", error)
