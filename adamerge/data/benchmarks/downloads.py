"""Fetching data sets, for `adamerge data get` alone: nothing else downloads."""

import importlib
import importlib.util
from pathlib import Path

from adamerge.data.benchmarks.definitions import Definition, Download
from adamerge.errors import InputError


def fetch(facts: Definition, root: Path, *, hub: bool = False) -> None:
    """Fetch a data set from its authors' servers, or its copy at the Hub; what is there already is not fetched again.

    Args:
        facts: About the data set.
        root: Folder of the data sets, made if needed.
        hub: Take the copy at the Hub.

    Raises:
        InputError: If it cannot be fetched; the message says what to do by hand.
    """
    if hub:
        _fetch_hub(facts, root)
        return
    if not facts.torchvision and not facts.get:
        raise InputError(
            f"{facts.title} ({facts.name}) cannot be fetched from its authors. {_by_hand(facts, 'By hand')}"
        )
    try:
        _fetch_torchvision(facts, root)
        for download in facts.get:
            _fetch_file(download, root)
    except InputError:
        raise
    except Exception as error:  # whatever torchvision, urllib and the archives raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{facts.title} ({facts.name}) could not be fetched: {reason}. Files that came whole are kept, so try "
            f"again. {_by_hand(facts, 'Else')}"
        ) from error


def _fetch_torchvision(facts: Definition, root: Path) -> None:
    """Let torchvision's class fetch what it reads, with its checksums and progress bars."""
    for layout in facts.layouts:
        module, _, reader = layout.reader.rpartition(".")
        if module != "torchvision.datasets" or reader == "ImageFolder":
            continue
        for options in facts.torchvision:
            getattr(importlib.import_module(module), reader)(root / layout.at[0], download=True, **options)


def _fetch_file(download: Download, root: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive, download_url

    if download.gives and (root / download.gives).exists():
        return
    get = download_url if download.url.endswith((".txt", ".csv", ".mat")) else download_and_extract_archive
    get(download.url, str(root / download.folder), md5=download.md5)


def _fetch_hub(facts: Definition, root: Path) -> None:
    """Copy a data set's parquet files from the Hub to where its layout looks for them; resumes by itself."""
    if facts.hub is None:
        raise InputError(f"{facts.title} ({facts.name}): no copy at the Hub is known. Leave out --hub.")
    if importlib.util.find_spec("datasets") is None:
        raise InputError(f'{facts.title}: reading the copy needs a package: pip install "adamerge[hub]".')
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(
            facts.hub,
            repo_type="dataset",
            local_dir=root / "hub" / facts.name,
            allow_patterns=["README.md", "data/train-*.parquet", "data/test-*.parquet"],
        )
    except Exception as error:  # its own errors and those of the HTTP client below
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{facts.title} ({facts.name}): {facts.hub} could not be fetched: {reason}") from error


def _by_hand(facts: Definition, start: str) -> str:
    return f"{start}: {facts.manual}" if facts.manual else f"{start}: see {facts.homepage}."
