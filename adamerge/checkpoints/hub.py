"""References to the Hugging Face Hub: ``hf://org/name[@revision][/file]``, read from the local cache.

Opening a reference never touches the network; :meth:`HubReference.fetch` alone does, for ``adamerge pool fetch``.
"""

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adamerge.errors import InputError
from adamerge.system.reading import read_json_mapping

_SCHEME = re.compile(r"hf:/{1,2}")  # a Path joins the two slashes
_PARTS = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.%-]+))?(?:/(?P<file>[^/].*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What is read of a repository: one copy of the weights, the safe format, and what describes them.
_SAFE = ("*.json", "*.safetensors", "README.md")
_PICKLED = ("*.json", "*.bin", "README.md")
_ELSEWHERE = "Without a network here, fetch on another machine and set HF_HOME to a copy of its cache."


@dataclass(frozen=True)
class HubReference:
    """A model of the Hub, or one of its files.

    Attributes:
        repository: ``org/name``.
        revision: A commit, which pins it, or a branch or tag; None: ``main``.
        file: Inside the repository; None: the whole model.

    Raises:
        InputError: If the Hub allows no such name, or the file leads out of the repository.
    """

    repository: str
    revision: str | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__

        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise InputError(f"{self}: {self.repository} is no name of a model of the Hub: {error}") from error
        if self.revision in (".", "..") or ".." in Path(self.file or "").parts:
            raise InputError(f"{self}: expected a file inside the repository; leave '..' out.")

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}{at}" + (f"/{self.file}" if self.file else "")

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(self.revision and _COMMIT.fullmatch(self.revision))

    def cached(self) -> Path | None:
        """Return the file, or the folder of the snapshot, in the Hub's cache; None where it is not there."""
        for patterns, suffix in ((_SAFE, ".safetensors"), (_PICKLED, ".bin")):
            path = self._look_up(local_files_only=True, patterns=patterns)
            if path is not None and (self.file is not None or _has_weights(path, suffix)):
                return path
        return None

    def fetch(self) -> Path:
        """Download what the cache lacks, and return the file or folder.

        Raises:
            InputError: If it cannot be downloaded.
        """
        try:
            path = self._look_up(local_files_only=False, patterns=_SAFE)
            if path is not None and path.is_dir() and not any(path.rglob("*.safetensors")):
                path = self._look_up(local_files_only=False, patterns=_PICKLED)
        except Exception as error:  # whatever the Hub's client, the network or a disk finds wrong
            raise InputError(
                f"{self}: cannot be downloaded: {' '.join(str(error).split())[:300]}. {_ELSEWHERE}"
            ) from error
        if path is None:
            raise InputError(f"{self}: cannot be downloaded. {_ELSEWHERE}")
        if path.is_dir() and not any(_has_weights(path, suffix) for suffix in (".safetensors", ".bin")):
            raise InputError(
                f"{self}: expected safetensors or .bin files, and all that an index names, found neither in {path}. "
                f"Is it a model of this kind? {_ELSEWHERE}"
            )
        return path

    def pinned(self) -> "HubReference":
        """Return the reference with the commit that its revision is in the cache; itself where that is unknown."""
        path = None if self.is_pinned else self.cached()
        if path is None:
            return self
        parts = path.parts
        commit = parts[len(parts) - parts[::-1].index("snapshots")]
        return replace(self, revision=commit)

    def licence(self) -> str | None:
        """Return the licence that the model's card in the cache states, if any."""
        from huggingface_hub import metadata_load, try_to_load_from_cache

        card = try_to_load_from_cache(self.repository, "README.md", revision=self.revision)
        try:
            content = metadata_load(card) if isinstance(card, str) else None
        except Exception:  # a card is written by hand, and may be anything
            return None
        stated = (content or {}).get("license")
        return stated if isinstance(stated, str) else None

    def _look_up(self, *, local_files_only: bool, patterns: tuple[str, ...]) -> Path | None:
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        options: dict[str, Any] = {"revision": self.revision, "local_files_only": local_files_only}
        try:
            if self.file is not None:
                return Path(hf_hub_download(self.repository, self.file, **options))
            return Path(str(snapshot_download(self.repository, allow_patterns=list(patterns), **options)))
        except LocalEntryNotFoundError:
            if not local_files_only:
                raise
            return None


def reference_of(place: str | os.PathLike[str] | HubReference) -> HubReference | None:
    """Return the reference to the Hub that a text or path is; None for any other path.

    Raises:
        InputError: If the text begins as a reference and is not one.
    """
    if isinstance(place, HubReference):
        return place
    text = os.fspath(place)
    start = _SCHEME.match(text)
    if start is None:
        return None
    match = _PARTS.fullmatch(text, start.end())
    if match is None:
        raise InputError(
            f"{text}: expected hf://ORG/NAME, hf://ORG/NAME@REVISION or hf://ORG/NAME@REVISION/FILE; a revision is a "
            "commit, a branch or a tag without slashes."
        )
    return HubReference(match["repository"], match["revision"], match["file"])


def located(place: str | os.PathLike[str] | HubReference) -> Path:
    """Return where a checkpoint is on this machine: a path as it is, a reference to the Hub in its cache.

    Raises:
        InputError: If the cache does not have it.
    """
    return located_all({"": place})[""]


def located_all(places: Mapping[str, str | os.PathLike[str] | HubReference]) -> dict[str, Path]:
    """Return where checkpoints are, by name; see :func:`located`.

    Raises:
        InputError: If the cache lacks any; one error names all.
    """
    paths: dict[str, Path] = {}
    missing: list[str] = []
    for name, place in places.items():
        reference = reference_of(place)
        path = Path(str(place)) if reference is None else reference.cached()
        if path is None:
            missing.append(str(reference))
        else:
            paths[name] = path
    if missing:
        raise InputError(_missing(missing))
    return paths


def _has_weights(folder: Path, suffix: str) -> bool:
    """Whether a snapshot has weights of a format, whole: an interrupted download leaves one without all of them."""
    indices = [path for path in folder.rglob(f"*{suffix}.index.json") if path.is_file()]
    try:
        shards = [
            index.parent / Path(file).name
            for index in indices
            for file in read_json_mapping(index)["weight_map"].values()
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return True  # the error of a damaged index is that of its reader, which names it
    return all(path.is_file() for path in set(shards)) and any(path.is_file() for path in folder.rglob(f"*{suffix}"))


def _missing(references: Iterable[str]) -> str:
    from huggingface_hub import constants

    listed = list(dict.fromkeys(references))
    models, them = ("a model", "it") if len(listed) == 1 else (f"{len(listed)} models", "them")
    return (
        f"Not in the Hugging Face cache ({constants.HF_HUB_CACHE}): {models} of the Hub. Nothing is downloaded "
        f"unasked; this gets {them}: adamerge pool fetch {shlex.join(listed)}. {_ELSEWHERE}"
    )
