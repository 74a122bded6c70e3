"""A merge of models that transformers wrote, as a folder that it loads: the base's files around the merged weights.

Only torch and safetensors are needed: weights keep the base's names, and configuration, tokenizer and processors are
the base's, so that what loads the base loads the merge.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint, drop_mapped_pages, open_checkpoint
from adamerge.checkpoints.model_folder import HF_CONFIG
from adamerge.checkpoints.writing import nbytes, save_tensors
from adamerge.system.files import atomic_path, check_space, save_json
from adamerge.system.reading import read_json_mapping

FOLDER = "model"  # beside a merged checkpoint
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DEQUANTIZED = "dequantized_from"  # of a configuration: the GGUF file whose weights the folder has
TOKENIZER_CONFIG = "tokenizer_config.json"
SHARD_BYTES = 5_000_000_000
_COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_TOKENIZER = ("token", "vocab", "merges", "spiece", "sentencepiece", "special_", "chat_template", ".tiktoken")
_LEFT_OUT = (  # of the base's folder: weights, other libraries', and what a training has left there
    *("config.json", "open_clip_config.json", "adapter_config.json", "trainer_state.json", "training_args.json"),
    *("all_results.json", "train_results.json", "eval_results.json", "adamerge.json", "merge.json", "requirements.txt"),
)


def folder_of(checkpoint: Checkpoint) -> Path | None:
    """Return the folder of transformers that a base's weights lie in; None where there is none.

    A CLIP that is seen under open_clip's names has none either: its merge has those names.
    """
    path = Path(checkpoint.name)
    if not path.is_file() or getattr(checkpoint, "config_file", None) is not None:
        return None
    config = path.parent / HF_CONFIG
    return path.parent if config.is_file() and "model_type" in read_json_mapping(config) else None


def write_model(
    merged: Path,
    base: Path,
    folder: Path,
    *,
    tokenizer: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write configuration, weights, tokenizer, processors and generation settings.

    Args:
        merged: The merged checkpoint, under the base's names.
        base: The base's folder.
        folder: Where to write; made if needed.
        tokenizer: Another folder, whose tokenizer it is.
        changes: Options of the configuration that are not the base's.
        shard_bytes: Most bytes of a file of weights.

    Returns:
        File name to what it holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    checkpoint = open_checkpoint(merged)
    files = {HF_CONFIG: "the architecture", **_write_weights(checkpoint, merged, folder, shard_bytes)}
    for source in _beside(base, tokenizer):
        copy_portable(source, folder)
        files[source.name] = "the base's" if source.parent == base else f"the expert's in {source.parent.name}"
    save_json(_config(read_json_mapping(base / HF_CONFIG), checkpoint, changes or {}), folder / HF_CONFIG)
    return files


def copy_portable(source: Path, folder: Path) -> None:
    """Copy a file; a tokenizer's settings so that transformers 4 reads them, which lacks the class that 5 names."""
    if source.name == TOKENIZER_CONFIG:
        settings = read_json_mapping(source)
        if settings.get("tokenizer_class") == "TokenizersBackend":
            extra = settings.pop("extra_special_tokens", None)
            if isinstance(extra, list):
                settings["additional_special_tokens"] = extra
            save_json({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}, folder / source.name)
            return
    with atomic_path(folder / source.name) as temporary:
        shutil.copyfile(source, temporary)


def _config(content: Mapping[str, Any], checkpoint: Checkpoint, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base's configuration with the dtype of the merged weights, and without code or paths."""
    left_out = ("_name_or_path", "auto_map", DEQUANTIZED)
    config = {key: value for key, value in content.items() if key not in left_out}
    of_texts = isinstance(config.get("text_config"), dict) and "vocab_size" not in config
    for key, value in changes.items():
        place = config["text_config"] if of_texts and key == "vocab_size" else config
        place[key] = value
    dtypes = [dtype for key in checkpoint.keys for dtype in [checkpoint.spec(key)[1]] if dtype.is_floating_point]
    if dtypes:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
    return config


def _beside(base: Path, tokenizer: Path | None) -> Iterator[Path]:
    """Yield the files that a loader reads besides configuration and weights; code is none of them."""
    for path in sorted(base.iterdir()):
        is_text = path.suffix in _COPIED and path.name not in _LEFT_OUT and not path.name.endswith(".index.json")
        if path.is_file() and is_text and not (tokenizer and _is_of_tokenizer(path)):
            yield path
    for path in sorted(tokenizer.iterdir()) if tokenizer else ():
        if path.is_file() and path.suffix in _COPIED and _is_of_tokenizer(path):
            yield path


def _is_of_tokenizer(path: Path) -> bool:
    return any(part in path.name for part in _TOKENIZER)


def _read(checkpoint: Checkpoint, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of a file, of which no page stays in memory."""
    for key in keys:
        yield key, checkpoint.get(key)
        drop_mapped_pages()


def _write_weights(checkpoint: Checkpoint, merged: Path, folder: Path, shard_bytes: int) -> dict[str, str]:
    """Write the weights into one file, a hard link where possible, or into several with an index."""
    shards: list[dict[str, int]] = [{}]
    for key in checkpoint.keys:
        size = nbytes(checkpoint.spec(key))
        if shards[-1] and sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][key] = size
    if len(shards) == 1:
        with atomic_path(folder / WEIGHTS) as temporary:
            try:
                os.link(merged, temporary)
            except OSError:  # another file system, or one without links
                shutil.copyfile(merged, temporary)
        return {WEIGHTS: "the merged weights"}
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    check_space(folder, sum(size for shard in shards for size in shard.values()))
    for name, shard in zip(names, shards, strict=True):
        save_tensors({key: checkpoint.spec(key) for key in shard}, _read(checkpoint, shard), folder / name)
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(size for shard in shards for size in shard.values())
    save_json({"metadata": {"total_size": total}, "weight_map": places}, folder / INDEX)
    return {**dict.fromkeys(names, "the merged weights"), INDEX: "which tensor is in which file"}
