"""How an encoder runs: on whose parameters, which tasks in one pass, what is kept, recomputed or compiled."""

import os
import shutil
import sys
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.checkpoint import checkpoint

from adamerge.data.batch import Inputs, kind, of_network, size
from adamerge.errors import InputError, check_choice, check_globs, did_you_mean, shorten
from adamerge.model.half_products import half_products
from adamerge.model.hidden_layers import Hooks, is_inside, matching, outermost, select
from adamerge.model.quantized import PACKAGES, check_quantized
from adamerge.pool.pool import ExpertPool

MicroBatch = int | Literal["auto"] | None
Run = Callable[[nn.Module, Inputs, tuple[str, ...], Mapping[str, Any]], tuple[Any, dict[str, Any]]]
_FUSED_ENTRIES = 1 << 22  # of the inputs of one fused pass on a CPU: 27 images of 224 x 224


@dataclass(frozen=True)
class EncoderOptions:
    """How a step runs the encoder; none of them changes the result by more than rounding.

    Args:
        checkpoint: Modules whose activations are recomputed in the backward pass, by path or glob; True for the
            members of the outermost ``Sequential`` and ``ModuleList`` (the blocks of a transformer, the stages of a
            ResNet).
        channels_last: Whether images enter with their channels innermost, as convolutions on GPUs like them.
        compile: Whether ``torch.compile`` compiles the forward pass; or the name of one of its backends.
        engine: ``merged``: a step runs on merged weights. ``beside``: on the base's, and adapters (LoRA experts) are
            added beside them, without a gradient of a weight's size (:mod:`adamerge.model.beside`). ``auto``: beside
            where experts, granularity and options allow it.
        compute_dtype: ``bfloat16``: merged weights with two or more dimensions are rounded to that after the merge has
            summed in float32, and passes run under autocast, which then casts no weight. Gradients of the weights come
            in it; what is summed over them, and coefficients, stay in float32.
        base_dtype: ``int8`` or ``nf4``: beside, the base's linear weights that have adapters beside them are held in
            that.

    Raises:
        InputError: If an option has another value, or there is no compiler for ``compile``.
    """

    checkpoint: bool | Sequence[str] = False
    channels_last: bool = False
    compile: bool | str = False
    engine: Literal["merged", "beside", "auto"] = "merged"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    base_dtype: Literal["float32", "int8", "nf4"] = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, bool):
            check_globs("encoder.checkpoint", self.checkpoint)
        check_choice("encoder.channels_last", self.channels_last, (True, False))
        check_choice("encoder.engine", self.engine, ("merged", "beside", "auto"))
        check_choice("encoder.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        check_choice("encoder.base_dtype", self.base_dtype, ("float32", *PACKAGES))
        if self.base_dtype in PACKAGES:
            check_quantized(self.base_dtype, self.engine)
        if self.engine == "beside" and self.dtype is not None:
            raise InputError(
                "encoder.compute_dtype: bfloat16 is of merged weights, and encoder.engine=beside merges none. Leave "
                "one of the two out."
            )
        if self.engine == "beside" and self.backend is not None:
            raise InputError(
                "encoder.engine: compiled code does not follow beside. Set encoder.compile=false, or merged."
            )
        if self.backend is not None:
            _check_backend(self.backend)

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype that merged weights are rounded to; None where they stay as they are computed."""
        return torch.bfloat16 if self.compute_dtype == "bfloat16" else None

    @property
    def backend(self) -> str | None:
        """The compiler; None where the encoder runs as it is."""
        if not isinstance(self.compile, bool):
            return self.compile
        return "inductor" if self.compile else None


class Runner:
    """Runs an encoder on batches, as the options say.

    Names and globs are looked up once, here; the encoder is changed only while a call lasts.

    Args:
        encoder: The module that every call gets.
        options: What is recomputed, and whether it is compiled.

    Raises:
        InputError: If ``checkpoint`` selects no module.
    """

    def __init__(self, encoder: nn.Module, options: EncoderOptions) -> None:
        self._options, self.dtype = options, options.dtype
        self._names = [name for name, _ in encoder.named_modules() if name]
        self._recomputed = {
            name: partial(checkpoint, encoder.get_submodule(name).forward, use_reentrant=False)
            for name in self._selected(encoder)
        }
        self._hooks: dict[tuple[str, ...], Hooks] = {}
        self._run: Run = _run
        if options.backend is not None:
            # torch.compile counts its recompilations by code object, so each encoder gets one of its own.
            function = types.FunctionType(_run.__code__.replace(), globals(), "run_encoder")
            self._run = torch.compile(function, backend=options.backend)

    def __call__(
        self, encoder: nn.Module, inputs: Inputs, hidden_layers: Sequence[str] = (), *, plain: bool = False
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return what the encoder returns, and the outputs of the modules that ``hidden_layers`` selects, by path.

        A path selects its module. A glob selects, of the modules it matches that run once with a tensor (B, ...), or
        with a tuple, list or ``ModelOutput`` that begins with one, the outermost.

        Args:
            encoder: As given before, with whatever parameters it has now.
            inputs: (B, ...).
            hidden_layers: Paths or globs.
            plain: Neither compile nor recompute: for passes that occur once.

        Raises:
            InputError: If one of ``hidden_layers`` selects no module, or one that cannot be seen in compiled code.
        """
        if self._options.channels_last:
            inputs = _channels_last(inputs)
        hooks = self._hooks_of(tuple(hidden_layers))
        run, recomputed = (_run, {}) if plain else (self._run, self._recomputed)
        with hooks.attached(encoder), _replaced(encoder, recomputed), self._mixed(inputs, plain):
            output, hidden = run(encoder, inputs, hooks.names, hooks.outputs)
        return output, hooks.chosen(hidden, size(inputs))

    @contextmanager
    def _mixed(self, inputs: Inputs, plain: bool) -> Iterator[None]:
        """Run under autocast to the dtype of the weights, or what the caller has set."""
        if self.dtype is None:
            yield
            return
        device = (inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))).device
        with torch.autocast(device.type, self.dtype), self.products(device, plain=plain)():
            yield

    def products(self, device: torch.device, *, plain: bool = False) -> Callable[[], AbstractContextManager[Any]]:
        """Return what makes the context that passes on a device multiply in; compiled ones do so by themselves."""
        is_compiled = self._options.backend is not None and not plain
        return nullcontext if is_compiled else partial(half_products, self.dtype, device)

    def _hooks_of(self, patterns: tuple[str, ...]) -> "Hooks":
        if patterns not in self._hooks:
            by_pattern = {pattern: matching(self._names, pattern, "hidden_layers") for pattern in patterns}
            names = [name for chosen in by_pattern.values() for name in outermost(chosen)]
            hidden = [name for name in names if any(is_inside(name, container) for container in self._recomputed)]
            if hidden and self._options.backend:
                raise InputError(
                    f"encoder.compile, encoder.checkpoint: the hidden layer {hidden[0]!r} lies inside a recomputed "
                    "module, and compiled code does not show it. Set one of the two to false, or choose other layers."
                )
            self._hooks[patterns] = Hooks(by_pattern)
        return self._hooks[patterns]

    def _selected(self, encoder: nn.Module) -> list[str]:
        """Return the paths of what is recomputed, leaving out what lies inside another of them."""
        option = self._options.checkpoint
        if isinstance(option, bool):
            paths = members(encoder) if option else []
            if option and not paths:
                raise InputError(
                    f"encoder.checkpoint: {type(encoder).__name__} has no Sequential or ModuleList whose members could "
                    f"be recomputed. Name modules: encoder.checkpoint=[...], of {shorten(self._names)}."
                )
        else:
            paths = [name for pattern in option for name in select(self._names, pattern, "encoder.checkpoint")]
        return [path for path in paths if not any(is_inside(path, container) for container in paths)]


