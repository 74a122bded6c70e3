import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from adamerge import Coefficients, ExpertPool, InputError, merge
from adamerge.pool.options import PoolOptions
from adamerge.pool.task_vectors import free_memory
from tests.support.toy import EXPERTS, ToyEncoder, make_toy, perturbed, save_files

W, B = torch.arange(6.0).view(2, 3), torch.ones(3)


def from_states(base=None, **experts) -> ExpertPool:
    return ExpertPool.from_state_dicts(base or {"w": W, "b": B}, experts)


def write(folder, base, /, **experts):
    return save_files(folder, base, experts)


def same(first: ExpertPool, second: ExpertPool) -> bool:
    """Whether two pools hold the same bits, in whatever order (safetensors files sort their keys)."""
    return set(first.names) == set(second.names) and all(
        torch.equal(first.base[name], second.base[name])
        and torch.equal(first.task_vectors(name), second.task_vectors(name))
        for name in first.names
    )


# What a pool holds


def test_task_vectors_are_experts_minus_base_in_the_order_given(toy):
    pool = toy.pool()
    assert pool.expert_names == EXPERTS
    assert pool.names == tuple(dict(toy.encoder.named_parameters()))
    for name in pool.names:
        stacked = torch.stack([toy.experts[expert][name] - toy.base[name] for expert in EXPERTS])
        assert torch.equal(pool.task_vectors(name), stacked)
        assert pool.task_vectors(name).shape == (3, *pool.shapes[name])
        assert torch.equal(pool.base[name], toy.base[name])


def test_names_follow_the_base_and_experts_their_mapping():
    base = {"z": W, "a": B}
    pool = ExpertPool.from_state_dicts(base, {"y": perturbed(dict(reversed(base.items()))), "b": perturbed(base)})
    assert pool.names == ("z", "a")
    assert pool.expert_names == ("y", "b")


def test_pool_is_untouched_when_the_caller_changes_its_own_base(toy):
    pool = toy.pool(exclude=["proj"])
    before = {name: tensor.clone() for name, tensor in {**pool.base, **pool.fixed}.items()}
    for tensor in toy.base.values():
        tensor.add_(1)
    assert "proj" in before
    assert all(torch.equal({**pool.base, **pool.fixed}[name], before[name]) for name in before)


def test_tensors_that_no_expert_changed_are_set_aside_and_reported():
    pool = from_states(a={"w": W + 1, "b": B}, c={"w": W + 2, "b": B})
    assert pool.names == ("w",)
    assert torch.equal(pool.fixed["b"], B)
    assert pool.skipped == pool.report().skipped == {"b": "no expert changed it"}


def test_tensor_that_one_expert_changed_is_merged():
    pool = from_states(a={"w": W + 1, "b": B}, c={"w": W + 2, "b": B + 1})
    assert pool.names == ("w", "b")
    assert torch.equal(pool.task_vectors("b"), torch.stack([torch.zeros(3), torch.ones(3)]))


def test_integer_tensors_and_statistics_of_the_base_are_skipped(toy):
    pool = toy.pool()
    assert pool.skipped == {"seen": "integer tensor (int64)"}
    base = {"w": W, "bn.running_mean": B, "bn.num_batches_tracked": torch.tensor(1)}
    pool = from_states(base, a={"w": W + 1, "bn.running_mean": B + 1, "bn.num_batches_tracked": torch.tensor(9)})
    assert pool.names == ("w",)
    assert set(pool.skipped) == {"bn.running_mean", "bn.num_batches_tracked"}


def test_exclude_leaves_a_parameter_at_the_base(toy):
    pool = ExpertPool.from_state_dicts(toy.base, toy.experts, exclude=["proj", "blocks.0.*"])
    assert "proj" not in pool.names
    assert torch.equal(pool.fixed["proj"], toy.base["proj"])
    assert pool.skipped["blocks.0.up.weight"] == "excluded"
    assert "blocks.1.up.weight" in pool.names


