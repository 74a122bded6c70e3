import pytest
import torch

from adamerge import ExpertPool
from adamerge.checkpoints.checkpoint import MemoryCheckpoint
from adamerge.pool.headers import KeyMap, check_layout, read_headers, shared_names
from adamerge.pool.options import PoolOptions
from tests.support.toy import save_files


def checkpoint(name="base", **tensors):
    return MemoryCheckpoint(name, tensors)


def layout(base, *, key_map=None, include=None, exclude=None, tied=None, unplaced="auto", **experts):
    base = checkpoint(**base)
    experts = {name: checkpoint(name, **tensors) for name, tensors in experts.items()}
    options = PoolOptions(include=include, exclude=exclude, tied=tied, unplaced=unplaced)
    return check_layout(base, experts, KeyMap(base.keys, key_map), options)


W, B = torch.ones(2, 2), torch.ones(2)


def test_read_headers_a_wrong_name_is_one_problem_and_hides_no_other(tmp_path):
    base, experts = save_files(tmp_path, {"w": W}, {"a": {"w": W + 1}, "b": {"w": B}})
    names = {"a": experts["a"], "again": experts["a"], "b": experts["b"]}
    problems = read_headers(base, names, PoolOptions()).problems
    assert len(problems) == len(set(problems)) == 2
    assert any("'w'" in problem and "b" in problem for problem in problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_read_headers_say_what_the_pool_computes_in(tmp_path, dtype):
    base, experts = save_files(tmp_path, {"w": W.to(dtype), "n": torch.arange(2)}, {"a": {"w": (W + 1).to(dtype)}})
    pool = ExpertPool.from_files(base, experts)
    assert read_headers(base, experts, PoolOptions()).compute_dtype == pool.compute_dtype == dtype


def test_check_layout_reads_no_tensor():
    class Closed(MemoryCheckpoint):
        def get(self, key):
            raise AssertionError(f"{key} was read")

    base, expert = Closed("base", {"w": W}), Closed("a", {"w": W + 1})
    assert check_layout(base, {"a": expert}, KeyMap(base.keys, None), PoolOptions()).merged == ("w",)


def test_check_layout_sorts_tensors_by_what_becomes_of_them():
    base = {
        "visual.w": W,
        "visual.b": B,
        "visual.bn.running_mean": B,
        "visual.bn.num_batches_tracked": torch.tensor(3),
        "visual.position": torch.arange(2),
        "visual.tied": W,
        "text.w": W,
    }
    result = layout(base, key_map="visual.", exclude=["b"], tied={"tied": "w"}, a=base)
    assert result.problems == ()
    assert result.merged == ("w",)
    assert result.fixed == ("b",)
    assert result.skipped == {
        "visual.b": "excluded",
        "visual.bn.running_mean": "normalisation statistics: see batch_norm",
        "visual.bn.num_batches_tracked": "normalisation statistics: see batch_norm",
        "visual.position": "integer tensor (int64)",
        "visual.tied": "tied to w",
        "text.w": "not part of the encoder",
    }


def test_check_layout_include_keeps_the_matching_only():
    result = layout(
        {"blocks.0.w": W, "blocks.1.w": W, "stem": B}, include=["blocks.*"], a={"blocks.0.w": W, "blocks.1.w": W}
    )
    assert result.merged == ("blocks.0.w", "blocks.1.w")
    assert result.skipped == {"stem": "excluded"}
    assert result.problems == ()


def test_check_layout_lists_every_problem_of_every_expert():
    good = {"w": W, "b": B, "c": B}
    problems = layout(
        good,
        reshaped={**good, "w": torch.ones(3, 2), "c": torch.ones(1)},
        short={"w": W, "c": B},
        long={**good, "fc": B},
        integer={**good, "b": B.int()},
    ).problems
    assert len(problems) == 4
    assert problems[0].startswith(
        "Expert 'reshaped' does not match the base: 2 of 3 tensors differ in shape, first 'w': "
        "expected (2, 2), found (3, 2)."
    )
    assert problems[1].startswith("Expert 'short' lacks 1 of 3 tensors of the base: 'b'.")
    assert problems[2].startswith("Expert 'long' has 1 tensors that the base lacks: 'fc'.")
    assert "--exclude" in problems[2]
    assert "Expert 'integer': tensor 'b' has the integer dtype torch.int32, expected floating point." in problems[3]
    assert "dequantize" in problems[3]


def test_check_layout_missing_tensor_suggests_the_nearest_name():
    (missing, extra) = layout({"layer.weight": W}, a={"layers.weight": W}).problems
    assert "Did you mean 'layers.weight'?" in missing
    assert "'layers.weight'" in extra


def test_check_layout_other_files_keys_and_ignored_ones_are_no_problem():
    base = {"visual.w": W, "visual.b": B}
    expert = {"visual.w": W, "text.w": W, "visual.fc": B, "visual.bn.running_var": B, "epoch": torch.tensor(1)}
    assert layout(base, key_map="visual.", exclude=["b", "fc"], a=expert).problems == ()
    assert layout(base, key_map="visual.", include=["w"], a=expert).problems == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["block.*"]}, "pool.include: the pattern 'block.*' matches no tensor of base."),
        ({"key_map": "model."}, "base: no tensor to merge: none of its 2 keys, such as 'blocks.0', is left by"),
        ({"exclude": ["*"]}, "base: no tensor to merge"),
        ({"key_map": {"blocks.0": "x", "blokcs.1": "y"}}, "key_map: base has no tensor 'blokcs.1'. Did you mean 'blo"),
        ({"tied": {"a": "block.1"}}, "pool.tied: 'a' is tied to 'block.1', which is no untied tensor"),
        ({"tied": {"blocks.0": "blocks.1", "blocks.1": "blocks.0"}}, "pool.tied: 'blocks.0' is tied"),
        ({"key_map": {"blocks.0": "x", "blocks.1": "x"}}, "key_map gives 'blocks.0' and 'blocks.1' the same name 'x'"),
    ],
    ids=["include", "prefix", "exclude", "unknown", "tied", "circle", "double"],
)  # fmt: skip
def test_check_layout_options_that_fit_nothing_are_named(options, message):
    base = {"blocks.0": W, "blocks.1": B}
    assert any(problem.startswith(message) for problem in layout(base, a=base, **options).problems)


def test_key_map_prefix_strips_and_leaves_other_keys_out():
    keys = KeyMap(["visual.w", "text.w"], "visual.")
    assert keys.name("visual.w") == "w"
    assert keys.name("text.w") is None
    assert keys.file_key("w") == "visual.w"


def test_key_map_mapping_renames():
    keys = KeyMap(["a", "b"], {"a": "x"})
    assert (keys.name("a"), keys.name("b"), keys.file_key("x")) == ("x", None, "a")


def test_key_map_none_keeps_names():
    assert KeyMap(["a"], None).name("a") == "a"


def test_shared_names_same_memory_and_shape_are_tied_to_the_first():
    w, flat = torch.ones(3, 3), torch.ones(4)
    tensors = {"a": w, "b": w, "c": w.detach(), "copy": w.clone(), "row": w[0], "half": flat[:2], "other": flat[2:]}
    assert shared_names(tensors) == {"b": "a", "c": "a"}


def test_shared_names_transposed_view_is_not_the_same_tensor():
    w = torch.arange(9.0).view(3, 3)
    assert shared_names({"a": w, "b": w.t()}) == {}


def test_shared_names_empty_tensors_share_nothing():
    assert shared_names({"a": torch.zeros(0), "b": torch.zeros(0)}) == {}
