"""The merge beside the base, where experts are adapters: no merged weight, and no gradient of one, is formed.

    y = W x + sum_e lambda_e up_e (down_e x)

Forward hooks add the second term to what the base's modules give, so that networks run as they are, at the price of a
step that fine-tunes an adapter; autograd gives the gradient of the coefficients. Parameters whose task vectors are
dense (norms, biases, whole modules of an adapter), or whose modules no hook can follow, merge as before.

Legend: E experts, R ranks of all experts, G groups, *S the shape of a parameter, a matrix (d, w) with d = S[0].
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from adamerge.errors import InputError
from adamerge.model.beside_modules import Form, Term, Watch, updated_modules
from adamerge.model.encoder import EncoderOptions
from adamerge.model.groups import GroupIndex, Segment
from adamerge.model.merge_low_rank import factors_of, scaled_whole, scales_of
from adamerge.model.quantized import quantized
from adamerge.model.weights import WholeWeights
from adamerge.pool.low_rank import Factors
from adamerge.pool.pool import ExpertPool

log = logging.getLogger(__name__)


class BesideLeaves(dict[str, Tensor]):
    """The leaves of a step beside the base: the parameters that merge densely, and the coefficients.

    Attributes:
        coefficients: (E, G), a leaf whose gradient the hooks give.
    """

    def __init__(self, dense: Mapping[str, Tensor], coefficients: Tensor) -> None:
        super().__init__(dense)
        self.coefficients = coefficients


class Updates:
    """Hooks on the base's modules that add what the experts change.

    Args:
        encoder: The network that lends its code; as it is built, before it is cut into parts.
        pool: Base and experts.
        index: The groups of the coefficients.

    Attributes:
        names: The weights whose updates are added.
        are_whole: Whether what is added is all that the experts changed.
        linear: Those of the weights that linear layers alone have.

    Raises:
        InputError: If no expert's change can be added beside the base.
    """

    def __init__(self, encoder: nn.Module, pool: ExpertPool, index: GroupIndex) -> None:
        self._encoder, self._pool, self._index = encoder, pool, index
        products = {name for name in pool.names if factors_of(pool, name, index.segments[name]) is not None}
        self._modules = updated_modules(encoder, pool.shapes, products, index)
        self.names = tuple(self._modules)
        self.linear = frozenset(
            name for name, forms in self._modules.items() if all(type(module) is nn.Linear for module, _ in forms)
        )
        self.are_whole = all(_is_whole(pool.factors(name), index.segments[name]) for name in self.names)
        self._block: object = None  # the innermost that runs now: its hooks act, and no others
        log.info(
            "encoder.engine: %d weights keep their adapters beside them, %d tensors are merged",
            len(self.names), len(pool.names) - len(self.names),
        )  # fmt: skip

    @contextmanager
    def silent(self) -> Iterator[object]:
        """Let the hooks of blocks around this one do nothing: as while a teacher runs in the midst of a step."""
        before, self._block = self._block, object()
        try:
            yield self._block
        finally:
            self._block = before

    @contextmanager
    def added(self, coefficients: Tensor) -> Iterator[None]:
        """Add the updates under coefficients (E, G) while a block lasts, in which the modules have the base's weights.

        Raises:
            InputError: In the block, where the network uses a weight without its module.
        """
        pieces = _pieces(coefficients, [s for name in self.names for s in self._index.segments[name]])
        with self.silent() as block, ExitStack() as stack:
            watch = Watch({name: [module for module, _ in forms] for name, forms in self._modules.items()})
            stack.callback(watch.close)
            stack.enter_context(watch)
            for module in self._encoder.modules():
                if isinstance(module, FSDPModule):  # which has its weights whole from now on
                    handle = module.register_forward_pre_hook(lambda *_: watch.look())
                    stack.callback(handle.remove)
            for name, forms in self._modules.items():
                factors = factors_of(self._pool, name, self._index.segments[name])
                assert factors is not None
                term = partial(_term, factors, self._index.segments[name], pieces)
                for module, form in forms:
                    hook = partial(self._add, block, form, term)
                    stack.enter_context(module.register_forward_hook(hook, with_kwargs=True))
            yield

    def _add(
        self,
        block: object,
        form: Form,
        term: Callable[[], Term],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        y: Tensor,
    ) -> Tensor:
        """Add an update's part to a module's output."""
        return form(module, args[0] if args else next(iter(kwargs.values())), y, term()) if self._block is block else y


class BesideWeights(WholeWeights):
    """The base's own parameters, and hooks that add what the adapters change.

    Args:
        encoder: The network that lends its code.
        pool: Base and experts.
        index: The groups of the coefficients.
        base_dtype: What the base's linear weights that have updates beside them are held in: ``float32`` as the pool
            computes, ``int8`` or ``nf4``.

    Attributes:
        updates: The hooks.
        base_dtype: As given.

    Raises:
        InputError: If no expert's change can be added beside the base.
    """

    gives_gradients = False

    def __init__(self, encoder: nn.Module, pool: ExpertPool, index: GroupIndex, base_dtype: str = "float32") -> None:
        super().__init__(encoder, pool, index)
        self.updates = Updates(encoder, pool, index)
        self._dense = [name for name in pool.names if name not in self.updates.names]
        self.base_dtype = base_dtype
        self._base: dict[str, Tensor] = {}  # where it is quantised, from pass to pass
        if not self._is_quantized:
            return
        if not self.updates.linear or pool.compute_dtype != torch.float32:
            raise InputError(
                f"encoder.base_dtype: {base_dtype} takes linear layers' weights that have adapters, of a base of up to "
                f"32 bits; found {len(self.updates.linear)} such weights, and {pool.compute_dtype}. Leave it out."
            )
        log.info("encoder.base_dtype: %d weights of the base are held in %s", len(self.updates.linear), base_dtype)

    def merged_leaves(self, values: Tensor) -> Mapping[str, Tensor]:
        """Merge the dense parameters with coefficients (E, G), a leaf, which the hooks differentiate."""
        return BesideLeaves(super().merged_leaves(values), values)

    def expert(self, expert: str, buffers: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return an expert's parameters: its adapter alone beside the base, whose weights are not copied."""
        if not self.updates.are_whole:
            return super().expert(expert, buffers)
        values = torch.zeros(len(self._pool.expert_names), self._index.size, dtype=self._pool.compute_dtype)
        values[self._pool.expert_names.index(expert)] = 1
        own = self._pool.tensors_of(expert, (*self._dense, *self._fixed))
        return BesideLeaves({**own, **buffers}, values.to(self._pool.device))

    def forget(self) -> None:
        """Drop what is held of the base, too."""
        super().forget()
        self._base = {}

    @property
    def _is_quantized(self) -> bool:
        return self.base_dtype != "float32"

    def _held(self, name: str) -> Tensor:
        """Return a weight of the base as it is held from pass to pass."""
        weight = self._pool.base[name]
        return quantized(weight, self.base_dtype) if self._is_quantized and name in self.updates.linear else weight

    def _names_of_leaves(self) -> Sequence[str]:
        return self._dense

    @contextmanager
    def swapped(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the encoder run on parameters, or beside the base on the leaves of a step, while a block lasts."""
        if isinstance(params, BesideLeaves):
            base = self._base or {name: self._held(name) for name in self.updates.names}
            self._base = base if self._is_quantized else {}
            with super().swapped({**base, **params}, buffers), self.updates.added(params.coefficients):
                yield
        else:
            with super().swapped(params, buffers), self.updates.silent():
                yield


def weights_of(options: EncoderOptions, encoder: nn.Module, pool: ExpertPool, index: GroupIndex) -> WholeWeights:
    """Return what an encoder runs on, as ``options.engine`` says.

    Raises:
        InputError: If it is to be beside the base, and cannot.
    """
    is_low_rank = any(pool.factors(name) is not None for name in pool.names)
    is_refused = options.backend is not None or options.dtype is not None or not is_low_rank
    if options.engine == "merged" or (options.engine == "auto" and is_refused):
        return WholeWeights(encoder, pool, index, options.dtype)
    try:
        return BesideWeights(encoder, pool, index, options.base_dtype)
    except InputError as error:
        if options.engine == "beside":
            raise
        log.info("encoder.engine: auto is merged here. %s", str(error).partition(" Set encoder.engine")[0])
        return WholeWeights(encoder, pool, index)


def _is_whole(factors: Factors | None, segments: Sequence[Segment]) -> bool:
    """Whether what is beside the base is all that the experts changed."""
    return factors is not None and (segments[0].directions or max(factors.ranks)) >= max(factors.ranks)


Pieces = Callable[[Segment], Tensor]  # a segment's coefficients (E, groups)


def _pieces(coefficients: Tensor, segments: Sequence[Segment]) -> Pieces:
    """Divide coefficients (E, G) into those of segments, with one node of the graph where no groups overlap.

    To slice them segment by segment would cost a gradient (E, G) each.
    """
    runs = sorted({(segment.first, segment.span) for segment in segments})
    sizes, keys, at = list[int](), list[tuple[int, int] | None](), 0
    for first, count in runs:
        if first < at:
            return lambda segment: coefficients[:, segment.first : segment.first + segment.span]
        if first > at:
            sizes.append(first - at)
            keys.append(None)
        sizes.append(count)
        keys.append((first, count))
        at = first + count
    parts = coefficients.split([*sizes, coefficients.shape[1] - at], dim=1)
    found = {key: part for key, part in zip(keys, parts, strict=False) if key is not None}
    return lambda segment: found[segment.first, segment.span]


def _term(factors: Factors, segments: Sequence[Segment], pieces: Pieces) -> Term:
    """Return a parameter's factors under the coefficients; formed in each pass, so that each has a graph of its own."""
    scales = [scales_of(factors, segment, pieces(segment)) for segment in segments]
    if len(segments) == 1 and segments[0].groups == 1:
        return Term(factors.up, factors.down, scales[0][0])
    return Term(*scaled_whole(factors, segments, scales), None)