def test_expert_parameters_are_the_experts_own_even_where_excluded(toy):
    pool = ExpertPool.from_state_dicts(toy.base, toy.experts, exclude=["proj"])
    own = pool.expert_parameters("green")
    assert set(own) == set(dict(toy.encoder.named_parameters()))
    assert all(torch.equal(own[name], toy.experts["green"][name]) for name in own)


def test_expert_parameters_that_the_expert_lacks_are_the_bases():
    base = {"w": W, "fc": B, "gone": B.clone()}
    pool = ExpertPool.from_state_dicts(base, {"a": {"w": W + 1, "fc": torch.ones(7)}}, exclude=["fc", "gone"])
    own = pool.expert_parameters("a")
    assert torch.equal(own["fc"], B)
    assert torch.equal(own["gone"], B)


def test_tied_names_are_merged_once_and_written_under_every_key():
    shared = torch.randn(2, 3)
    base = {"w": shared, "alias": shared, "b": B}
    pool = from_states(base, a={"w": W, "alias": W, "b": B + 1})
    assert pool.names == ("w", "b")
    assert pool.skipped == {"alias": "tied to w"}
    merged = merge(pool, Coefficients(pool, "task", init=0.5), detach=True)
    assert list(merged) == ["w", "alias", "b"]
    assert torch.equal(merged["w"], merged["alias"])


def test_tied_names_of_files_are_named_and_need_not_be_in_them(tmp_path):
    both, one = {"w": W, "alias": W.clone(), "b": B}, {"w": W + 1, "b": B + 1}
    base, experts = write(tmp_path, both, a=one)
    pool = ExpertPool.from_files(base, experts, tied={"alias": "w"})
    assert set(pool.names) == {"w", "b"}
    merged = merge(pool, Coefficients(pool, "task", init=1.0), detach=True)
    assert torch.equal(merged["alias"], W + 1)
    base, experts = write(tmp_path, {"w": W}, a={"w": W + 1})
    assert ExpertPool.from_files(base, experts, tied={"alias": "w"}).names == ("w",)


@given(st.permutations(EXPERTS))
def test_permuted_experts_permute_rows_and_nothing_else(order):
    toy = make_toy()
    pool, permuted = toy.pool(), ExpertPool.from_state_dicts(toy.base, {name: toy.experts[name] for name in order})
    rows = [EXPERTS.index(name) for name in order]
    for name in pool.names:
        assert torch.equal(permuted.task_vectors(name), pool.task_vectors(name)[rows])
        assert torch.equal(permuted.base[name], pool.base[name])


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", ["ram", "stream"])
def test_half_precision_files_are_computed_in_float32(tmp_path, dtype, storage):
    toy = make_toy(dtype)
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    pool = ExpertPool.from_files(base, experts, storage=storage, exclude=["scale"])
    assert pool.compute_dtype == torch.float32
    assert pool.base["proj"].dtype == pool.task_vectors("proj").dtype == torch.float32
    expected = toy.experts["red"]["proj"].float() - toy.base["proj"].float()
    assert torch.equal(pool.task_vectors("proj")[0], expected)
    assert pool.fixed["scale"].dtype == torch.float32, "one dtype for all that the encoder computes with"
    assert all(tensor.dtype == torch.float32 for tensor in pool.expert_parameters("red").values())


def test_float64_base_is_computed_in_float64():
    pool = from_states({"w": W.double(), "b": B}, a={"w": W + 1, "b": B})
    assert pool.compute_dtype == torch.float64
    assert pool.task_vectors("w").dtype == torch.float64
    assert pool.fixed["b"].dtype == torch.float64


def test_mixed_precision_expert_of_a_float32_base_is_computed_in_float32():
    pool = from_states(a={"w": (W + 1).half(), "b": B.bfloat16() + 1})
    assert torch.equal(pool.task_vectors("w")[0], torch.ones(2, 3))


