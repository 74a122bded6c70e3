"""open_clip's tags: pretrained weights by name, from a local cache or, when a user asks for them, from the network."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamerge.errors import InputError, did_you_mean, shorten


@dataclass(frozen=True)
class Tag:
    """Pretrained weights that open_clip knows by name.

    Attributes:
        name: The tag.
        config: open_clip's entry: where the weights are, and how their images were preprocessed.
    """

    name: str
    config: Mapping[str, Any]

    @property
    def quick_gelu(self) -> bool:
        """Whether the weights were trained with QuickGELU."""
        return bool(self.config.get("quick_gelu", False))

    @property
    def preprocess(self) -> dict[str, Any]:
        """The preprocessing that the entry states."""
        return {key: value for key, value in self.config.items() if key not in ("url", "hf_hub", "quick_gelu")}

    @property
    def source(self) -> str:
        """Where the weights come from: a repository of the Hugging Face Hub, or an address."""
        return str(self.config.get("hf_hub") or self.config.get("url")).rstrip("/")

    def weights(self, *, download: bool) -> Path | None:
        """Return the weights' file.

        Args:
            download: Whether to download what is not in the cache; else None is returned for that.

        Raises:
            InputError: If the download fails.
        """
        from open_clip.pretrained import download_pretrained

        path = next((path for path in self._cached() if path.is_file()), None)
        if path is not None or not download:
            return path
        try:
            return Path(download_pretrained(dict(self.config)))
        except Exception as error:  # whatever the network, the Hub's client or a disk finds wrong
            raise InputError(
                f"backbone.pretrained={self.name}: not in the cache, and {self.source} cannot be downloaded: "
                f"{' '.join(str(error).split())[:200]}. Name a local file instead, or fill the cache on a machine with "
                "a network and set HF_HOME to it."
            ) from error

    def _cached(self) -> Iterator[Path]:
        """Yield the files where open_clip keeps what it has downloaded, as far as they are known."""
        from huggingface_hub import try_to_load_from_cache
        from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

        if repository := self.config.get("hf_hub"):
            name, _, file = str(repository).rpartition("/")
            file = file or HF_WEIGHTS_NAME
            safe = HF_SAFE_WEIGHTS_NAME if file == HF_WEIGHTS_NAME else str(Path(file).with_suffix(".safetensors"))
            cached = (try_to_load_from_cache(name, candidate) for candidate in (safe, file))
            yield from (Path(path) for path in cached if isinstance(path, str))
        else:
            yield Path("~/.cache/clip").expanduser() / Path(str(self.config.get("url"))).name


def find_tag(model: str, tag: str) -> Tag:
    """Return a model's tag.

    Args:
        model: A name that open_clip knows; empty for a folder, which has no tags.
        tag: Its name.

    Raises:
        InputError: If no tag has that name.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model) if model else []
    config = open_clip.get_pretrained_cfg(model, tag) if model else {}
    if not config:
        expected = f"a file, or one of {model}'s tags {shorten(tags, 12)}" if tags else "a file"
        raise InputError(f"backbone.pretrained: expected {expected}, found {tag!r}.{did_you_mean(tag, tags)}")
    return Tag(tag, config)
