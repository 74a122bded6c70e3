"""Pool files: a base, its experts and what is known about them, in one yaml beside the checkpoints.

    base: base.safetensors
    key_prefix: visual.
    experts:
      cars: cars.safetensors
      svhn: hf://org/name@1f0c...
      dtd: {file: dtd.safetensors, task: textures, licence: MIT, sha256: 1f0c...}
    task_vectors: task_vectors.safetensors

Paths start from the folder of the file.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from adamerge.checkpoints.hashes import check_hash, file_hash
from adamerge.checkpoints.hub import HubReference, located, located_all, reference_of
from adamerge.checkpoints.model_folder import open_model
from adamerge.errors import InputError, check_globs, check_keys, did_you_mean
from adamerge.pool.headers import Headers, read_headers
from adamerge.pool.lora import open_expert
from adamerge.pool.options import PoolOptions
from adamerge.pool.pool import ExpertPool
from adamerge.pool.task_vectors import dtype_of
from adamerge.system.reading import read_yaml_text
from adamerge.transforms import Transform

DEFAULTS = {
    "storage": "auto",
    "dtype": None,
    "include": None,
    "exclude": None,
    "duplicates": "refuse",
    "unplaced": "auto",
    "tied": None,
    "extended": None,
}
_RESOLVED = re.compile(r"\$\{(oc\.env|zoo|offline_benchmark):[^${}]*\}")
_KEYS = ("base", "experts", "key_prefix", "task_vectors", "sha256", *DEFAULTS)
_FILE_KEYS = ("file", "task", "licence", "sha256")


@dataclass(frozen=True)
class PoolFile:
    """One checkpoint of a pool.

    Attributes:
        file: Where it is: a file or folder, or a reference to the Hub.
        task: That the expert was trained on; None for the base, or where it is the expert's name.
        licence: Licence of the weights, if known.
        sha256: Of the file, if known; checked before the pool is opened.
    """

    file: Path | HubReference
    task: str | None = None
    licence: str | None = None
    sha256: str | None = None

    def facts(self) -> dict[str, str]:
        """Return the entry as a pool file has it, without what is not known."""
        return {key: value for key, value in {**vars(self), "file": str(self.file)}.items() if value is not None}


@dataclass(frozen=True)
class PoolFiles:
    """The content of a pool file.

    Attributes:
        base: The pretrained model.
        experts: By name.
        key_prefix: Prefix of the encoder's keys, or each one's name in the encoder.
        task_vectors: A file of packed task vectors.
        options: Those of ``ExpertPool.from_files`` in ``DEFAULTS``, ready for yaml.
    """

    base: PoolFile
    experts: Mapping[str, PoolFile]
    key_prefix: str | Mapping[str, str] | None = None
    task_vectors: PoolFile | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: DEFAULTS)

    @property
    def models(self) -> dict[str, PoolFile]:
        """The base (key ``base``) and the experts."""
        return {"base": self.base, **self.experts}

    @property
    def entries(self) -> dict[str, PoolFile]:
        """The base, the experts, and the packed task vectors (``task_vectors``) if there are any."""
        return self.models if self.task_vectors is None else {**self.models, "task_vectors": self.task_vectors}

    @property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 that are known of the base (key ``base``) and the experts."""
        return {name: entry.sha256 for name, entry in self.models.items() if entry.sha256 is not None}

    @property
    def licences(self) -> dict[str, str]:
        """The licences that are known of the base (key ``base``) and the experts."""
        return {name: entry.licence for name, entry in self.models.items() if entry.licence}

    def with_options(self, include: Sequence[str], exclude: Sequence[str], **options: Any) -> "PoolFiles":
        """Return the same files with further globs and, where they are not None, other options."""
        globs = {"include": include, "exclude": exclude}
        widened = {key: [*(self.options[key] or ()), *values] for key, values in globs.items() if values}
        given = {key: value for key, value in options.items() if value is not None}
        return replace(self, options={**self.options, **widened, **given})

    def pinned(self, hashes: Mapping[str, str]) -> "PoolFiles":
        """Return the same files, to be verified by the SHA-256 of the base (key ``base``) and the experts."""
        experts = {name: replace(entry, sha256=hashes.get(name)) for name, entry in self.experts.items()}
        return replace(self, base=replace(self.base, sha256=hashes.get("base")), experts=experts)

    def open(self, **options: Any) -> ExpertPool:
        """Open the pool; ``options`` are those of ``ExpertPool.from_files`` that stand in for the file's."""
        packed = self.task_vectors and self.task_vectors.file
        stated = {**self.pool_options, "task_vectors": packed, "hashes": self.hashes}
        return ExpertPool.from_files(self.base.file, self._expert_files, **{**stated, **options})

    def open_mapped(self, **options: Any) -> ExpertPool:
        """Open the pool for passes that read each parameter once: nothing stays in memory, unless rounding is asked."""
        is_rounded = self.task_vectors is None and {**self.options, **options}["dtype"] is not None
        return self.open(**options) if is_rounded else self.open(**{**options, "storage": "auto", "mapped": True})

    @property
    def pool_options(self) -> dict[str, Any]:
        """The options as :class:`~adamerge.pool.options.PoolOptions` takes them."""
        return {**self.options, "dtype": dtype_of(self.options["dtype"]), "key_map": self.key_prefix or None}

    @property
    def _expert_files(self) -> dict[str, Path | HubReference]:
        return {name: entry.file for name, entry in self.experts.items()}

    def node(self) -> dict[str, Any]:
        """Return the files and options as the group ``pool`` of the configuration has them."""
        return {
            "base": str(self.base.file),
            "experts": {name: str(entry.file) for name, entry in self.experts.items()},
            **self.options,
            "task_vectors": self.task_vectors and str(self.task_vectors.file),
            "licences": self.licences or None,
            "sha256": self.hashes or None,
        }

    def described(self) -> dict[str, Any]:
        """Return a pool file's content, with absolute paths; a packed file with its hash, where it is there."""
        packed = self.task_vectors
        if packed is not None and (path := located(packed.file)).is_file():
            packed = replace(packed, sha256=file_hash(path))
        return {
            "base": _described(self.base),
            "experts": {name: _described(entry) for name, entry in self.experts.items()},
            **self.options,
            "key_prefix": self.key_prefix,
            "task_vectors": packed and _described(packed),
        }

    def verify(self) -> None:
        """Compare the files with the hashes that are given; a file is read only if it changed since it last was.

        Raises:
            FileNotFoundError: If a file is not there.
            InputError: If one has another hash, or is not in the Hub's cache.
        """
        places = located_all({name: entry.file for name, entry in self.entries.items()})
        for name, entry in self.entries.items():
            path = places[name]
            if not path.exists():  # a folder is a model's, or a LoRA adapter's
                raise FileNotFoundError(self.no_such_file(name, path))
            check_hash(entry.file, name, entry.sha256, partial(self.hash_of, path))

    def no_such_file(self, name: str, path: Path) -> str:
        """Return the message about an entry whose file is not there."""
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        return (
            f"{path}: no such file, named for {name}; paths in a pool file start from its own folder, not from yours "
            f"(those of a yaml file below --config-dir start from yours).{did_you_mean(path.name, siblings)}"
        )

    def headers(self, *, base_is_here: bool = True, transform: Transform | None = None) -> Headers:
        """Return what the headers of the files say: names and shapes of what merges, and all that is wrong.

        Args:
            base_is_here: Whether the base can be opened; without it the experts are looked at alone.
            transform: Of the task vectors, which does not go together with all options.
        """
        base = self.base.file if base_is_here else None
        options, problems = self.sound_options(transform)
        headers = read_headers(base, self._expert_files, options)
        return replace(headers, problems=(*problems, *headers.problems))

    def sound_options(self, transform: Transform | None = None) -> tuple[PoolOptions, list[str]]:
        """Return the options of the pool but those that are refused, and why they are."""
        options, problems = PoolOptions(key_map=self.key_prefix or None), list[str]()
        for option, value in {**self.options, "transform": transform}.items():
            try:
                choice: dict[str, Any] = {option: dtype_of(value) if option == "dtype" else value}
                options = replace(options, **choice)
            except InputError as error:
                problems.append(str(error))
        return options, problems

    def hash_of(self, path: Path) -> str:
        """Return the SHA-256 of a checkpoint of the pool: of its file, or for a folder of all that is read there."""
        if not path.is_dir():
            return file_hash(path)
        prefix = self.key_prefix if isinstance(self.key_prefix, str) else ""
        return open_expert(path, open_model(located(self.base.file)), prefix).sha256()


