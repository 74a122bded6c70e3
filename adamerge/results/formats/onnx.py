"""One ONNX graph of the merged encoder and all heads, checked with onnxruntime."""

import contextlib
import importlib.util
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamerge import __version__
from adamerge.errors import InputError
from adamerge.results.formats.merged import MergedFolder, Usage, check_equal, example
from adamerge.results.formats.torchvision import preprocessing_of
from adamerge.system.files import save_json
from adamerge.system.progress import only_errors

WEIGHTS = "model.onnx"
EXTERNAL = f"{WEIGHTS}.data"  # what the exporter calls it
INPUT = "images"
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_LIMIT = 1_900_000_000  # bytes; a protobuf file holds less than 2 GiB
_TOLERANCE = 5e-4  # of the largest logit: kernels of another library, and folded constants


class Classifiers(nn.Module):
    """An encoder and heads as one function.

    Args:
        encoder: Inputs (B, ...) to features (B, F).
        heads: Features to logits (B, C), one for each output.
    """

    def __init__(self, encoder: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(heads)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return each head's logits."""
        features = self.encoder(images)
        return tuple(head(features) for head in self.heads)


def write(merged: MergedFolder, folder: Path) -> Usage:
    """Write the graph: input ``images`` (batch, ...), one output (batch, classes) named after each task.

    Raises:
        InputError: If a package is not installed, or no heads lie beside the merge.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'--to onnx: {", ".join(missing)} not installed: pip install "adamerge[onnx]".')
    if not merged.heads:
        raise InputError(
            f"--to onnx: {merged.folder}: no heads.safetensors, so that there are no logits to put out. Expected the "
            "folder of a run, or of a merge by a rule that reads data."
        )
    if INPUT in merged.heads:
        raise InputError(f"--to onnx: a task is called {INPUT!r}, as the graph's input is; rename it.")
    module, images = _module(merged), example(merged.backbone, 2)
    sidecar = merged.backbone.sidecar()
    preprocessing = sidecar["preprocess_cfg"] if sidecar else preprocessing_of(merged.backbone.preprocess())
    classes = {task: (merged.info.get(task) or {}).get("classes") for task in merged.heads}
    save_json(classes, folder / "classes.json")
    save_json(preprocessing, folder / "preprocessing.json")
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    program = _exported(module, images, list(merged.heads))
    facts = {"classes": classes, "preprocessing": preprocessing}
    texts = {key: json.dumps(fact, ensure_ascii=False) for key, fact in facts.items()}
    program.model.metadata_props.update({"adamerge": __version__, **texts})
    program.save(str(folder / WEIGHTS), external_data=size > _LIMIT)
    shape = f"(batch, {', '.join(map(str, images.shape[1:]))})"
    files = {
        WEIGHTS: f"the graph; input `{INPUT}` {shape}, an output of logits for each task",
        "classes.json": "class names by task, in the order of the logits",
        "preprocessing.json": "what images go through",
    }
    if (folder / EXTERNAL).is_file():
        files[EXTERNAL] = f"its weights, which have to lie beside {WEIGHTS}"
    options = {"task": repr(next(iter(merged.heads))), "shape": shape}
    return Usage("onnx", "image-classification", files, preprocessing, options=options)


def prove(merged: MergedFolder, folder: Path) -> None:
    """Run the graph in onnxruntime on batches of two sizes, and compare the logits of every task.

    Raises:
        GuardError: If they differ.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / WEIGHTS), providers=["CPUExecutionProvider"])
    module = _module(merged)
    for count in (1, 3):
        images = example(merged.backbone, count, seed=count)
        outputs = session.run(list(merged.heads), {INPUT: images.numpy()})
        with torch.no_grad():
            expected = module(images)
        for task, output, reference in zip(merged.heads, outputs, expected, strict=True):
            check_equal(torch.from_numpy(output), reference, f"{WEIGHTS}, task {task!r}, in onnxruntime", _TOLERANCE)


def _module(merged: MergedFolder) -> Classifiers:
    return Classifiers(merged.encoder(), [merged.head(task) for task in merged.heads]).eval()


def _exported(module: nn.Module, images: Tensor, outputs: list[str]) -> Any:
    """Export without the exporter's progress and its advice to other programs."""
    with (
        only_errors("torch.onnx"), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad()
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            module, (images,), input_names=[INPUT], output_names=outputs,
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}}, dynamo=True, verbose=False,
        )  # fmt: skip
