"""What the benchmarks measure: the same optimizer step, formulated in several ways, and fair timing.

Legend: E experts, as many tasks; B images per task; L parameter tensors. All use layer-wise coefficients
(unless said otherwise), entropy minimisation and Adam. Values are random: arithmetic does not depend on them.
"""

import contextlib
import functools
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from adamerge import Coefficients, ExpertPool, MergedModel
from adamerge.model.encoder import EncoderOptions

Step = Callable[[], None]
CLASSES = 10


def vit_b_32() -> tuple[nn.Module, int]:
    """open_clip's ViT-B-32 image encoder (88 M parameters), and its image size."""
    return _clip({"embed_dim": 512, "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}})


def demo() -> tuple[nn.Module, int]:
    """The demo zoo's image encoder (0.5 M parameters), and its image size."""
    vision = {"image_size": 28, "patch_size": 7, "width": 96, "layers": 4, "head_width": 32}
    return _clip({"embed_dim": 64, "vision_cfg": vision})


def resnet50() -> tuple[nn.Module, int]:
    """torchvision's ResNet-50 without its classifier (23.5 M parameters), and its image size."""
    from torchvision import models

    torch.manual_seed(0)
    encoder = models.resnet50()
    encoder.fc = nn.Identity()
    return encoder.eval(), 224


MODELS = {"vit-b-32": vit_b_32, "demo": demo, "resnet50": resnet50}


def _clip(config: dict) -> tuple[nn.Module, int]:
    import open_clip  # imports slowly

    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 8, "width": 32, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(**config, text_cfg=text)
    return clip.visual.eval(), config["vision_cfg"]["image_size"]


def write_experts(encoder: nn.Module, folder: Path, count: int) -> tuple[Path, dict[str, Path]]:
    """Write a base and ``count`` experts as safetensors files; return what ``ExpertPool.from_files`` takes."""
    base = {name: parameter.detach() for name, parameter in encoder.named_parameters()}
    save_file(base, folder / "base.safetensors")
    paths = {f"task{e}": folder / f"task{e}.safetensors" for e in range(count)}
    for path in paths.values():
        save_file({name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in base.items()}, path)
    return folder / "base.safetensors", paths


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of predictions (B, C), in nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


@dataclass
class Work:
    """One problem: an encoder, its pool, a head and a batch (B, 3, S, S) for each task."""

    encoder: nn.Module
    pool: ExpertPool
    heads: dict[str, nn.Module]
    inputs: dict[str, Tensor]

    @classmethod
    def make(cls, encoder: nn.Module, size: int, pool: ExpertPool, images: int) -> "Work":
        """Make it on the device of the pool."""
        torch.manual_seed(1)
        encoder.to(pool.device)
        inputs = {task: torch.randn(images, 3, size, size).to(pool.device) for task in pool.expert_names}
        with torch.no_grad():
            features = encoder(inputs[pool.expert_names[0]][:1]).shape[1]
        heads = {task: nn.Linear(features, CLASSES).requires_grad_(False).to(pool.device) for task in pool.expert_names}
        return cls(encoder, pool, heads, inputs)

    def ours(self, granularity: str = "layer", encoder_options: EncoderOptions | None = None, **options) -> Step:
        """(a) This package's engine."""
        coefficients = Coefficients(self.pool, granularity, init=0.1)
        model = MergedModel(self.encoder, self.pool, coefficients, self.heads, options=encoder_options)
        model.to_device(self.pool.device)
        optimizer = torch.optim.Adam(coefficients.parameters(), lr=1e-3)

        def step() -> None:
            values = coefficients()
            with model.merged(values, **options) as merged:
                for group in merged.groups(self.inputs):
                    merged.backward(sum(entropy(outputs.logits) for outputs in merged(group).values()))
            values.backward(merged.gradient)
            optimizer.step()
            optimizer.zero_grad()
            coefficients.project()

        return step

    def naive(self) -> Step:
        """(b) AdaMerging's formula, the merged sum rebuilt inside every task's forward pass."""
        raw = self._coefficients()
        optimizer = torch.optim.Adam([raw], lr=1e-3)

        def step() -> None:
            for task, images in self.inputs.items():
                features = functional_call(self.encoder, self._merged(raw), (images,))
                entropy(self.heads[task](features)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def shared(self) -> Step:
        """(c) One merge per step whose graph is retained for every task's backward pass."""
        raw = self._coefficients()
        optimizer = torch.optim.Adam([raw], lr=1e-3)

        def step() -> None:
            merged = self._merged(raw)
            for task, images in self.inputs.items():
                entropy(self.heads[task](functional_call(self.encoder, merged, (images,)))).backward(retain_graph=True)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def floor(self) -> Step:
        """(d) No merging: forward and backward of the plain model per task, Adam on as many values as (a) has."""
        raw = self._coefficients()
        optimizer = torch.optim.Adam([raw], lr=1e-3)
        raw.grad = torch.zeros_like(raw)

        def step() -> None:
            self._plain_backward()
            optimizer.step()
            self.encoder.zero_grad()

        return step

    def fine_tuning(self) -> Step:
        """One step of fine-tuning all weights on the same batches, gradients summed over the tasks."""
        optimizer = torch.optim.Adam(self.encoder.parameters(), lr=0.0)

        def step() -> None:
            self._plain_backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def fusion_bench(self) -> Step:
        """(e) FusionBench's layer-wise wrapper through its public API, shared graph, as its own method drives it."""
        from copy import deepcopy

        from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel, get_layer_wise_weights

        experts = []
        for expert in self.pool.expert_names:
            experts.append(deepcopy(self.encoder))
            experts[-1].load_state_dict(self.pool.expert_parameters(expert), strict=False)
        weights = get_layer_wise_weights(len(experts), len(self.pool.names), 0.1)
        model = LayerWiseMergedModel(weights, deepcopy(self.encoder), experts)
        optimizer = torch.optim.Adam([model.merge_weight], lr=1e-3)

        def step() -> None:
            model.merge_weights()
            for task, images in self.inputs.items():
                entropy(self.heads[task](model(images))).backward(retain_graph=True)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def steps(
        self, granularities: list[str], micro_batch: int | str | None, rows: list[str] | None = None
    ) -> dict[str, Step]:
        """All formulations by name, or ``rows`` of them; FusionBench where it is installed."""
        first, *others = granularities
        makers: dict[str, Callable[[], Step]] = {
            "ours": lambda: self.ours(first, micro_batch=micro_batch),
            **{f"ours {g}": functools.partial(self.ours, g, micro_batch=micro_batch) for g in others},
            "naive": self.naive,
            "shared graph": self.shared,
            "floor": self.floor,
            "fine-tuning": self.fine_tuning,
        }
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("fusion_bench")
            makers["fusion-bench"] = self.fusion_bench
        return {name: make() for name, make in makers.items() if name in (rows or makers)}

    def _plain_backward(self) -> None:
        for task, images in self.inputs.items():
            entropy(self.heads[task](self.encoder(images))).backward()

    def _coefficients(self) -> Tensor:
        shape = len(self.pool.expert_names), len(self.pool.names)
        return torch.full(shape, 0.1, device=self.pool.device, requires_grad=True)

    def _merged(self, raw: Tensor) -> dict[str, Tensor]:
        merged = {}
        for layer, (name, tensor) in enumerate(self.pool.base.items()):
            for coefficient, task_vector in zip(raw[:, layer], self.pool.task_vectors(name), strict=True):
                tensor = tensor + coefficient * task_vector
            merged[name] = tensor
        return merged


def alternate(
    functions: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time functions in alternating order, after one warm-up each; seconds by name."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for function in functions.values():
        function()
    for repeat in range(repeats):
        for name in sorted(functions, reverse=bool(repeat % 2)):
            wait()
            start = clock()
            functions[name]()
            wait()
            seconds[name].append(clock() - start)
    return seconds


def under_autocast(steps: Mapping[str, Step], device: str, dtype: str | None) -> dict[str, Step]:
    """Run steps in mixed precision; as they are without a dtype."""
    if dtype is None:
        return dict(steps)
    return {name: torch.autocast(device, getattr(torch, dtype))(step) for name, step in steps.items()}


def median(values: list[float]) -> float:
    return statistics.median(values)


def copy_bandwidth(megabytes: int = 1024, repeats: int = 9) -> float:
    """Bytes per second, read and written, of one thread copying memory too large for any cache."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = alternate({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    finally:
        torch.set_num_threads(threads)
    return 2 * source.nbytes / median(seconds)


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    return {
        "processor": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def temporary_folder() -> TemporaryDirectory:
    return TemporaryDirectory(prefix="adamerge-benchmark-")
