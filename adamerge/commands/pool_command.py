"""What ``adamerge pool`` does: keep pool files, say which files are there, check and fetch them."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from omegaconf import OmegaConf

from adamerge.checkpoints.checkpoint import convert_command
from adamerge.checkpoints.convert import convert
from adamerge.checkpoints.hashes import check_hash, forget
from adamerge.checkpoints.hub import HubReference, located, located_all, reference_of
from adamerge.checkpoints.model_folder import open_model
from adamerge.commands.run.named_pools import named_pool, own_pools, shipped_pools
from adamerge.errors import InputError, did_you_mean
from adamerge.pool.headers import Headers, check_names, read_headers
from adamerge.pool.pool_file import PoolFile, PoolFiles, load_pool_file, named_files, named_values, place
from adamerge.system.files import atomic_path, locked

_VISUAL = "visual."
_OPTIONS = ("key_prefix", "storage", "dtype", "include", "exclude", "duplicates")
_USUAL = {"storage": "auto", "duplicates": "refuse"}


class PoolError(InputError):
    """Everything that is wrong with a pool's files.

    Attributes:
        problems: One a line.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Addition:
    """What ``pool add`` puts into a pool file.

    Attributes:
        base: The pretrained checkpoint; None: the pool's own.
        experts: ``NAME=FILE``, as the command takes them.
        tasks: ``NAME=TASK`` that an expert was fine-tuned on.
        licences: ``NAME=LICENCE``; the base's name is ``base``.
        key_prefix: Of the encoder's keys; None: found out.
        pickled: Whether files that are no safetensors are converted, into a folder beside the pool file.
        again: Whether experts of the same name are replaced.
    """

    base: str | None
    experts: Sequence[str] = ()
    tasks: Sequence[str] = ()
    licences: Sequence[str] = ()
    key_prefix: str | None = None
    pickled: bool = False
    again: bool = False


@dataclass(frozen=True)
class State:
    """A checkpoint of a pool, as it is on this machine.

    Attributes:
        entry: What the pool says.
        path: Where it is; None where the Hub's cache lacks it.
        there: Whether it is.
    """

    entry: PoolFile
    path: Path | None
    there: bool


def add(path: Path, addition: Addition) -> PoolFiles:
    """Make a pool file, or add experts to one; checkpoints are opened, compared with the base, and hashed.

    Raises:
        FileNotFoundError: If a checkpoint is not there.
        InputError: If an option is wrong; nothing is written then.
        PoolError: If files do not fit; nothing is written then.
    """
    with locked(path):
        return _add(path, addition)


def _add(path: Path, addition: Addition) -> PoolFiles:
    old = load_pool_file(path) if path.is_file() else None
    if old is None and addition.base is None:
        raise InputError(f"pool add: {path}: no such pool yet; give its base: --base FILE or hf://ORG/NAME.")
    base = old.base if old is not None and addition.base is None else PoolFile(place(str(addition.base)))
    if old is not None and addition.base is not None and not addition.again:
        raise InputError(f"pool add --base: {path} has a base already, {old.base.file}; add --replace for another.")
    new = named_files(addition.experts)
    known = dict(old.experts) if old is not None else {}
    both = [name for name in new if name in known]
    if both and not addition.again:
        raise InputError(f"pool add --expert {both[0]}: {path} has an expert of that name; add --replace for another.")
    files = replace(old or PoolFiles(base, {}), base=base, experts={**known, **new})
    check_names({name: entry.file for name, entry in files.experts.items()})
    files = _with_facts(files, addition)
    if not addition.pickled:
        try:
            files = _checked(files, addition)
        except PoolError as error:
            raise PoolError([_with_own_remedy(problem, files) for problem in error.problems]) from error
    else:
        names = [*new, *(["base"] if addition.base is not None else [])]
        files = _converted(files, names, path.with_suffix(""), addition)
    save_pool_file(files, path)
    return files


def _checked(files: PoolFiles, addition: Addition) -> PoolFiles:
    """Return a pool with its prefix and hashes, once its files are found to fit."""
    prefix = _prefix(files) if addition.key_prefix is None and files.key_prefix is None else addition.key_prefix
    files = recorded(files if prefix is None else replace(files, key_prefix=prefix))
    _refuse_duplicates(files)
    return files


