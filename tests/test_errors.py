from adamerge.errors import GuardError, InputError, did_you_mean, shorten


def test_did_you_mean_nothing_near_is_empty():
    assert did_you_mean("entropy", ["zebra"]) == ""
    assert did_you_mean("entropy", []) == ""


def test_shorten_few_names_shows_all():
    assert shorten(iter(["a", "b"])) == "'a', 'b'"
    assert shorten([]) == ""


def test_errors_are_builtin_kinds_so_that_callers_may_catch_those():
    assert issubclass(InputError, ValueError)
    assert issubclass(GuardError, RuntimeError)