def test_dtype_stores_task_vectors_rounded_and_computes_in_float32(tmp_path):
    toy = make_toy()
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    pool = ExpertPool.from_files(base, experts, storage="ram", dtype=torch.bfloat16)
    exact = toy.experts["red"]["proj"] - toy.base["proj"]
    assert torch.equal(pool.task_vectors("proj")[0], exact.bfloat16().float())
    assert pool.task_vectors("proj").dtype == torch.float32
    assert pool.dtype_name == "bfloat16"


def test_dtype_of_streamed_experts_is_that_of_the_computation(tmp_path):
    base, experts = write(tmp_path, {"w": W}, a={"w": W + 1})
    pool = ExpertPool.from_files(base, experts, storage="stream", dtype=torch.bfloat16)
    assert pool.dtype_name == "float32"


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool])
def test_dtype_that_task_vectors_cannot_have_is_refused(tmp_path, dtype):
    base, experts = write(tmp_path, {"w": W}, a={"w": W + 1})
    with pytest.raises(InputError, match=r"pool\.dtype: expected float32, bfloat16, float16 or int8, found torch\."):
        ExpertPool.from_files(base, experts, dtype=dtype)


def test_dtype_too_narrow_for_the_task_vectors_is_refused(tmp_path):
    base, experts = write(tmp_path, {"w": W}, a={"w": W + 1e6})
    with pytest.raises(InputError, match=r"pool\.dtype: .*float16 overflows .*'a'.*'w'.*bfloat16"):
        ExpertPool.from_files(base, experts, storage="ram", dtype=torch.float16)


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_streamed_pool_equals_ram_bit_for_bit(tmp_path, dtype):
    toy = make_toy(dtype)
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    ram, stream = (ExpertPool.from_files(base, experts, storage=storage) for storage in ("ram", "stream"))
    assert (ram.storage, stream.storage) == ("ram", "stream")
    assert same(ram, stream)
    assert torch.equal(ram.tile("proj", 3, 17), stream.tile("proj", 3, 17))
    for granularity in ("task", "layer", "row", "column"):
        coefficients = Coefficients(ram, granularity)
        for detach in (True, False):
            first, second = merge(ram, coefficients, detach=detach), merge(stream, coefficients, detach=detach)
            assert list(first) == list(second)
            assert all(torch.equal(first[name], second[name]) for name in first)


def test_files_of_every_format_give_the_same_pool(tmp_path):
    toy = make_toy()
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    expected = ExpertPool.from_files(base, experts, storage="ram")
    torch.save({"state_dict": {f"module.{key}": value for key, value in toy.base.items()}}, tmp_path / "base.pt")
    torch.save(toy.experts["red"], tmp_path / "red.pt", _use_new_zipfile_serialization=False)
    torch.save(toy.experts["green"], tmp_path / "green.pt")
    mixed = {"red": tmp_path / "red.pt", "green": tmp_path / "green.pt", "blue": experts["blue"]}
    for storage in ("ram", "stream"):
        assert same(expected, ExpertPool.from_files(tmp_path / "base.pt", mixed, storage=storage))


def test_key_map_prefix_selects_the_encoder_and_export_keeps_the_rest(tmp_path):
    toy = make_toy()
    visual = {f"visual.{key}": value for key, value in toy.base.items()}
    base, experts = save_files(
        tmp_path,
        {"text.w": W, **visual, "logit_scale": torch.tensor(4.6)},
        {name: {f"visual.{key}": value for key, value in tensors.items()} for name, tensors in toy.experts.items()},
    )
    pool = ExpertPool.from_files(base, experts, key_map="visual.")
    assert same(pool, ExpertPool.from_state_dicts(toy.base, toy.experts))
    assert pool.skipped["text.w"] == "not part of the encoder"
    merged = merge(pool, Coefficients(pool, init=0.0), detach=True)
    assert list(merged) == list(pool.source.keys)
    assert torch.equal(merged["text.w"], W)
    assert all(torch.equal(merged[key], value) for key, value in visual.items())


