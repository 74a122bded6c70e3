"""Which models of a zoo are made, on disk, so that an interrupted build trains the others only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge.errors import InputError
from adamerge.system.files import save_json, sha256


class BuildRecord:
    """What of a zoo is done: its files, and what is known about each.

    Args:
        folder: Of the zoo.
        key: Seed and recipe, which decide the weights.

    Raises:
        InputError: If the folder holds a zoo, finished or not, that was made in another way.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.finished: dict[str, Any] | None = None
        self._file = folder / "building.json"
        self._key = json.loads(json.dumps(key))
        self._done: dict[str, Any] = {}
        self._hashes: dict[str, str] = {}  # of a zoo that was finished once
        for path in (folder / "zoo.json", self._file):
            if path.is_file():
                content = _read(path)
                other = [name for name, value in self._key.items() if content.get(name) != value]
                if other:
                    raise InputError(
                        f"{folder} holds a zoo with another {other[0]}: expected {self._key[other[0]]}, found "
                        f"{content.get(other[0])} in {path.name}. Choose another folder, or remove this one."
                    )
                self._done = content.get("done") or _parts(content)
                self._hashes |= content["sha256"]
                self.finished = content if path.name == "zoo.json" and self._whole(content["sha256"]) else self.finished

    def done(self, part: str, file: Path) -> dict[str, Any] | None:
        """Return what is known about a part whose file is there as it was written; else None."""
        facts: dict[str, Any] | None = self._done.get(part)
        return facts if facts is not None and file.is_file() and sha256(file) == facts["sha256"] else None

    def add(self, part: str, file: Path, facts: Mapping[str, Any], *, first: bool = False) -> dict[str, Any]:
        """Note that a part is done; where the ``first`` has come out otherwise, what was trained from it is not."""
        digest = sha256(file)
        if first and self._done.get(part, {}).get("sha256") != digest:
            self._done = {}
        self._done[part] = {"sha256": digest, **facts}
        save_json({**self._key, "done": self._done}, self._file)
        return dict(self._done[part])

    def is_edited(self, name: str) -> bool:
        """Whether a file of a zoo that was finished is no longer as it was written."""
        path = self.folder / name
        return name in self._hashes and path.is_file() and sha256(path) != self._hashes[name]

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write what is known about the whole zoo."""
        save_json(facts, self.folder / "zoo.json")
        self._file.unlink(missing_ok=True)

    def _whole(self, hashes: Mapping[str, str]) -> bool:
        """Whether all files are there, as they were written; a user may have edited the pool file."""
        paths = {self.folder / name: digest for name, digest in hashes.items()}
        return all(
            path.is_file() and (path.suffix == ".yaml" or sha256(path) == digest) for path, digest in paths.items()
        )


def _parts(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a finished zoo's ``zoo.json`` says about each part, as :meth:`BuildRecord.add` has it."""
    hashes = {Path(name).stem: digest for name, digest in content["sha256"].items() if name.endswith(".safetensors")}
    accuracy, seconds = content.get("held_out_accuracy", {}), content.get("seconds", {})
    return {
        part: {"sha256": digest, "seconds": seconds[part]} | ({"accuracy": accuracy[part]} if part in accuracy else {})
        for part, digest in hashes.items()
        if part in seconds
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {**content, **{key: dict(content.get(key, {})) for key in ("sha256", "seconds", "held_out_accuracy")}}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: expected what a build writes, found no such JSON. Remove the file.") from error
