"""The public surface changes on purpose only."""

import difflib

from tests.api import FILE, surface


def test_public_names_and_options_are_those_recorded():
    recorded, found = (text.splitlines() for text in (FILE.read_text(encoding="utf-8"), surface()))
    changes = [line for line in difflib.unified_diff(recorded, found, "tests/api.txt", "the package", n=0, lineterm="")]
    assert not changes, (
        "The public names or options have changed. If that is meant, run `python -m tests.api`, commit tests/api.txt, "
        "and add a line to CHANGELOG.md (CONTRIBUTING.md says which changes need a new minor version):\n"
        + "\n".join(changes)
    )
