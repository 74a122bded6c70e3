"""The Hugging Face Hub's cache, laid out by hand as its client lays it out."""

import hashlib
from pathlib import Path


def commit_of(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


def add_model(cache: Path, repository: str, files: dict[str, bytes], branch: str | None = "main") -> str:
    """Put a model into the cache: blobs, a snapshot of links to them, and the branch's reference; return the commit."""
    folder = cache / ("models--" + repository.replace("/", "--"))
    commit = commit_of(repository)
    snapshot = folder / "snapshots" / commit
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + len(Path(name).parts) - 1), "blobs", blob.name))
    if branch is not None:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / branch).write_text(commit)
    return commit
