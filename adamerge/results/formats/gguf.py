"""The command ``adamerge convert FILE.gguf --out FOLDER``: llama.cpp's quantised file as a folder of transformers."""

import errno
import importlib.util
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adamerge.backbones.networks import check_numbers, check_size, new_network
from adamerge.checkpoints.model_folder import HF_CONFIG
from adamerge.errors import InputError, shorten
from adamerge.results.formats.export import check_new
from adamerge.results.formats.transformers import quiet
from adamerge.results.model_writer import DEQUANTIZED, TOKENIZER_CONFIG, copy_portable
from adamerge.system.files import atomic_folder, check_space, sha256
from adamerge.system.memory import free_memory
from adamerge.system.reading import open_regular

MAGIC = b"GGUF"
PROMPT = "The capital of France is"
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")  # as llama.cpp names them


def convert_gguf(source: Path, out: Path, dtype: str = "float32") -> tuple[list[Path], str]:
    """Write a GGUF file's model, dequantised, with its tokenizer; transformers reads the file.

    Args:
        source: The file. Those that lie beside it are not read.
        out: A new folder.
        dtype: Name of a dtype of torch, of the weights; float32 holds what the file says, as it is.

    Returns:
        The files; and what the model says after :data:`PROMPT`, greedily, so that a person sees that it works.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no GGUF file, transformers cannot read it, or it has no tokenizer.
        OSError: If the disk is too small.
    """
    check_new(out)
    if _PART.search(source.name):
        raise InputError(f"{source}: one part of several; join them: llama-gguf-split --merge FIRST_PART WHOLE.gguf.")
    with open_regular(source) as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise InputError(f"{source}: expected a GGUF file, which begins with GGUF; this one does not.")
    if absent := [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise InputError(f'{source}: reading GGUF takes {" and ".join(absent)}: pip install "adamerge[gguf]".')
    with TemporaryDirectory() as alone, _reading(source), quiet():
        place = Path(alone)
        (place / "model.gguf").symlink_to(source.resolve())
        network, tokenizer = _plain_network(source, place, getattr(torch, dtype), out)
    with atomic_folder(out.absolute()) as folder, _reading(source), quiet():
        network.save_pretrained(folder, max_shard_size="5GB")
        mode = (folder / HF_CONFIG).stat().st_mode
        for weights in folder.glob("model*.safetensors"):
            weights.chmod(mode)  # safetensors lets nobody else read what it writes
        tokenizer.save_pretrained(folder)
        copy_portable(folder / TOKENIZER_CONFIG, folder)
        text = _said(network, tokenizer)
    return sorted(path for path in out.rglob("*") if path.is_file()), text


def _plain_network(source: Path, folder: Path, dtype: torch.dtype, out: Path) -> tuple[Any, Any]:
    """Return a network of transformers with the file's weights, dequantised, and its tokenizer.

    The library keeps a network that it read from GGUF apart from others, and saves none: the weights go into a plain
    one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(folder, **options)
    check_numbers(config.to_dict(), source)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    kind = auto._model_mapping[type(config)]
    check_size(kind, config)
    plain: Any = new_network(kind, config)
    count = sum(parameter.numel() for parameter in plain.parameters())
    check_space(out, count * dtype.itemsize)
    if (needed := 4 * count) > (free := free_memory()):
        raise InputError(
            f"{source}: the library reads all weights in float32, which takes {needed / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB are free. Convert it on a larger machine."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    read, loading = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    if lacking := sorted(loading["missing_keys"]):  # which the library fills with random numbers
        raise InputError(f"{source}: holds no values for {shorten(lacking)}. Copy it again.")
    weights = {name: tensor.to(dtype) for name, tensor in read.state_dict().items() if tensor.is_floating_point()}
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    plain.config.architectures, plain.config.dtype = [kind.__name__], dtype
    setattr(plain.config, DEQUANTIZED, {"file": source.name, "sha256": sha256(source)})
    if read.can_generate():
        plain.generation_config = read.generation_config
    return plain, tokenizer


def _said(network: Any, tokenizer: Any) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        ids = network.generate(input_ids=inputs["input_ids"], max_new_tokens=8, do_sample=False)[0]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Turn whatever the library makes of a strange file into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        logging.getLogger(__name__).debug("transformers", exc_info=error)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{source}: transformers cannot read it: {reason}") from error