def test_key_map_mapping_renames_and_export_keeps_the_files_names(tmp_path):
    base, experts = write(tmp_path, {"A": W, "B": B, "C": B + 2}, a={"A": W + 1, "B": B + 1, "C": B})
    pool = ExpertPool.from_files(base, experts, key_map={"A": "enc.w", "B": "enc.b"})
    assert set(pool.names) == {"enc.w", "enc.b"}
    assert torch.equal(pool.task_vectors("enc.w")[0], torch.ones(2, 3))
    assert set(merge(pool, Coefficients(pool), detach=True)) == {"A", "B", "C"}


def test_export_keeps_key_order_dtypes_and_integer_tensors(toy):
    base = {key: value.half() if key == "proj" else value for key, value in toy.base.items()}
    pool = ExpertPool.from_state_dicts(base, toy.experts)
    merged = merge(pool, Coefficients(pool), detach=True)
    assert list(merged) == list(base)
    assert {key: value.dtype for key, value in merged.items()} == {key: value.dtype for key, value in base.items()}
    assert torch.equal(merged["seen"], base["seen"])


def test_hashes_name_base_and_experts_and_follow_the_files(tmp_path):
    base, experts = write(tmp_path, {"w": W}, a={"w": W + 1}, b={"w": W + 2})
    first = ExpertPool.from_files(base, experts).hashes()
    assert list(first) == ["base", "a", "b"]
    save_file({"w": W + 3}, experts["b"])
    second = ExpertPool.from_files(base, experts).hashes()
    assert [name for name in first if first[name] != second[name]] == ["b"]


def test_storage_auto_is_decided_and_unknown_is_refused(tmp_path, monkeypatch):
    base, experts = write(tmp_path, {"w": W}, a={"w": W + 1})
    assert ExpertPool.from_files(base, experts).storage == "ram"
    monkeypatch.setattr("adamerge.pool.task_vectors.free_memory", lambda: 8)
    assert ExpertPool.from_files(base, experts).storage == "stream"
    with pytest.raises(InputError, match=r"pool\.storage: expected 'auto' or 'device' or .*, found 'disk'"):
        ExpertPool.from_files(base, experts, storage="disk")


def test_free_memory_is_a_plausible_number_of_bytes():
    assert 2**20 < free_memory() < 2**50


def test_pool_to_moves_itself_and_keeps_its_values(toy_pool):
    assert toy_pool.to("cpu") is toy_pool
    toy_pool.to("meta")
    assert toy_pool.base["proj"].device.type == toy_pool.task_vectors("proj").device.type == "meta"


# The report


def test_report_norms_and_cosines_are_those_computed_by_hand():
    base = {"w": torch.tensor([[3.0, 4.0]]), "b": torch.zeros(2)}
    pool = from_states(
        base,
        x={"w": torch.tensor([[6.0, 4.0]]), "b": torch.tensor([4.0, 0.0])},  # task vector (3, 0, 4, 0)
        y={"w": torch.tensor([[3.0, 6.0]]), "b": torch.tensor([0.0, 0.0])},  # (0, 2, 0, 0)
        z={"w": torch.tensor([[0.0, 4.0]]), "b": torch.tensor([0.0, 4.0])},  # (-3, 0, 0, 4)
    )
    report = pool.report()
    assert [expert["norm"] for expert in report.experts.values()] == pytest.approx([5, 2, 5])
    assert [expert["relative_norm"] for expert in report.experts.values()] == pytest.approx([1, 0.4, 1])
    expected = torch.tensor([[1.0, 0.0, -9 / 25], [0.0, 1.0, 0.0], [-9 / 25, 0.0, 1.0]]).double()
    torch.testing.assert_close(report.cosines, expected)
    assert report.norms["w"].tolist() == pytest.approx([3, 2, 3])
    assert report.norms["b"].tolist() == pytest.approx([4, 0, 4])
    assert (report.parameters, report.entries, report.storage) == (2, 4, "ram")


def test_report_names_sources_and_hashes(tmp_path):
    base, experts = write(tmp_path, {"w": W}, a={"w": W + 1})
    pool = ExpertPool.from_files(base, experts)
    assert pool.report().experts["a"]["source"] == str(experts["a"])
    assert pool.report().experts["a"]["sha256"] == pool.hashes()["a"]


