"""The folder of any model of transformers: what its Auto classes load, and serving engines with them."""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.backbones import Transformers
from adamerge.backbones.file_names import network_names
from adamerge.backbones.networks import new_network
from adamerge.checkpoints.model_folder import HF_CONFIG, find_model
from adamerge.checkpoints.writing import save_state_dict
from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.results.formats.merged import MergedFolder, Usage, check_equal
from adamerge.results.model_writer import DEQUANTIZED, FOLDER, write_model
from adamerge.system.reading import read_json_mapping

log = logging.getLogger(__name__)

PROMPT = "The merged model says"
_TOKENS = 8  # of the generation that shows the model working
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForMaskedLM": "fill-mask",
    "ForObjectDetection": "object-detection",
}


def write(merged: MergedFolder, folder: Path, task: str | None = None) -> Usage:
    """Write the folder; with ``task`` the network with that task's own head, else what the base is.

    Raises:
        InputError: If there is no such head.
    """
    backbone = _backbone(merged)
    beside = merged.folder / FOLDER  # which has the tokenizer that goes with the vocabulary
    base = beside if (beside / HF_CONFIG).is_file() else backbone.folder
    weights, changes = merged.path, dict[str, Any]()
    if task is not None:
        weights = folder / "merged.safetensors"
        save_state_dict(_with_head(merged, backbone, task), weights)
        changes = _of_task(merged, backbone, task)
    files = write_model(weights, base, folder, changes=changes)
    if task is not None:
        weights.unlink()
    if backbone.is_rearranged:
        files = _saved_by_library(merged, folder, files)
    name = str((read_json_mapping(folder / HF_CONFIG).get("architectures") or ["AutoModel"])[0])
    pipeline = next((kind for end, kind in _PIPELINES.items() if name.endswith(end)), "feature-extraction")
    has_tokenizer = any(file.startswith("tokenizer") for file in files)
    options = {"class": name, "has_tokenizer": has_tokenizer, "prompt": PROMPT}
    notes: tuple[str, ...] = ()
    if merged.heads and task is None and backbone.head_module is not None:
        notes = (
            f"Each task's own {backbone.head_module.path} is in heads.safetensors; --task TASK writes one with it.",
        )
    if source := getattr(backbone.config, DEQUANTIZED, None):
        notes += (f"The base's weights are those of `{source['file']}` dequantised: task vectors are ways from these.",)
    return Usage("transformers", pipeline, files, {}, notes, options)


def _saved_by_library(merged: MergedFolder, folder: Path, files: Mapping[str, str]) -> dict[str, str]:
    """Write the weights of a folder again, as the library keeps them in files, where it rearranges them in memory."""
    written = Transformers(model=folder)
    network: Any = new_network(written.network_class, written.config)
    network.load_state_dict({key: merged.checkpoint.get(key) for key in merged.checkpoint.keys}, False, assign=True)
    network.tie_weights()
    for weights in folder.glob("model*.safetensors*"):
        weights.unlink()
    config = (folder / HF_CONFIG).read_bytes()
    with quiet():
        network.save_pretrained(folder, max_shard_size="5GB")
    (folder / HF_CONFIG).write_bytes(config)
    others = {file: text for file, text in files.items() if not file.startswith("model")}
    return {**others, **{path.name: "the merged weights" for path in sorted(folder.glob("model*.safetensors*"))}}


def _backbone(merged: MergedFolder) -> Transformers:
    if not isinstance(merged.backbone, Transformers):
        raise InputError(f"{merged.path}: not weights of a model of transformers.")
    return merged.backbone


def _with_head(merged: MergedFolder, backbone: Transformers, task: str) -> dict[str, Tensor]:
    """Return the merged tensors and a task's own head, by the network's names."""
    head = backbone.head_module
    if head is None or task not in merged.heads:
        raise InputError(
            f"--task {task}: expected a task that has a head of its own, {shorten(merged.heads) or 'none'}, "
            f"found {task!r}.{did_you_mean(task, merged.heads)}"
        )
    names = {key: name for key, name in backbone.names.items() if name not in head.names}
    tensors = {name: merged.checkpoint.get(key) for key, name in names.items() if key in set(merged.checkpoint.keys)}
    dtype = next(iter(tensors.values())).dtype
    for name, tensor in merged.heads[task].items():
        tensors[head.name_of(name)] = tensor.to(dtype)
    return tensors


