"""Regular expressions that may come from a stranger's file, matched without running for ever.

Python's matcher takes exponential time for some, such as ``(a+)+b``, and cannot be stopped within a process. Those that
cannot do so are matched here; all others in a process of its own, whose time and memory are limited.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping

from adamerge.errors import InputError, check_pattern

_SECONDS = 2  # of a processor
_PATIENCE = 30  # seconds by the clock, on a machine that does much else
_QUANTIFIER = re.compile(r"(?<!\()[*+?{][?+]?")
_OF_GROUP = re.compile(r"\)[*+?{]")
_MAX_HERE = 2  # quantifiers of single characters: their time grows with the cube of the name's length
_MAX_NAME = 300  # characters
_SCRIPT = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
patterns, names = json.load(sys.stdin)
found = [(key, re.compile(pattern)) for key, pattern in patterns.items()]
json.dump({{k: {{n: m.group() for n in names if (m := e.search(n))}} for k, e in found}}, sys.stdout)
"""


def search_all(patterns: Mapping[str, str], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Search names for regular expressions, as ``re.search`` does.

    Args:
        patterns: Option that gave it, for messages, to the expression.
        names: Of parameters or modules.

    Returns:
        Option to name to the part that matched; names that do not match are left out.

    Raises:
        InputError: If one is no regular expression, or they take more than two seconds or 512 MB.
    """
    names = list(names)
    expressions = {option: check_pattern(option, pattern) for option, pattern in patterns.items()}
    longest = max(map(len, names), default=0)
    apart = {option: text for option, text in patterns.items() if longest > _MAX_NAME or not _is_quick(text)}
    found = _search_apart(apart, names) if apart else {}
    for option in patterns.keys() - apart.keys():
        matches = ((name, expressions[option].search(name)) for name in names)
        found[option] = {name: match.group() for name, match in matches if match}
    return found


def _is_quick(pattern: str) -> bool:
    """Return whether an expression has few quantifiers, none of which repeats a group."""
    return not _OF_GROUP.search(pattern) and len(_QUANTIFIER.findall(pattern)) <= _MAX_HERE


def _search_apart(patterns: Mapping[str, str], names: list[str]) -> dict[str, dict[str, str]]:
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _SCRIPT]
    content = json.dumps([patterns, names]).encode()
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=_PATIENCE, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        shown = "; ".join(f"{option}: {pattern!r:.100}" for option, pattern in patterns.items())
        raise InputError(
            f"{shown:.500}: matching takes too long or too much memory. Write it without repeated groups, such as "
            r"attn\..*weight instead of (attn.*)+weight."
        ) from error
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found
