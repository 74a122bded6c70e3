"""Which models of a zoo are made, on disk, so that an interrupted build trains the others only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge.errors import InputError
from adamerge.system.files import save_json, sha256
from adamerge.system.reading import read_json


class BuildRecord:
    """Hashes, seconds and accuracies of the models that are made, in ``building.json``, and at the end in ``zoo.json``.

    Args:
        folder: Folder of the zoo.
        key: Seed and recipe, which decide the weights.

    Attributes:
        hashes: SHA-256 by file.
        seconds: Seconds of each model's training.
        accuracy: Held-out accuracies by expert.
        finished: The content of ``zoo.json`` where all files are as it says; else None.

    Raises:
        InputError: If the folder holds a zoo, finished or not, that was made in another way.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.hashes: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.accuracy: dict[str, dict[str, float]] = {}
        self.finished: dict[str, Any] | None = None
        self._key = json.loads(json.dumps(key))
        self._unfinished, self._whole = folder / "building.json", folder / "zoo.json"
        for path in filter(Path.is_file, (self._whole, self._unfinished)):
            content = _content(path)
            self._check(content, path.name)
            self.hashes, self.seconds = content["sha256"], content["seconds"]
            self.accuracy = content["held_out_accuracy"]
            if path == self._whole and all(self.is_written(file) or file.endswith(".yaml") for file in self.hashes):
                self.finished = content

    def _check(self, content: Mapping[str, Any], name: str) -> None:
        for key, expected in self._key.items():
            if content.get(key) != expected:
                raise InputError(
                    f"{self.folder} holds a zoo with another {key}: expected {expected}, found {content.get(key)} in "
                    f"{name}. Choose another folder, or remove this one."
                )

    def is_written(self, file: str) -> bool:
        """Whether a file is there as it was written; a user may edit the pool file."""
        path = self.folder / file
        return path.is_file() and sha256(path) == self.hashes.get(file)

    def add(self, file: str, seconds: float, accuracy: Mapping[str, float] | None = None) -> None:
        """Note that a model is made; where the base has come out otherwise, the experts made from it are void."""
        digest = sha256(self.folder / file)
        part = file.removeprefix("experts/").partition("/")[0].removesuffix(".safetensors")
        if accuracy is None and self.hashes.get(file) != digest:
            self.hashes = {name: value for name, value in self.hashes.items() if name.endswith(".yaml")}
        self.hashes[file], self.seconds[part] = digest, round(seconds, 1)
        if accuracy is not None:
            self.accuracy[part] = dict(accuracy)
        facts = {"sha256": self.hashes, "seconds": self.seconds, "held_out_accuracy": self.accuracy}
        save_json({**self._key, **facts}, self._unfinished)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write what is known about the whole zoo."""
        save_json(facts, self._whole)
        self._unfinished.unlink(missing_ok=True)


def _content(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json(path)
        return {**content, **{key: dict(content.get(key, {})) for key in ("sha256", "seconds", "held_out_accuracy")}}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: expected what a build writes, found no such JSON. Remove the file.") from error
