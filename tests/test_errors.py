import pytest

from adamerge.errors import (
    GuardError,
    InputError,
    check_choice,
    check_globs,
    check_number,
    did_you_mean,
    shorten,
)


def test_did_you_mean_nothing_near_is_empty():
    assert did_you_mean("entropy", ["zebra"]) == ""
    assert did_you_mean("entropy", []) == ""


def test_shorten_few_names_shows_all():
    assert shorten(iter(["a", "b"])) == "'a', 'b'"
    assert shorten([]) == ""


def test_errors_are_builtin_kinds_so_that_callers_may_catch_those():
    assert issubclass(InputError, ValueError)
    assert issubclass(GuardError, RuntimeError)


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (0, {"low": 0, "above": True}, r"x: expected a number > 0, found 0"),
        (1, {"low": 0, "high": 1, "below": True}, r"x: expected a number in \[0, 1\), found 1"),
        (-0.1, {"low": 0}, r"x: expected a number >= 0, found -0\.1"),
        (1.5, {"low": 1, "whole": True}, r"x: expected a whole number >= 1, found 1\.5"),
        (True, {}, r"x: expected a number, found True"),
        (float("nan"), {}, r"x: expected a number, found nan"),
        (float("inf"), {"low": 0}, r"x: expected a number >= 0, found inf"),
        ("1", {"low": 0, "high": 1, "above": True}, r"x: expected a number in \(0, 1\], found '1'"),
    ],
)
def test_number_outside_its_limits_is_refused(value, limits, message):
    with pytest.raises(InputError, match=message):
        check_number("x", value, **limits)


def test_number_on_a_limit_that_belongs_is_taken():
    check_number("x", 0, 0, 1)
    check_number("x", 1.0, 0, 1, above=True)
    check_number("x", -3, whole=True)


def test_choice_and_globs_name_option_and_value():
    with pytest.raises(InputError, match=r"x: expected 'a' or 'b', found 'c'"):
        check_choice("x", "c", ("a", "b"))
    with pytest.raises(InputError, match=r"x: expected a list of globs, found '\*'"):
        check_globs("x", "*")
