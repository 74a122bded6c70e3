"""How far a zoo has been made, on disk, so that an interrupted build goes on to the same weights."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adamerge.errors import InputError
from adamerge.system.files import atomic_path, save_json, sha256

_EVERY = 50  # steps between two states of a model in training


class TrainingState:
    """One model in training: its parameters, optimizer, learning rate schedule and generator after some step.

    Args:
        path: File of the state; None keeps none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._before = 0.0
        self._started = time.perf_counter()

    def restore(self, parts: Mapping[str, Any], generator: torch.Generator) -> int:
        """Load the state into ``parts`` and the generator, and return how many steps have been done; 0 for none.

        Raises:
            InputError: If the file is damaged.
        """
        if self._path is None or not self._path.is_file():
            return 0
        try:
            content = torch.load(self._path, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(content[name])
            generator.set_state(content["generator"])
            self._before, step = float(content["seconds"]), int(content["step"])
        except Exception as error:  # whatever a damaged archive makes torch raise
            raise InputError(
                f"{self._path}: not the state of this model's training ({' '.join(str(error).split())[:200]}). "
                "Remove the file: its training starts anew."
            ) from error
        return step

    def keep(self, step: int, parts: Mapping[str, Any], generator: torch.Generator) -> None:
        """Write the state after every so many steps."""
        if self._path is None or step % _EVERY:
            return
        states = {name: part.state_dict() for name, part in parts.items()}
        content = {**states, "generator": generator.get_state(), "step": step, "seconds": self.seconds}
        with atomic_path(self._path) as temporary:
            torch.save(content, temporary)

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self._before + time.perf_counter() - self._started

    def remove(self) -> None:
        """Remove the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class Progress:
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

    def state(self, part: str) -> TrainingState:
        """Return where the training of a part stands; nothing is kept beside the weights once it is done."""
        return TrainingState(self.folder / f"{part}.training.pt")

    def done(self, part: str, file: Path) -> dict[str, Any] | None:
        """Return what is known about a part whose file is there as it was written; else None."""
        facts: dict[str, Any] | None = self._done.get(part)
        return facts if facts is not None and file.is_file() and sha256(file) == facts["sha256"] else None

    def record(
        self, part: str, file: Path, state: TrainingState, facts: Mapping[str, Any], *, first: bool = False
    ) -> dict[str, Any]:
        """Note that a part is done; where the ``first`` has come out otherwise, what was trained from it is not."""
        digest = sha256(file)
        if first and self._done.get(part, {}).get("sha256") != digest:
            self._done = {}
        self._done[part] = {"sha256": digest, "seconds": round(state.seconds, 1), **facts}
        save_json({**self._key, "done": self._done}, self._file)
        state.remove()
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
    """Return what a finished zoo's ``zoo.json`` says about each part, as :meth:`Progress.record` has it."""
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