# Bad input: each from memory and, where files matter, from files


def test_experts_none_is_refused():
    with pytest.raises(InputError, match=r"experts: expected at least one expert \(name to file\), found none"):
        from_states()


def test_expert_named_base_is_refused():
    with pytest.raises(InputError, match=r"experts: the name 'base' is reserved .*rename that expert"):
        ExpertPool.from_state_dicts({"w": W}, {"base": {"w": W + 1}})


CASES = {
    "missing": ({"w": W + 1}, r"Expert 'bad'.* lacks 1 of 2 tensors of the base: 'b'\. .*same architecture"),
    "extra": (
        {"w": W + 1, "b": B, "fc": B + 1},
        r"Expert 'bad'.* has 1 tensors that the base lacks: 'fc'\. .*--exclude",
    ),
    "reshaped": (
        {"w": W.view(3, 2), "b": B},
        r"Expert 'bad'.* 1 of 2 tensors differ in shape, first 'w': expected \(2, 3\), found \(3, 2\).*architecture",
    ),
    "broadcastable": ({"w": W[:1], "b": B}, r"Expert 'bad'.* first 'w': expected \(2, 3\), found \(1, 3\)"),
    "integer": ({"w": W.int(), "b": B}, r"Expert 'bad'.* tensor 'w' has the integer dtype torch\.int32.*dequantize"),
    "nan": (
        {"w": W + math.nan, "b": B},
        r"bad.*: tensor 'w' holds 6 NaN or infinite values of 6\. .*damaged or diverged.*use another",
    ),
    "inf": (
        {"w": W, "b": torch.tensor([1.0, math.inf, 1.0])},
        r"bad.*: tensor 'b' holds 1 NaN or infinite values of 3",
    ),
    "base": ({"w": W, "b": B}, r"Expert 'bad' \(.*\) is identical to the base .*: its task vector is zero\. Remove it"),
    "twin": ({"w": W + 1, "b": B}, r"Experts 'good' and 'bad' have identical weights \(.*bad.*\)\. Remove one"),
}


@pytest.mark.parametrize("storage", ["memory", "ram", "stream"])
@pytest.mark.parametrize("case", CASES)
def test_bad_expert_is_refused_by_name_and_tensor(tmp_path, case, storage):
    bad, message = CASES[case]
    base, experts = {"w": W, "b": B}, {"good": {"w": W + 1, "b": B}, "bad": bad}
    if storage == "memory":
        with pytest.raises(InputError, match=message):
            ExpertPool.from_state_dicts(base, experts)
        return
    paths = save_files(tmp_path, base, experts)
    with pytest.raises(InputError, match=message) as caught:
        ExpertPool.from_files(*paths, storage=storage)
    assert "bad.safetensors" in str(caught.value), "the file is named"


@pytest.mark.parametrize("storage", ["ram", "stream"])
def test_base_with_nan_is_refused(tmp_path, storage):
    paths = write(tmp_path, {"w": W / 0}, a={"w": W})
    with pytest.raises(InputError, match=r"base\.safetensors: tensor 'w' holds 6 NaN or infinite values of 6"):
        ExpertPool.from_files(*paths, storage=storage)


def test_expert_of_another_architecture_says_how_many_more_problems(toy):
    class Wider(ToyEncoder):
        def __init__(self):
            super().__init__()
            self.blocks.append(torch.nn.Linear(16, 16))
            self.proj = torch.nn.Parameter(torch.randn(16, 9))

    experts = {**toy.experts, "other": Wider().state_dict()}
    with pytest.raises(
        InputError, match=r"'other'.*first 'proj': expected \(16, 5\), found \(16, 9\).*\(and 1 more prob"
    ):
        ExpertPool.from_state_dicts(toy.base, experts)


