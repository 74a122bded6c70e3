"""Upload of an export to the Hugging Face Hub: only when asked for, private unless said otherwise."""

import re
from pathlib import Path

from adamerge import __version__
from adamerge.errors import InputError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_name(repository: str) -> None:
    """Check the name of a repository.

    Raises:
        InputError: If the text is no repository's name.
    """
    if not _NAME.fullmatch(repository) or ".." in repository:
        raise InputError(f"--upload {repository}: expected ORG/NAME, letters, digits, '-', '_' and '.'.")


def upload(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload a folder's files, into a new private repository or an existing one.

    Args:
        folder: Folder of an export.
        repository: ``org/name``.
        public: Whether the files may become public: a new repository is made so, an existing one may be.

    Returns:
        The address of the repository.

    Raises:
        InputError: If the name is no repository's, the repository is public without ``public``, or the Hub refuses.
    """
    from huggingface_hub import HfApi

    check_name(repository)
    api = HfApi(library_name="adamerge", library_version=__version__)
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(repository).private:
            raise InputError(
                f"--upload {repository}: the repository is public already, and the files would be too. Add --public if "
                "they may be, or choose another name."
            )
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Upload a merge by adamerge {__version__}"
        )
    except InputError:
        raise
    except Exception as error:  # whatever the network or the Hub's client finds wrong
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"--upload {repository}: the Hub refused or cannot be reached: {reason} The export itself is in {folder}. "
            "Log in with `hf auth login`, and check the name and your rights."
        ) from error
    return f"{api.endpoint}/{repository}"
