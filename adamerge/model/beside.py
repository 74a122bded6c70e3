"""The merge beside the base, where experts are adapters: no merged weight, and no gradient of one, is formed.

    y = W x + sum_e lambda_e up_e (down_e x)

Forward hooks add the second term to what the base's modules give, so that networks run as they are, at the price of a
step that fine-tunes an adapter; autograd gives the gradient of the coefficients. Parameters whose task vectors are
dense (norms, biases, whole modules of an adapter), or whose modules no hook can follow, merge as before.

Legend: E experts, R ranks of all experts, G groups, *S the shape of a parameter, a matrix (d, w) with d = S[0].
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from adamerge.errors import InputError, shorten
from adamerge.model.encoder import EncoderOptions
from adamerge.model.groups import GroupIndex, Segment
from adamerge.model.merge_low_rank import factors_of, is_expressible, scaled_whole, scales_of
from adamerge.model.weights import WholeWeights
from adamerge.pool.low_rank import Factors
from adamerge.pool.pool import ExpertPool

log = logging.getLogger(__name__)


class Term(NamedTuple):
    """The factors of one parameter's update under the coefficients of now.

    Attributes:
        up: (d, R), with coefficients per row in it.
        down: (R, w), with coefficients per column in it.
        scale: One coefficient per rank (R,) where they are neither; None where they are.
    """

    up: Tensor
    down: Tensor
    scale: Tensor | None

    def between(self, ranks: Tensor) -> Tensor:
        """Scale what comes out of the first factor, (..., R)."""
        return ranks if self.scale is None else ranks * self.scale.to(ranks.dtype)


Form = Callable[[nn.Module, Tensor, Tensor, Term], Tensor]  # module, its input and output; returns the new output


def _linear(_: nn.Module, x: Tensor, y: Tensor, term: Term) -> Tensor:
    ranks = term.between(functional.linear(x, term.down))
    if y.ndim == 1:
        return y + functional.linear(ranks, term.up)
    return torch.addmm(y.flatten(0, -2), ranks.flatten(0, -2), term.up.t()).view(y.shape)  # one pass over the output


def _transposed_linear(_: nn.Module, x: Tensor, y: Tensor, term: Term) -> Tensor:
    return y + term.between(x @ term.up) @ term.down


def _embedding(module: Any, x: Tensor, y: Tensor, term: Term) -> Tensor:
    change = term.between(functional.embedding(x, term.up)) @ term.down
    if module.padding_idx is not None:  # to which torch gives no gradient
        change = torch.where((x == module.padding_idx).unsqueeze(-1), change.detach(), change)
    return y + change


def _convolution(module: Any, x: Tensor, y: Tensor, term: Term) -> Tensor:
    ones = (1,) * (module.weight.ndim - 2)
    ranks = module._conv_forward(x, term.down.view(-1, *module.weight.shape[1:]), None)
    ranks = ranks if term.scale is None else ranks * term.scale.to(ranks.dtype).view(-1, *ones)
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(ones)]
    return y + convolve(ranks, term.up.view(*term.up.shape, *ones))


def _form_of(module: nn.Module, parent: nn.Module) -> Form | None:
    """Return how an update of a module's weight acts on its output; None where that is not known."""
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):  # which take the weights by themselves
        return None
    if type(module) is nn.Linear:
        return _linear
    if is_transposed(module):
        return _transposed_linear
    if type(module) is nn.Embedding and module.max_norm is None:
        return _embedding
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.groups == 1:
        return _convolution
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


class BesideLeaves(dict[str, Tensor]):
    """The leaves of a step beside the base: the parameters that merge densely, and the coefficients.

    Attributes:
        coefficients: (E, G), a leaf whose gradient the hooks give.
    """

    def __init__(self, dense: Mapping[str, Tensor], coefficients: Tensor) -> None:
        super().__init__(dense)
        self.coefficients = coefficients