@pytest.mark.parametrize("link", [False, True], ids=["same", "link"])
def test_same_file_twice_is_refused_before_it_is_read(tmp_path, link):
    (tmp_path / "a.safetensors").write_text("never read")
    other = tmp_path / "a.safetensors"
    if link:
        other = tmp_path / "b.safetensors"
        other.symlink_to(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"Experts 'x' and 'y' are the same file: .*\.safetensors\. Remove one"):
        ExpertPool.from_files(tmp_path / "base", {"x": tmp_path / "a.safetensors", "y": other})


def test_copies_of_one_file_are_refused(tmp_path):
    base, experts = write(tmp_path, {"w": W}, a={"w": W + 1}, b={"w": W + 1})
    with pytest.raises(
        InputError, match=r"Experts 'a' and 'b' have identical weights \(.*b\.safetensors\)\. Remove one"
    ):
        ExpertPool.from_files(base, experts)


def test_copies_in_files_of_their_own_can_be_allowed_and_one_file_twice_cannot(tmp_path):
    base, experts = write(tmp_path, {"w": W}, a={"w": W + 1}, b={"w": W + 1})
    pool = ExpertPool.from_files(base, experts, duplicates="allow")
    assert torch.equal(*pool.task_vectors("w"))
    with pytest.raises(InputError, match="are the same file"):
        ExpertPool.from_files(base, {"a": experts["a"], "b": experts["a"]}, duplicates="allow")
    with pytest.raises(InputError, match=r"pool\.duplicates: expected 'refuse' or 'allow', found 'alow'"):
        ExpertPool.from_files(base, experts, duplicates="alow")


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_globs_given_as_one_text_are_refused(option):
    with pytest.raises(InputError, match=rf"pool\.{option}: expected a list of globs, found 'blocks\.\*'; write"):
        PoolOptions(**{option: "blocks.*"})


def test_every_expert_identical_to_the_base_is_refused(tmp_path):
    base, experts = write(tmp_path, {"w": W}, a={"w": W}, b={"w": W.half().float()})
    with pytest.raises(
        InputError, match=r"Every expert is identical to the base .*base\.safetensors: all task vectors"
    ):
        ExpertPool.from_files(base, experts)


def test_experts_with_equal_norms_but_other_weights_are_accepted():
    pool = from_states(a={"w": W + 1, "b": B}, c={"w": W - 1, "b": B})
    assert pool.report().cosines[0, 1].item() == pytest.approx(-1)


def test_include_that_matches_nothing_is_refused_and_suggests():
    with pytest.raises(
        InputError, match=r"pool\.include: the pattern 'blocks\.0\.wieght' matches no .*'blocks\.0\.weight'"
    ):
        ExpertPool.from_state_dicts(
            {"blocks.0.weight": W}, {"a": {"blocks.0.weight": W + 1}}, include=["blocks.0.wieght"]
        )


def test_prefix_that_matches_nothing_is_refused(tmp_path):
    base, experts = write(tmp_path, {"w": W}, a={"w": W + 1})
    with pytest.raises(
        InputError, match=r"base\.safetensors: no tensor to merge: .*'w', is left by the key prefix 'visual\.'"
    ):
        ExpertPool.from_files(base, experts, key_map="visual.")


def test_missing_expert_file_is_named_with_its_neighbour(tmp_path):
    base, _ = write(tmp_path, {"w": W}, mnist={"w": W + 1})
    with pytest.raises(
        FileNotFoundError, match=r"mnits\.safetensors: no such file\. Did you mean 'mnist\.safetensors'"
    ):
        ExpertPool.from_files(base, {"mnist": tmp_path / "mnits.safetensors"})


def test_state_dict_with_other_values_is_refused():
    with pytest.raises(InputError, match=r"a: expected only tensors, found other values under 'epoch'"):
        from_states(a={"w": W, "b": B, "epoch": 3})


def test_from_files_unknown_option_is_named_before_a_file_is_opened(tmp_path):
    with pytest.raises(TypeError, match="storag"):
        ExpertPool.from_files(tmp_path / "none", {"one": tmp_path / "none either"}, storag="ram")