def _converted(files: PoolFiles, names: Sequence[str], folder: Path, addition: Addition) -> PoolFiles:
    """Return a pool, checked, whose named entries that are pickles are safetensors in a folder.

    They are converted into a temporary folder beside it and moved once everything fits: what is there may be replaced.
    """
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as made:
        temporary, entries, pickles = Path(made), {"base": files.base, **files.experts}, {}
        try:
            for name in names:
                if _is_pickle(file := entries[name].file):
                    pickles[name] = file
                    out = folder / f"{name}.safetensors"
                    _check_out(name, file, out, addition.again)
                    _convert(file, temporary / out.name)
                    entries[name] = replace(entries[name], file=temporary / out.name)
            checked = _checked(_with_entries(files, entries), addition)
        except InputError as error:
            problems = error.problems if isinstance(error, PoolError) else [str(error)]
            for name, file in pickles.items():  # the temporary files are gone when this is read
                made_of = str(temporary / f"{name}.safetensors"), str(file)
                problems = [problem.replace(*made_of) for problem in problems]
            raise PoolError(problems) from error
        finally:
            forget(temporary)
        entries = {"base": checked.base, **checked.experts}
        for name in pickles:
            entries[name] = replace(entries[name], file=folder / f"{name}.safetensors")
            folder.mkdir(exist_ok=True)
            (temporary / f"{name}.safetensors").replace(folder / f"{name}.safetensors")
    return _with_entries(checked, entries)


def _with_own_remedy(problem: str, files: PoolFiles) -> str:
    """Return a problem with the command's own way to convert a pickle, where conversion is what it advises."""
    for entry in files.entries.values():
        if isinstance(entry.file, Path):
            problem = problem.replace(convert_command(entry.file), "add --convert to this command")
    return problem


def _with_entries(files: PoolFiles, entries: Mapping[str, PoolFile]) -> PoolFiles:
    return replace(files, base=entries["base"], experts={name: entries[name] for name in files.experts})


def recorded(files: PoolFiles) -> PoolFiles:
    """Return a pool with the hash of every file, and the commit and licence of every model of the Hub, as they are now.

    Hashes that are given already must still be right.

    Raises:
        FileNotFoundError: If a checkpoint is not there.
        PoolError: If anything does not fit.
    """
    if problems := header_problems(files):
        raise PoolError(problems)
    files.verify()
    experts = {name: _recorded(files, entry) for name, entry in files.experts.items()}
    return replace(files, base=_recorded(files, files.base), experts=experts)


def record(name: str, path: Path) -> PoolFiles:
    """Write a pool, as it is by now, to a file with all that :func:`recorded` finds out."""
    with locked(path):
        files = recorded(named_pool(name))
        save_pool_file(files, path)
        return files


def problems_of(files: PoolFiles) -> list[str]:
    """Read every byte of a pool's files; return all that is missing, changed, or does not fit the base."""
    problems, found = [], states(files)
    try:
        located_all({name: state.entry.file for name, state in found.items() if state.path is None})
    except InputError as error:
        problems.append(str(error))
    for name, state in found.items():
        if state.path is None:
            continue
        if not state.there:
            problems.append(_no_such_file(name, state.path))
            continue
        forget(state.path)
        if state.entry.sha256 is None:
            continue
        try:
            check_hash(state.entry.file, name, state.entry.sha256, lambda path=state.path: files.hash_of(path))  # type: ignore[misc]
        except (InputError, OSError) as error:
            problems.append(str(error))
    return problems or header_problems(files)


def header_problems(files: PoolFiles) -> list[str]:
    """Return what the headers of a pool's files say is wrong."""
    return list(headers(files).problems)


def headers(files: PoolFiles) -> Headers:
    """Return what the headers of a pool's files say: names and shapes of the parameters that merge, and problems."""
    experts = {name: entry.file for name, entry in files.experts.items()}
    return read_headers(files.base.file, experts, files.key_prefix or "", files.include, files.exclude or ())


def states(files: PoolFiles) -> dict[str, State]:
    """Return which of a pool's checkpoints are on this machine, by name; no file is opened."""
    found = {}
    for name, entry in files.entries.items():
        path = entry.file.cached() if isinstance(entry.file, HubReference) else entry.file
        found[name] = State(entry, path, path is not None and path.exists())
    return found


def every_pool() -> dict[str, tuple[str, PoolFiles | InputError]]:
    """Return all pools that have a name: where each comes from, and what it says or what is wrong with its file."""
    found: dict[str, tuple[str, PoolFiles | InputError]] = {}
    for name in shipped_pools():
        found[name] = ("shipped", named_pool(name))
    for name, path in own_pools().items():
        try:
            found.setdefault(name, (str(path), load_pool_file(path)))
        except (InputError, OSError) as error:
            found.setdefault(name, (str(path), InputError(str(error))))
    return found


def references(targets: Sequence[str]) -> list[HubReference]:
    """Return the models of the Hub that pools, or references themselves, name; each once.

    Raises:
        InputError: If one is neither, or a pool names none.
    """
    found: dict[HubReference, None] = {}
    for target in targets:
        own = reference_of(target)
        entries = [] if own is not None else [entry.file for entry in named_pool(target).entries.values()]
        named = [own] if own is not None else [file for file in entries if isinstance(file, HubReference)]
        if not named:
            raise InputError(f"pool fetch {target}: its files are on this machine's disks; none is of the Hub.")
        found |= dict.fromkeys(named)
    return list(found)