def _run(
    encoder: nn.Module, inputs: Inputs, names: tuple[str, ...], outputs: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Run the encoder, and take what hooks have put into ``outputs``.

    By name: what a compiled function does not use of its arguments, it does not look at either, and would
    run the code of other hidden layers.
    """
    output = encoder(inputs) if isinstance(inputs, Tensor) else encoder(**of_network(inputs))
    return output, {name: outputs.get(name) for name in names}


def _channels_last(inputs: Inputs) -> Inputs:
    """Return inputs whose images (B, C, H, W) have their channels innermost."""
    if isinstance(inputs, Tensor):
        return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs
    changed = {key: _channels_last(tensor) for key, tensor in inputs.items() if tensor.is_floating_point()}
    return {**inputs, **changed}  # type: ignore[dict-item]


def embedding_width(encoder: nn.Module) -> int:
    """Return the width of the encoder's largest table of embeddings; 1 where it has none."""
    tables = [module for module in encoder.modules() if isinstance(module, nn.Embedding)]
    return max(tables, key=lambda table: table.weight.numel()).embedding_dim if tables else 1


@contextmanager
def _replaced(encoder: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Give modules other forward functions for a while."""
    with ExitStack() as stack:
        for name, forward in forwards.items():
            module = encoder.get_submodule(name)
            if "forward" in vars(module):
                stack.callback(setattr, module, "forward", module.forward)
            else:
                stack.callback(delattr, module, "forward")
            module.forward = forward
        yield


def members(encoder: nn.Module) -> list[str]:
    """Return the paths of the members, with parameters, of the outermost containers."""
    containers = [
        name for name, module in encoder.named_modules() if isinstance(module, (nn.Sequential, nn.ModuleList))
    ]
    return [
        f"{name}.{child}".lstrip(".")
        for name in outermost(containers)
        for child, module in encoder.get_submodule(name).named_children()
        if next(module.parameters(), None) is not None
    ]


def _check_backend(backend: object) -> None:
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend not in backends:
        raise InputError(
            f"encoder.compile: expected true, false or a backend of torch.compile, found {backend!r}."
            f"{did_you_mean(str(backend), backends)} Backends: {', '.join(torch.compiler.list_backends())}."
        )
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if backend == "inductor" and not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise InputError(
            f"encoder.compile: torch.compile needs a C++ compiler, and {compiler} is not installed. Install it "
            "(apt-get install g++), name another in the environment variable CXX, or set encoder.compile=false."
        )


def swapped(encoder: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> AbstractContextManager[None]:
    """Put other parameters and buffers into an encoder while a block lasts; all of them, if ``strict``.

    What ``torch.func.functional_call`` does for the time of a call; a block can hold backward passes, too, and blocks
    can be nested.
    """
    context: AbstractContextManager[None] = _reparametrize_module(
        encoder, dict(tensors), tie_weights=True, strict=strict
    )
    return context


class BatchFacts(NamedTuple):
    """What decides which tasks share a forward pass.

    Attributes:
        kind: Equal for batches that can be joined.
        size: Samples.
        entries: Of one sample: its floating-point entries, and the positions of its longest tensor of whole numbers
            (token ids) as many times as an embedding is wide. Pictures of bytes count as they are.
    """

    kind: Hashable
    size: int
    entries: int


def facts_of(inputs: Inputs, width: int = 1) -> BatchFacts:
    """Return the facts of a batch (B, ...), for an encoder whose embeddings have ``width`` entries."""
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    of_ids = [tensor for tensor in tensors if not tensor.is_floating_point() and tensor.ndim < 4]
    positions = max((tensor[:1].numel() for tensor in of_ids), default=0)
    entries = sum(tensor[:1].numel() for tensor in tensors if not any(tensor is ids for ids in of_ids))
    return BatchFacts(kind(inputs), size(inputs), entries + positions * width)


def fused(inputs: Mapping[str, Inputs], micro_batch: MicroBatch, width: int = 1) -> list[list[str]]:
    """Group tasks whose inputs agree in shape and dtype, so that one forward pass serves each group.

    Args:
        inputs: Task to inputs (B, ...).
        micro_batch: Most inputs in a group, in whole tasks; ``"auto"`` for a rule by size; None for no limit.
        width: Entries of an embedding, see :class:`BatchFacts`.
    """
    batches = {task: facts_of(batch, width) for task, batch in inputs.items()}
    tensors = (t for batch in inputs.values() for t in ([batch] if isinstance(batch, Tensor) else batch.values()))
    return grouped(batches, micro_batch, any(tensor.device.type == "cpu" for tensor in tensors))


def grouped(batches: Mapping[str, BatchFacts], micro_batch: MicroBatch, on_cpu: bool) -> list[list[str]]:
    """Group tasks by what is known of their batches.

    Small batches gain up to 3x from fusing. On a CPU large ones lose, once the activations of the
    whole group have left the cache: ``"auto"`` closes a group before its inputs exceed ``_FUSED_ENTRIES``.
    """
    kinds: dict[Hashable, list[list[str]]] = {}
    for task, batch in batches.items():
        groups = kinds.setdefault(batch.kind, [[]])
        limit: float = float("inf")
        if micro_batch == "auto" and on_cpu:
            limit = _FUSED_ENTRIES // max(1, batch.entries)
        elif isinstance(micro_batch, int):
            limit = micro_batch
        if groups[-1] and sum(batches[name].size for name in (*groups[-1], task)) > limit:
            groups.append([])
        groups[-1].append(task)
    return [group for groups in kinds.values() for group in groups]


def check_names(encoder: nn.Module, pool: ExpertPool) -> None:
    """Check once, before training, that the encoder's parameters are the pool's."""
    wanted = dict(encoder.named_parameters())
    every = dict(encoder.named_parameters(remove_duplicate=False))
    fixed = {name: tuple(tensor.shape) for name, tensor in pool.fixed.items() if name in every}
    have = {**pool.shapes, **fixed}  # what is fixed and not the encoder's, such as a classifier, is left out
    tied_in_pool = [name for name in every if name not in wanted and name in have]
    if tied_in_pool:
        raise InputError(
            f"The encoder ties {tied_in_pool[0]!r} to another parameter, but the pool merges it separately. "
            "Tie it in the pool too: 'pool.tied={ALIAS: NAME}', in Python tied={alias: name}."
        )
    missing = [name for name in wanted if name not in have]
    extra = [name for name in have if name not in wanted]
    if missing or extra:
        hint = did_you_mean(missing[0], extra) if missing else ""
        raise InputError(
            f"Encoder and pool differ: the pool lacks {len(missing)} of the encoder's parameters "
            f"({shorten(missing)}) and has {len(extra)} that the encoder lacks ({shorten(extra)}).{hint} "
            "Is the prefix of the encoder's keys given (backbone.prefix, in Python key_map), and are buffers left out "
            "(pool.exclude)?"
        )
    for name, shape in have.items():
        if tuple(wanted[name].shape) != shape:
            raise InputError(f"Parameter {name!r}: the encoder has {tuple(wanted[name].shape)}, the pool {shape}.")
