"""The merge and its adjoint: the hot path.

theta_n = theta0_n + sum_e lambda[e, g(n)] tau[e, n]        (merge)
dL/dlambda[e, g] = sum over n in g of <dL/dtheta_n, tau[e, n]>    (pull_back)

Legend: E experts, G groups, n entries of a flattened parameter. Both passes walk over tiles: pieces
of a segment small enough that the result stays in the processor's cache while the E task vectors
stream through it once. A tile with one group is a matrix-vector product; one with several contiguous
groups (rows, chunks) a batch of them; groups that interleave (columns) are broadcast elementwise.
Parameters whose task vectors are products of thin matrices (LoRA) stay so: see :mod:`adamerge.model.merge_low_rank`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamerge.model import merge_low_rank
from adamerge.model.coefficients import Coefficients
from adamerge.model.groups import GroupIndex, Segment
from adamerge.pool.low_rank import Factors, exact_products, use_threads
from adamerge.pool.part import PoolPart
from adamerge.pool.pool import ExpertPool
from adamerge.pool.tiles import CACHED

_TILE_OF_ACCELERATORS = 1 << 22  # entries, not CACHED: most tensors are one tile, and temporaries stay bounded
_SHORT = 16  # entries of a group, below which one small product per group costs more than broadcasting


def merge(pool: ExpertPool, coefficients: Coefficients, *, detach: bool = False) -> dict[str, Tensor]:
    r"""Add coefficient-weighted task vectors to the base.

    :math:`\theta_n = \theta^0_n + \sum_e \lambda_{e, g(n)} \tau_{e, n}`

    Args:
        pool: Base and task vectors; not modified.
        coefficients: Made for this pool.
        detach: Return a state dict for export instead: every key of the base checkpoint, with the
            base's key names and dtypes. Computed on the CPU in float64, elementwise, so that the
            same coefficients give the same bytes whatever the storage, threads or device.

    Returns:
        Parameter name (the encoder's) to tensor (*S) in ``pool.compute_dtype``, differentiable in
        ``coefficients.raw``; or, with ``detach``, the state dict.

    Example:
        >>> pool = ExpertPool.from_state_dicts({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
        >>> merge(pool, Coefficients(pool, "task", init=0.25), detach=True)
        {'w': tensor([0.2500, 0.2500])}

    Reference:
        Ilharco et al., Task arithmetic, arXiv:2212.04089; Yang et al., AdaMerging, arXiv:2310.02575.
    """
    if detach:
        return in_order(pool, merged_tensors(pool, coefficients))
    coefficients.check(pool)
    merged = _Merge.apply(coefficients().to(pool.device), pool, coefficients.index)
    return dict(zip(pool.names, merged, strict=True))


def merge_into(out: Mapping[str, Tensor], pool: ExpertPool | PoolPart, index: GroupIndex, values: Tensor) -> None:
    """Write the merged parameters into existing tensors; allocates nothing of a model's size.

    Args:
        out: Parameter name to contiguous tensor (*S), overwritten; only these are merged. Sums are taken in
            ``pool.compute_dtype``; a tensor of another dtype gets them rounded, by way of one parameter's worth.
        pool: Base and task vectors.
        index: The groups.
        values: Coefficients (E, G) on the pool's device.
    """
    with _engine(pool.device) as threads:
        weights = values.t().contiguous()  # (G, E)
        for name, tensor in out.items():
            base, segments = pool.base[name].view(-1), index.segments[name]
            target = tensor.view(-1) if tensor.dtype == base.dtype else torch.empty_like(base)
            factors = merge_low_rank.factors_of(pool, name, segments)
            if factors is not None:
                whole, segments = _divided(factors, segments)
                with use_threads(threads):  # products compute more than they read
                    for segment in whole:
                        merge_low_rank.merge_segment(target, base, factors, segment, weights)
            for tile in _tiles(segments, pool.device):
                _merge_tile(target, base, pool.tile(name, tile.start, tile.stop, reuse=True), tile, weights)
            if target.dtype != tensor.dtype:
                tensor.view(-1).copy_(target)


def pull_back(pool: ExpertPool, index: GroupIndex, gradients: Mapping[str, Tensor | None]) -> Tensor:
    """Contract gradients of the merged parameters with the task vectors: the adjoint of the merge.

    Args:
        pool: The task vectors.
        index: The groups.
        gradients: Parameter name to dL/dtheta (*S); None or absent counts as zero and costs nothing.

    Returns:
        dL/dlambda, (E, G), in ``pool.compute_dtype``.
    """
    sums = PullBack(pool, index)
    for name in pool.names:
        gradient = gradients.get(name)
        if gradient is not None:
            sums.add(name, gradient)
    return sums.result()


class PullBack:
    """The adjoint of the merge, one parameter after the other as their gradients arrive.

    Args:
        pool: The task vectors.
        index: The groups.
    """

    def __init__(self, pool: ExpertPool | PoolPart, index: GroupIndex) -> None:
        self._pool = pool
        self._index = index
        with _engine(pool.device):
            shape = (index.size, len(pool.expert_names))
            self._sums = torch.zeros(shape, dtype=pool.compute_dtype, device=pool.device)

    def add(self, name: str, gradient: Tensor) -> None:
        """Contract the gradient (*S) of one parameter, or a part of it, with its task vectors."""
        flat, pool, segments = gradient.reshape(-1), self._pool, self._index.segments[name]
        with _engine(pool.device) as threads:
            factors = merge_low_rank.factors_of(pool, name, segments)
            if factors is not None:
                whole, segments = _divided(factors, segments)
                whole_gradient = flat.to(self._sums)
                with use_threads(threads):
                    for segment in whole:
                        merge_low_rank.pull_back_segment(self._sums, whole_gradient, factors, segment)
            for tile in _tiles(segments, pool.device):
                _pull_back_tile(self._sums, flat, pool.tile(name, tile.start, tile.stop, reuse=True), tile)

    @contextmanager
    def collect(
        self, leaves: Mapping[str, Tensor], also: Callable[[str, Tensor], None] | None = None
    ) -> Iterator[None]:
        """Contract and drop each leaf's gradient the moment a backward pass inside the block completes it.

        So the gradients of a whole model never exist at once, and each is still in the cache when used.
        ``also`` sees each name and gradient (*S) before it is dropped.
        """

        def arrived(name: str, leaf: Tensor) -> None:
            if leaf.grad is not None:
                self.add(name, leaf.grad)
                if also is not None:
                    also(name, leaf.grad)
                leaf.grad = None

        handles = [leaf.register_post_accumulate_grad_hook(partial(arrived, name)) for name, leaf in leaves.items()]
        try:
            yield
            for name, leaf in leaves.items():  # reached by an earlier backward pass only
                arrived(name, leaf)
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> Tensor:
        """Return the sum so far, dL/dlambda (E, G)."""
        return self._sums.t().contiguous()


@contextmanager
def _engine(device: torch.device) -> Iterator[int]:
    """Run a pass: without autograd, in full precision, and on one thread; yields the number of threads outside.

    One thread already saturates memory on a small machine, and waiting for the others at the end of
    every tile costs more than they help, most of all where other processes compete for them.
    """
    threads = torch.get_num_threads()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), exact_products(), use_threads(1):
        yield threads


def _divided(factors: Factors, segments: tuple[Segment, ...]) -> tuple[list[Segment], tuple[Segment, ...]]:
    """Divide segments into those that the factored form takes, and those whose groups end within a row."""
    width = factors.down.shape[1]
    fitting = [segment for segment in segments if merge_low_rank.fits(segment, width)]
    return fitting, tuple(segment for segment in segments if not merge_low_rank.fits(segment, width))


def _tiles(segments: tuple[Segment, ...], device: torch.device) -> Iterator[Segment]:
    """Cut segments into pieces of at most about ``CACHED`` entries, along their outermost axis."""
    limit = CACHED if device.type == "cpu" else _TILE_OF_ACCELERATORS
    for segment in segments:
        start, outer, groups, inner, first, _ = segment
        if outer * groups * inner <= limit:
            yield segment
        elif outer > 1:
            step = max(1, limit // (groups * inner))
            for i in range(0, outer, step):
                count = min(step, outer - i)
                yield Segment(start + i * groups * inner, count, groups, inner, first)
        elif groups > 1 and inner <= limit:
            step = limit // inner
            for i in range(0, groups, step):
                yield Segment(start + i * inner, 1, min(step, groups - i), inner, first + i)
        else:
            for k in range(groups):
                for i in range(0, inner, limit):
                    yield Segment(start + k * inner + i, 1, 1, min(limit, inner - i), first + k)


def _merge_tile(target: Tensor, base: Tensor, tau: Tensor, tile: Segment, weights: Tensor) -> None:
    """Write one tile of the merge; ``tau`` is (E, entries of the tile), ``weights`` (G, E)."""
    out, start = target[tile.start : tile.stop], base[tile.start : tile.stop]
    weights = weights[tile.first : tile.first + tile.groups]
    if tile.groups == 1:
        torch.addmv(start, tau.t(), weights[0], out=out)
    elif _is_batch(tile, tau):
        rows = (tile.groups, 1, tile.inner)
        tau = tau.view(-1, tile.groups, tile.inner).transpose(0, 1)  # (groups, E, inner)
        torch.baddbmm(start.view(rows), weights.unsqueeze(1), tau, out=out.view(rows))
    else:
        block = (tile.outer, tile.groups, tile.inner)
        start, out = start.view(block), out.view(block)
        for task_vector, weight in zip(tau, weights.t().contiguous(), strict=True):
            torch.addcmul(start, task_vector.view(block), weight.unsqueeze(1), out=out)
            start = out


def _pull_back_tile(result: Tensor, gradient: Tensor, tau: Tensor, tile: Segment) -> None:
    """Add one tile's inner products to ``result`` (G, E); ``tau`` is (E, entries of the tile)."""
    piece = gradient[tile.start : tile.stop].to(tau.dtype)
    result = result[tile.first : tile.first + tile.groups]
    if tile.groups == 1:
        torch.addmv(result[0], tau, piece, out=result[0])
    elif _is_batch(tile, tau):
        tau = tau.view(-1, tile.groups, tile.inner).permute(1, 2, 0)  # (groups, inner, E)
        result.unsqueeze(1).baddbmm_(piece.view(tile.groups, 1, tile.inner), tau)
    else:
        block = (tile.outer, tile.groups, tile.inner)
        result += (tau.view(-1, *block) * piece.view(block)).sum((1, 3)).t()


def _is_batch(tile: Segment, tau: Tensor) -> bool:
    """Whether a tile is best seen as one product per group.

    Never on accelerators: a batched product may round to TensorFloat-32 there, broadcasting does not.
    """
    return tile.outer == 1 and tile.inner >= _SHORT and tau.device.type == "cpu"


class _Merge(torch.autograd.Function):
    """The merge as a differentiable function of the coefficients, for plain autograd use."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, pool: ExpertPool, index: GroupIndex) -> tuple[Tensor, ...]:
        ctx.pool, ctx.index = pool, index
        ctx.set_materialize_grads(False)
        out = {name: torch.empty_like(tensor) for name, tensor in pool.base.items()}
        merge_into(out, pool, index, values)
        return tuple(out.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None]:
        named = dict(zip(ctx.pool.names, gradients, strict=True))
        return pull_back(ctx.pool, ctx.index, named), None, None


def state_dict_of(pool: ExpertPool, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict for export: every key of the base, with its key names and dtypes, on the CPU.

    Args:
        pool: Its base says what does not merge.
        parameters: Every parameter of the pool by name, (*S).
    """
    merged = (
        (key, parameters[name].detach().to("cpu", pool.source.spec(key)[1]))
        for name, keys in keys_by_name(pool).items()
        for key in keys
    )
    return in_order(pool, chain(merged, fixed_tensors(pool)))


def in_order(pool: ExpertPool, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors by key, each key of the base's file once, in the order of that file."""
    by_key = dict(tensors)
    return {key: by_key[key] for key in pool.source.keys}


def keys_by_name(pool: ExpertPool) -> dict[str, list[str]]:
    """Return the keys in the base's file of each parameter that merges: its own, then those of what is tied to it."""
    keys = {name: [pool.keys.file_key(name)] for name in pool.names}
    for alias, name in pool.tied.items():
        if name in keys and alias in pool.keys:
            keys[name].append(pool.keys.file_key(alias))
    return keys


def fixed_tensors(pool: ExpertPool) -> Iterator[tuple[str, Tensor]]:
    """Yield key and tensor, a copy, of what does not merge, as the base's file has it."""
    merged = {key for keys in keys_by_name(pool).values() for key in keys}
    yield from ((key, pool.source.get(key).clone()) for key in pool.source.keys if key not in merged)


def merged_tensors(pool: ExpertPool, coefficients: Coefficients) -> Iterator[tuple[str, Tensor]]:
    """Yield the merge for export one tensor after the other: key in the base's file and tensor, as :func:`merge` says.

    Args:
        pool: Base and task vectors; where it keeps nothing in memory, this holds one parameter.
        coefficients: Made for this pool.
    """
    coefficients.check(pool)
    values = coefficients().detach().cpu().double()
    for name, keys in keys_by_name(pool).items():
        merged = pool.base[name].cpu().to(torch.float64, copy=True).view(-1)
        segments = coefficients.index.segments[name]
        if segments and segments[0].directions:
            _merge_directions(merged, pool, name, segments[0], values)
            segments = ()
        for tile in _tiles(segments, torch.device("cpu")):
            block = (tile.outer, tile.groups, tile.inner)
            out = merged[tile.start : tile.stop].view(block)
            tau = pool.exact_tile(name, tile.start, tile.stop)
            for task_vector, weight in zip(tau, values, strict=True):
                out += task_vector.view(block) * weight[tile.first : tile.first + tile.groups, None]
        merged = merged.view(pool.shapes[name])
        yield from ((key, merged.to(pool.source.spec(key)[1])) for key in keys)
    yield from fixed_tensors(pool)


def _merge_directions(merged: Tensor, pool: ExpertPool, name: str, segment: Segment, values: Tensor) -> None:
    """Add a parameter's scaled directions to ``merged`` (n,), in one product on one thread."""
    factors = pool.factors(name, segment.directions)
    assert factors is not None
    with use_threads(1):
        exact = factors.to(merged.device, merged.dtype)
        merge_low_rank.merge_segment(merged, merged.clone(), exact, segment, values.t())