def save_pool_file(files: PoolFiles, path: Path) -> None:
    """Write a pool file, atomically.

    Paths are written relative to its folder where they lie below that, or both below the working directory.
    """
    content: dict[str, Any] = {"base": _written(files.base, path)}
    for option in _OPTIONS:
        value = getattr(files, option)
        if value is not None and value != _USUAL.get(option):
            content[option] = list(value) if isinstance(value, tuple) else value
    content["experts"] = {name: _written(entry, path) for name, entry in files.experts.items()}
    if files.task_vectors is not None:
        content["task_vectors"] = _written(files.task_vectors, path)
    with atomic_path(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(content), encoding="utf-8")


def _written(entry: PoolFile, pool: Path) -> dict[str, str]:
    file, folder = entry.file, pool.parent.absolute()
    if isinstance(file, Path):
        whole = Path(os.path.abspath(file))  # without the '..' that a pool file's own paths may have
        together = all(path.is_relative_to(Path.cwd()) for path in (whole, folder))
        relative = Path(os.path.relpath(whole, folder))
        leads_there = (folder / relative).resolve() == whole.resolve()  # not where '..' leaves a linked folder
        file = relative if leads_there and (together or whole.is_relative_to(folder)) else whole
    facts = {"file": str(file), "task": entry.task, "licence": entry.licence, "sha256": entry.sha256}
    return {key: value for key, value in facts.items() if value is not None}


def _recorded(files: PoolFiles, entry: PoolFile) -> PoolFile:
    file, licence = entry.file, entry.licence
    if isinstance(file, HubReference):
        licence = licence or file.licence()
        file = file.pinned()
    return replace(entry, file=file, licence=licence, sha256=files.hash_of(located(file)))


def _with_facts(files: PoolFiles, addition: Addition) -> PoolFiles:
    """Put tasks and licences to the experts that they are given for."""
    experts, base = dict(files.experts), files.base
    for option, key, pairs in (("--task", "task", addition.tasks), ("--licence", "licence", addition.licences)):
        for name, value in named_values(option, pairs).items():
            if name == "base" and key == "licence":
                base = replace(base, licence=value)
            elif name not in experts:
                raise InputError(f"{option} {name}={value}: no expert of that name.{did_you_mean(name, experts)}")
            else:
                facts = {"task": experts[name].task, "licence": experts[name].licence, key: value}
                experts[name] = replace(experts[name], task=facts["task"], licence=facts["licence"])
    return replace(files, base=base, experts=experts)


def _prefix(files: PoolFiles) -> str | None:
    """Return the prefix of the visual tower where the base is a whole CLIP."""
    keys = open_model(located(files.base.file)).keys
    return _VISUAL if any(key.startswith(_VISUAL) for key in keys) else None


def _refuse_duplicates(files: PoolFiles) -> None:
    by_hash: dict[str, str] = {}
    for name, found in {"base": files.base, **files.experts}.items():
        other = by_hash.setdefault(str(found.sha256), name)
        if other != name and files.duplicates != "allow":
            raise InputError(
                f"pool add: {other} and {name} are the same file, or copies: {found.file}. Leave one out; a pool file "
                "with duplicates: allow may have both."
            )


def _is_pickle(file: Path | HubReference) -> TypeGuard[Path]:
    """Whether a checkpoint is a torch file or pickle on this machine."""
    if isinstance(file, HubReference) or not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(9)[8:] != b"{"  # which safetensors have there


def _check_out(name: str, source: Path, out: Path, again: bool) -> None:
    """Refuse a name that is none of a file, and to replace a file unasked."""
    if Path(out.name).stem != name:
        raise InputError(
            f"pool add --expert {name}={source}: expected a name that a file can have, {name}.safetensors, to convert "
            "into; found a path."
        )
    if out.exists() and out.samefile(source):
        raise InputError(f"pool add --convert: {source}: would be replaced by what is made of it; move it first.")
    if out.exists() and not again:
        raise InputError(
            f"pool add --convert: {out} is there already. Add --replace to write over it, name the expert otherwise, "
            f"or name that file: --expert {name}={out}."
        )


def _convert(source: Path, out: Path) -> None:
    """Write a pickle's tensors under a plain model's names."""
    if prefix := convert(source, out).prefix:
        convert(source, out, prefix)


def _no_such_file(name: str, path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"{name}: {path}: no such file.{did_you_mean(path.name, siblings)}"


def summary(files: PoolFiles) -> Mapping[str, int]:
    """Return how many of a pool's files there are, and how many are on this machine."""
    found = states(files)
    return {"files": len(found), "there": sum(state.there for state in found.values())}
