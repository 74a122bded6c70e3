"""What a user can get wrong, and how a run can be stopped on purpose."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class InputError(ValueError):
    """Bad input: the message says which thing, what was expected, what was found, and the remedy.

    The command line prints it as one line and exits with code 2.
    """


class GuardError(RuntimeError):
    """A guard stopped the run (a loss, gradient or coefficient became NaN or infinite); exit code 3."""


class NonfiniteError(GuardError):
    """A loss, gradient or coefficient became NaN or infinite; the coefficients are the last good ones."""


_MAX_PATTERN = 500  # characters of a regular expression, which takes time to compile
EXIT_INTERRUPTED = 130
EXIT_PREEMPTED = 75


class Interrupted(SystemExit):
    """The run was stopped by a signal and saved; the exit code is 130 (Ctrl-C) or 75 (preempted: requeue)."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name, or an empty string.

    >>> did_you_mean("entropi", ["entropy", "imitation"])
    " Did you mean 'entropy'?"
    """
    nearest = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def shorten(names: Iterable[str], limit: int = 5) -> str:
    """Join names for a message: the first ``limit``, then how many more there are.

    >>> shorten(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def check_keys(content: Any, keys: Sequence[str], where: str) -> None:
    """Check that what a file holds at ``where`` is a mapping with no keys but the known ones.

    Raises:
        InputError: If it is not.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: expected a mapping with {', '.join(keys)}, found {content!r}.")
    for key in content:
        if key not in keys:
            raise InputError(f"{where}: unknown key {key!r}.{did_you_mean(str(key), keys)} Known: {', '.join(keys)}.")


def check_number(
    option: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    whole: bool = False,
    above: bool = False,
    below: bool = False,
) -> None:
    """Check that an option is a finite number between two limits.

    Args:
        option: Its name, for the message.
        value: Its value.
        low: The smallest number allowed; with ``above`` only larger ones are.
        high: The largest number allowed; with ``below`` only smaller ones are.
        whole: Whether only whole numbers are allowed.
        above: Whether ``low`` itself is refused.
        below: Whether ``high`` itself is refused.

    Raises:
        InputError: If it is something else.
    """
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan  # type: ignore[arg-type]
    inside = low <= number <= high and not (above and number == low) and not (below and number == high)
    if inside and math.isfinite(number):
        return
    limits = ""
    if math.isfinite(high):
        limits = f" in {'(' if above else '['}{low:g}, {high:.12g}{')' if below else ']'}"
    elif math.isfinite(low):
        limits = f" {'>' if above else '>='} {low:g}"
    raise InputError(f"{option}: expected a {'whole ' if whole else ''}number{limits}, found {value!r}.")


def check_choice(option: str, value: object, choices: Sequence[object]) -> None:
    """Check that an option is one of its choices.

    Raises:
        InputError: If it is not.
    """
    if value not in choices:
        nearest = did_you_mean(str(value), map(str, choices))
        raise InputError(f"{option}: expected {' or '.join(map(repr, choices))}, found {value!r}.{nearest}")


def check_globs(option: str, value: object) -> None:
    """Check that an option is a list of globs.

    Raises:
        InputError: If it is a single text, or holds something else.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(glob, str) for glob in value):
        raise InputError(f"{option}: expected a list of globs, found {value!r}; write ['GLOB'].")


def check_pattern(option: str, value: str) -> re.Pattern[str]:
    """Return an option that is a regular expression.

    Raises:
        InputError: If it is none.
    """
    if isinstance(value, str) and len(value) > _MAX_PATTERN:
        raise InputError(f"{option}: expected a regular expression of at most {_MAX_PATTERN} characters, found more.")
    try:
        return re.compile(value)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise InputError(f"{option}: {value!r} is not a regular expression ({error}).") from error


def check_call(option: str, function: Callable[..., Any], arguments: Sequence[str], remedy: str) -> None:
    """Check that a function takes so many arguments by position, without calling it.

    Args:
        option: Where the function was given.
        function: What is called; its class is named.
        arguments: What they are.
        remedy: For the message.

    Raises:
        InputError: If it does not.
    """
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise InputError(
            f"{option} {type(function).__name__}: expected a call with ({', '.join(arguments)}), found "
            f"{inspect.signature(function)} ({error}). {remedy}"
        ) from error