def load_pool_file(path: Path) -> PoolFiles:
    """Read a pool file; the checkpoints are not opened.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no pool file, or has a key that nothing reads.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such pool file.")
    text = read_yaml_text(path)
    refused = re.search(r"\$\{[^}\s]*\}?", _RESOLVED.sub("", text))
    if refused:  # values that refer to one another can double with each
        raise InputError(
            f"{path}: expected no interpolation but ${{oc.env:NAME}} and ${{zoo:FILE}}, found {refused[0][:80]}."
        )
    try:
        content: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except Exception as error:  # whatever a yaml parser, a decoder or an interpolation finds wrong
        raise InputError(f"{path}: expected a yaml file, found: {' '.join(str(error).split())}.") from error
    return pool_files(content, f"{path}: ", path.parent)


def pool_files(content: Any, where: str, folder: Path) -> PoolFiles:
    """Read the content of a pool file.

    Args:
        content: Plain containers.
        where: What stands before a key in messages, ``FILE: `` or ``pool.``.
        folder: That its paths start from.

    Raises:
        InputError: If it is no pool file's.
    """
    check_keys(content, _KEYS, where.rstrip(".: "))
    for key in ("base", "experts"):
        if not content.get(key):
            raise InputError(f"{where}{key}: must be given, such as {key}={_EXAMPLES[key]}.")
    if not isinstance(content["experts"], Mapping):
        raise InputError(f"{where}experts: expected {_EXAMPLES['experts']}, found {content['experts']!r}.")
    for key in ("key_prefix", "storage", "dtype", "duplicates", "unplaced"):
        if not isinstance(content.get(key) or "", str):
            raise InputError(f"{where}{key}: expected a text, found {content[key]!r}.")
    for key in ("include", "exclude", "extended"):
        check_globs(f"{where}{key}", content.get(key) or ())
    packed = content.get("task_vectors")
    hashes = _texts(content.get("sha256"), f"{where}sha256", "base and experts to SHA-256") or {}
    names = ("base", *map(str, content["experts"]))
    for name in hashes:
        if name not in names:
            raise InputError(f"{where}sha256: {name!r} is neither base nor an expert.{did_you_mean(str(name), names)}")
    _texts(content.get("tied"), f"{where}tied", "alias to the name that merges")
    files = PoolFiles(
        base=_entry(content["base"], f"{where}base", folder),
        experts={str(n): _entry(e, f"{where}experts.{n}", folder) for n, e in content["experts"].items()},
        key_prefix=content.get("key_prefix"),
        task_vectors=_entry(packed, f"{where}task_vectors", folder) if packed else None,
        options={key: default if content.get(key) is None else content[key] for key, default in DEFAULTS.items()},
    )
    return files.pinned({**hashes, **files.hashes}) if hashes else files


def named_files(pairs: Sequence[str]) -> dict[str, PoolFile]:
    """Read ``--expert NAME=FILE`` options.

    Raises:
        InputError: If one is something else, or a name is given twice.
    """
    return {name: PoolFile(place(path)) for name, path in named_values("--expert", pairs, "FILE").items()}


def named_values(option: str, pairs: Sequence[str], value: str = "VALUE") -> dict[str, str]:
    """Read an option that is repeated as ``NAME=VALUE``.

    Raises:
        InputError: If one is something else, or a name is given twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if not name or not text:
            raise InputError(f"{option} {pair}: expected NAME={value}.")
        if name in values:
            raise InputError(f"{option} {pair}: the name {name!r} is given twice.")
        values[name] = text
    return values