def _of_task(merged: MergedFolder, backbone: Transformers, task: str) -> dict[str, Any]:
    """Return what the configuration says of a task's head."""
    head = backbone.head_module
    assert head is not None
    last = list(merged.heads[task].values())[-1]
    names = (merged.info.get(task) or {}).get("classes") or [f"LABEL_{i}" for i in range(len(last))]
    labels = {str(i): str(name) for i, name in enumerate(names)}
    ids = {name: int(i) for i, name in labels.items()}
    return {"architectures": [backbone.class_name], "id2label": labels, "label2id": ids}


def prove(merged: MergedFolder, folder: Path, task: str | None = None) -> None:
    """Load the folder in transformers, compare its outputs with the merge's, and let it say something.

    Raises:
        GuardError: If they differ.
    """
    if importlib.util.find_spec("transformers") is None:
        log.warning('transformers is not installed, so the folder was not loaded back: pip install "adamerge[hf]".')
        return
    backbone = Transformers(model=folder)
    with quiet():
        loaded: Any = backbone.network_class.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        inputs = _example(backbone, loaded)
        with torch.no_grad():
            outputs = _first(loaded(**inputs))
            expected = _first(_own(backbone, folder, loaded)(inputs))
    check_equal(outputs, expected, f"{folder.name} in transformers")
    if loaded.can_generate() and "input_ids" in inputs:
        _generate(backbone, loaded, inputs)


def _own(backbone: Transformers, folder: Path, loaded: Any) -> Callable[[Mapping[str, Tensor]], Any]:
    """Return the network on the folder's weights as they are read here; what a file lacks is the loaded model's."""
    network = new_network(backbone.network_class, backbone.config)
    checkpoint = find_model(folder, lambda _: True).checkpoint
    wanted = dict(network.named_parameters(remove_duplicate=False))
    names = network_names(network, checkpoint.keys, {**wanted, **dict(network.named_buffers())})
    own = {name: checkpoint.get(key).float() for key, name in names.items() if name in wanted}
    tensors = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers()), **own}
    return lambda inputs: torch.func.functional_call(network, tensors, kwargs=dict(inputs), tie_weights=True)


def _example(backbone: Transformers, loaded: Any) -> dict[str, Tensor]:
    """Return a batch of one prompt or image; the library's own example where the folder has no tokenizer."""
    from PIL import Image

    is_image = loaded.main_input_name == "pixel_values"
    try:
        sample = backbone.preprocess()(Image.new("RGB", (64, 48), (200, 80, 20)) if is_image else PROMPT)
    except InputError:
        if is_image:
            size = getattr(loaded.config, "image_size", 64)
            return {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))}
        return {key: value for key, value in loaded.dummy_inputs.items() if isinstance(value, Tensor)}
    return {key: tensor.unsqueeze(0) for key, tensor in sample.items() if not key.startswith("_")}


def _first(output: Any) -> Tensor:
    """Return the first tensor of a network's result that is no loss."""
    values = output.to_tuple() if hasattr(output, "to_tuple") else (output,)
    return next(value for value in values if isinstance(value, Tensor) and value.ndim)


def _generate(backbone: Transformers, loaded: Any, inputs: Mapping[str, Tensor]) -> None:
    """Let the model go on with the prompt, greedily, and log what it says."""
    given = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
    with torch.no_grad():
        ids = loaded.generate(**given, max_new_tokens=_TOKENS, do_sample=False)[0]
    said = ids if loaded.config.is_encoder_decoder else ids[given["input_ids"].shape[1] :]
    try:
        text = backbone.preprocess().tokenizer.decode(said, skip_special_tokens=True)  # type: ignore[attr-defined]
    except InputError:
        text = " ".join(map(str, said.tolist()))
    log.info("Generated greedily after %r: %r", PROMPT, text)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and reports while weights are loaded."""
    from transformers.utils import logging as told

    level, shown = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(level)
        if shown:
            told.enable_progress_bar()