class BesideWeights(WholeWeights):
    """The base's own parameters, and hooks that add what the adapters change.

    Args:
        encoder: The network that lends its code.
        pool: Base and experts.
        index: The groups of the coefficients.

    Raises:
        InputError: If no expert's change can be added beside the base.
    """

    gives_gradients = False

    def __init__(self, encoder: nn.Module, pool: ExpertPool, index: GroupIndex) -> None:
        super().__init__(encoder, pool, index)
        factors = {name: factors_of(pool, name, index.segments[name]) for name in pool.names}
        self._hooked = dict[str, list[tuple[nn.Module, Form]]]()
        places, reasons = _places(encoder), list[str]()
        for name in [name for name, f in factors.items() if f is not None]:
            forms = [(module, _form_of(module, parent)) for module, parent, at in places[name] if at == "weight"]
            if len(forms) < len(places[name]) or any(form is None for _, form in forms):
                continue
            if not is_expressible(index.segments[name], pool.shapes[name]):
                reasons.append(name)
                continue
            self._hooked[name] = [(module, form) for module, form in forms if form is not None]
        if reasons:
            raise InputError(
                f"encoder.engine: beside takes whole rows or columns of a weight per coefficient, and the granularity "
                f"divides rows of {shorten(reasons)}. Set encoder.engine=merged, or granularity=row."
            )
        if not self._hooked:
            raise InputError(
                "encoder.engine: beside needs weights of Linear, Conv or Embedding modules that all experts change by "
                "LoRA (DoRA is none) or granularity=rank, and this pool has none. Set encoder.engine=merged."
            )
        self._dense = [name for name in pool.names if name not in self._hooked]
        self._has_whole_adapters = all(_is_whole(pool.factors(name), index.segments[name]) for name in self._hooked)
        self._block: object = None  # the innermost that runs now: its hooks act, and no others
        log.info(
            "encoder.engine: %d weights keep their adapters beside them, %d tensors are merged",
            len(self._hooked), len(self._dense),
        )  # fmt: skip

    def merged_leaves(self, values: Tensor) -> Mapping[str, Tensor]:
        """Merge the dense parameters with coefficients (E, G), a leaf, which the hooks differentiate."""
        return BesideLeaves(super().merged_leaves(values), values)

    def expert(self, expert: str, buffers: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return an expert's parameters: its adapter alone beside the base, whose weights are not copied."""
        if not self._has_whole_adapters:
            return super().expert(expert, buffers)
        values = torch.zeros(len(self._pool.expert_names), self._index.size, dtype=self._pool.compute_dtype)
        values[self._pool.expert_names.index(expert)] = 1
        own = self._pool.tensors_of(expert, (*self._dense, *self._fixed))
        return BesideLeaves({**own, **buffers}, values.to(self._pool.device))

    def _names_of_leaves(self) -> Sequence[str]:
        return self._dense

    def swapped(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Let the encoder run on parameters, or beside the base on the leaves of a step, while a block lasts."""
        return self._beside(params, buffers) if isinstance(params, BesideLeaves) else self._plain(params, buffers)

    @contextmanager
    def _plain(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """Run on whole parameters: as a teacher does in the midst of a step, whose hooks then do nothing."""
        with super().swapped(params, buffers), self._innermost():
            yield

    @contextmanager
    def _innermost(self) -> Iterator[object]:
        before, self._block = self._block, object()
        try:
            yield self._block
        finally:
            self._block = before

    @contextmanager
    def _beside(self, leaves: BesideLeaves, buffers: Mapping[str, Tensor]) -> Iterator[None]:
        base = {name: self._pool.base[name] for name in self._hooked}
        pieces = _pieces(leaves.coefficients, [s for name in self._hooked for s in self._index.segments[name]])
        with super().swapped({**base, **leaves}, buffers), self._innermost() as block, ExitStack() as stack:
            weights = {name: (base[name], [module for module, _ in self._hooked[name]]) for name in self._hooked}
            watch = _Watch(weights)
            stack.callback(watch.close)
            stack.enter_context(watch)
            for name, forms in self._hooked.items():
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


def weights_of(options: EncoderOptions, encoder: nn.Module, pool: ExpertPool, index: GroupIndex) -> WholeWeights:
    """Return what an encoder runs on, as ``options.engine`` says.

    Raises:
        InputError: If it is to be beside the base, and cannot.
    """
    is_low_rank = any(pool.factors(name) is not None for name in pool.names)
    if options.engine == "merged" or (options.engine == "auto" and (options.backend is not None or not is_low_rank)):
        return WholeWeights(encoder, pool, index)
    try:
        return BesideWeights(encoder, pool, index)
    except InputError as error:
        if options.engine == "beside":
            raise
        log.info("encoder.engine: auto is merged here. %s", str(error).partition(" Set encoder.engine")[0])
        return WholeWeights(encoder, pool, index)


def _places(encoder: nn.Module) -> dict[str, list[tuple[nn.Module, nn.Module, str]]]:
    """Return, for each parameter by its first name, the modules that hold it, their parents and its names there."""
    first = {id(parameter): name for name, parameter in encoder.named_parameters()}
    places: dict[str, list[tuple[nn.Module, nn.Module, str]]] = {name: [] for name in first.values()}
    for path, module in encoder.named_modules():
        parent = encoder.get_submodule(path.rpartition(".")[0])
        for at, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places[first[id(parameter)]].append((module, parent, at))
    return places


def _is_whole(factors: Factors | None, segments: Sequence[Segment]) -> bool:
    """Whether what is beside the base is all that the experts changed."""
    return factors is not None and (segments[0].directions or max(factors.ranks)) >= max(factors.ranks)


Pieces = Callable[[Segment], Tensor]  # a segment's coefficients (E, groups)


def _pieces(coefficients: Tensor, segments: Sequence[Segment]) -> Pieces:
    """Divide coefficients (E, G) into those of segments, with one node of the graph where no groups overlap.

    To slice them segment by segment would cost a gradient (E, G) each.
    """
    runs = sorted({(segment.first, segment.count) for segment in segments})
    sizes, keys, at = list[int](), list[tuple[int, int] | None](), 0
    for first, count in runs:
        if first < at:
            return lambda segment: coefficients[:, segment.first : segment.first + segment.count]
        if first > at:
            sizes.append(first - at)
            keys.append(None)
        sizes.append(count)
        keys.append((first, count))
        at = first + count
    parts = coefficients.split([*sizes, coefficients.shape[1] - at], dim=1)
    found = {key: part for key, part in zip(keys, parts, strict=False) if key is not None}
    return lambda segment: found[segment.first, segment.count]


def _term(factors: Factors, segments: Sequence[Segment], pieces: Pieces) -> Term:
    """Return a parameter's factors under the coefficients; formed in each pass, so that each has a graph of its own."""
    scales = [scales_of(factors, segment, pieces(segment)) for segment in segments]
    if len(segments) == 1 and segments[0].groups == 1:
        return Term(factors.up, factors.down, scales[0][0])
    return Term(*scaled_whole(factors, segments, scales), None)


class _Watch(TorchFunctionMode):
    """Refuses to go on where a network uses a weight without calling its module, as the hook would not see that.

    Args:
        weights: Name to weight and the modules that may use it.
    """

    def __init__(self, weights: Mapping[str, tuple[Tensor, Sequence[nn.Module]]]) -> None:
        super().__init__()
        self._names = {id(weight): name for name, (weight, _) in weights.items()}
        self._inside = dict.fromkeys(self._names, 0)
        self._handles = [
            handle
            for weight, modules in weights.values()
            for module in modules
            for handle in (
                module.register_forward_pre_hook(partial(self._count, id(weight), 1)),
                module.register_forward_hook(partial(self._count, id(weight), -1), always_call=True),
            )
        ]

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _count(self, weight: int, by: int, *_: Any) -> None:
        self._inside[weight] += by

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        if any(isinstance(value, Tensor) for value in results):  # not where a network asks for a dtype or a shape
            for value in (*args, *(kwargs or {}).values()):
                for tensor in value if isinstance(value, (tuple, list)) else (value,):  # cat and einsum take lists
                    if self._inside.get(id(tensor)) == 0:
                        raise InputError(
                            f"encoder.engine: beside cannot follow {self._names[id(tensor)]!r}: the network uses it "
                            "without a call of its module. Set encoder.engine=merged."
                        )
        return result