def place(text: str, folder: Path = Path()) -> Path | HubReference:
    """Return the reference to the Hub that a text is, or else the path, which starts from a folder.

    Raises:
        InputError: If the text begins as a reference and is not one.
    """
    if (reference := reference_of(text)) is not None:
        return reference
    path = folder / Path(text).expanduser()
    plain = Path(os.path.normpath(path))  # without '..', unless that leaves a linked folder
    return plain if ".." in path.parts and plain.resolve() == path.resolve() else path


_EXAMPLES = {"base": "FILE", "experts": "{name: FILE, ...}"}


def _entry(content: Any, where: str, folder: Path) -> PoolFile:
    """Read a file's entry: a path, or a mapping from ``_FILE_KEYS``."""
    facts = {"file": content} if isinstance(content, str) else content
    if isinstance(facts, Mapping):
        check_keys(facts, _FILE_KEYS, where)
    if not isinstance(facts, Mapping) or not facts.get("file"):
        raise InputError(
            f"{where}: expected a checkpoint FILE, hf://ORG/NAME, or {{file: FILE, ...}}, found {content!r}."
        )
    for key, value in facts.items():
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where}.{key}: expected a text, found {value!r}; put it in quotes.")
    try:
        return PoolFile(**{**facts, "file": place(facts["file"], folder)})
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _described(entry: PoolFile) -> dict[str, str]:
    file = entry.file if isinstance(entry.file, HubReference) else entry.file.absolute()
    return replace(entry, file=file).facts()


def _texts(content: Any, where: str, pairs: str) -> Mapping[str, str] | None:
    if content is not None and not (isinstance(content, Mapping) and all(isinstance(v, str) for v in content.values())):
        raise InputError(f"{where}: expected a mapping from {pairs}, found {content!r}.")
    return content
