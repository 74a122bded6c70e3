"""The command ``adamerge convert SOURCE --to open_clip|hf``: a CLIP's folder in the other library's format."""

from pathlib import Path

from adamerge.backbones import OpenClip
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.clip_configs import to_open_clip
from adamerge.checkpoints.clip_names import as_own, as_theirs
from adamerge.checkpoints.model_folder import HF_CONFIG, OPEN_CLIP_CONFIG, find_model
from adamerge.checkpoints.writing import save_state_dict
from adamerge.errors import InputError
from adamerge.results.formats import hugging_face, open_clip
from adamerge.system.files import atomic_folder, save_json
from adamerge.system.reading import read_json_mapping

TARGETS = {"open_clip": "open_clip", "hf": "Hugging Face"}


def convert_model(source: Path, target: str, out: Path) -> list[Path]:
    """Write a CLIP in another library's format, and compare what both compute.

    Args:
        source: A folder of Hugging Face's or open_clip's; for a file of weights alone any checkpoint of theirs.
        target: One of :data:`TARGETS`.
        out: A new folder; or ``NAME.safetensors``, for the weights alone.

    Returns:
        The files.

    Raises:
        FileNotFoundError: If there is no such source.
        InputError: If it is in the format already, or the other cannot hold it.
        GuardError: If the two compute something else.
    """
    model = find_model(source)
    is_theirs = model.is_hugging_face
    if is_theirs == (target == "hf"):
        raise InputError(f"{source}: has the names of {TARGETS[target]} already; nothing to convert.")
    seen: Checkpoint = as_own(model.checkpoint) if is_theirs else as_theirs(model.checkpoint)
    if out.suffix == ".safetensors":
        if out.exists():
            raise InputError(f"--out {out}: expected a new file, found one. Choose another, or remove it.")
        save_state_dict({key: seen.get(key) for key in seen.keys}, out)
        return [out]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: expected a new folder, or a file NAME.safetensors; found one with content.")
    if model.config_file is None:
        raise InputError(
            f"{source}: no {HF_CONFIG if is_theirs else OPEN_CLIP_CONFIG} beside it, which says what model it is. Name "
            "its folder, or give --out NAME.safetensors for the weights alone."
        )
    beside = model.config_file.parent
    with atomic_folder(out.absolute()) as folder:
        if is_theirs:
            preprocessor = beside / "preprocessor_config.json"
            settings = read_json_mapping(preprocessor) if preprocessor.is_file() else {}
            config = to_open_clip(read_json_mapping(model.config_file), settings, str(model.config_file))
            save_json(config, folder / OPEN_CLIP_CONFIG)
            save_state_dict({key: seen.get(key) for key in seen.keys}, folder / open_clip.WEIGHTS)
            hugging_face.prove_model(OpenClip(str(folder)), seen, beside)
        else:
            backbone = OpenClip(str(beside))
            hugging_face.write_model(model.checkpoint, backbone.sidecar(), str(source), folder)
            hugging_face.write_tokenizer(backbone.sidecar(), folder)
            hugging_face.prove_model(backbone, model.checkpoint, folder)
    return sorted(path for path in out.rglob("*") if path.is_file())
