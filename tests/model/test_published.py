"""Published lists of coefficients, paired with names."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from adamerge import InputError, load_state_dict
from adamerge.commands.cli import main
from adamerge.model.published import (
    EIGHT,
    PublishedList,
    chosen_list,
    named_coefficients,
    registration_order,
    shipped_lists,
)

MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 2, "width": 16, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 10, "width": 8, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def clip():
    """A CLIP without its text transformer, as the field's image encoders are."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(MODEL["embed_dim"], MODEL["vision_cfg"], MODEL["text_cfg"])
    del model.transformer
    return model


@pytest.fixture(scope="module")
def names(clip):
    return [name for name, _ in clip.visual.named_parameters()]


def rows_of(clip, experts=8):
    """A list as published: the base's column, distinct values for the visual tower, 0.3 for what the text has left."""
    count = iter(range(10_000))
    rows = []
    for name, _ in clip.named_parameters():
        own = [0.3] * experts if not name.startswith("visual.") else [next(count) / 1000 for _ in range(experts)]
        rows.append((1.0, *own))
    return tuple(rows)


def test_registration_order_is_open_clips(clip, names):
    assert registration_order(sorted(names)) == tuple(names)
    every = [name for name, _ in clip.named_parameters()]
    assert [name.startswith("visual.") for name in every] == [False] * 3 + [True] * len(names) + [False] * 3
    with pytest.raises(InputError, match=r"lacks 'proj' and has besides 'head'"):
        registration_order([*(name for name in names if name != "proj"), "head"])


@pytest.mark.parametrize(("model", "count"), [("ViT-B-32", 152), ("ViT-B-16", 152), ("ViT-L-14", 296)])
def test_shipped_lists_have_a_row_for_each_tensor_of_their_model(model, count):
    with torch.device("meta"):
        tower = open_clip.create_model(model, load_weights=False, device="meta").visual
    names = [name for name, _ in tower.named_parameters()]
    assert len(names) == count
    assert registration_order(names) == tuple(names)
    lists = [item for name, item in shipped_lists().items() if name.endswith(f"/{model}")]
    assert len([item for item in lists if len(item.rows) > 1]) == 2
    for item in lists:
        content = named_coefficients(item, sorted(names), sorted(EIGHT))
        assert content["source"]["list"] == item.name
        rows, labels = (item.rows[3:-3], names) if len(item.rows) > 1 else (item.rows, ["all"])
        for column, expert in enumerate(EIGHT):
            expected = dict(zip(labels, (row[column] for row in rows), strict=True))
            assert content["coefficients"][expert] == expected, item.name


def test_a_list_of_another_model_is_refused(names):
    with pytest.raises(InputError, match=r"expected 32 rows.*or 38 with.*found 302\. Is it a list of another model"):
        named_coefficients(shipped_lists()["lw_adamerging/ViT-L-14"], names, EIGHT)


def test_named_coefficients_pair_rows_and_columns_by_name(clip, names):
    rows = rows_of(clip)
    experts = sorted(EIGHT)
    content = named_coefficients(PublishedList("x", rows, {"paper": "y"}), sorted(names), experts)
    assert content["experts"] == experts
    assert content["granularity"] == "layer"
    for row, name in enumerate(names):
        for column, expert in enumerate(EIGHT):
            assert content["coefficients"][expert][name] == (8 * row + column) / 1000
    plain = tuple(row[1:] for row in rows[3:-3])
    assert named_coefficients(PublishedList("x", plain, {}), names, experts)["coefficients"] == content["coefficients"]
    two = PublishedList("x", ((0.1, 0.2),), {})
    turned = named_coefficients(two, names, ["a", "b"], ["b", "a"])
    assert turned["coefficients"] == {"a": {"all": 0.2}, "b": {"all": 0.1}}


def test_named_coefficients_that_do_not_fit_are_refused(clip, names):
    rows = rows_of(clip)
    for change, experts, order, words in (
        (lambda r: r[1:], EIGHT, None, "found 37"),
        (lambda r: (*r[1:], r[0]), EIGHT, None, "Are the rows in open_clip's order"),
        (lambda r: ((2.0, *r[0][1:]), *r[1:]), EIGHT, None, "holds other values than 1"),
        (lambda r: r, ("x", *EIGHT[1:]), None, "--order NAME,NAME"),
        (lambda r: r, EIGHT[:7], EIGHT[:7], "as many columns as the pool's 7 experts.*, or one more.*, found 9"),
        (lambda r: r, EIGHT[:7], None, "as many columns as the pool's 7 experts"),
        (lambda r: tuple(row[1:] for row in r), EIGHT[:7], None, "found 8 columns for the pool's 7 experts"),
        (lambda r: tuple(row[:3] for row in r), ("a", "b"), ("a", "a"), "each once"),
    ):
        with pytest.raises(InputError, match=words):
            named_coefficients(PublishedList("x", change(rows), {}), names, experts, order)


SHIPPED = {  # rows, sum of all values, how many are 0 and 1, rows of zeros, largest value
    "tw_adamerging/ViT-B-32": (1, 2.0239, 0, 0, 0, 0.4003),
    "tw_adamergingpp/ViT-B-32": (1, 2.9828, 0, 0, 0, 0.5803),
    "tw_adamerging/ViT-B-16": (1, 1.8893, 0, 0, 0, 0.3543),
    "tw_adamergingpp/ViT-B-16": (1, 2.8078, 1, 0, 0, 0.7396),
    "lw_adamerging/ViT-B-32": (158, 303.052262688, 152, 0, 8, 0.7818),
    "lw_adamergingpp/ViT-B-32": (158, 365.02513238, 187, 0, 10, 0.781),
    "lw_adamerging/ViT-B-16": (158, 340.1092, 390, 18, 27, 1.0),
    "lw_adamergingpp/ViT-B-16": (158, 416.6052, 343, 58, 22, 1.0),
    "lw_adamerging/ViT-L-14": (302, 653.42742645, 489, 19, 17, 1.0),
    "lw_adamergingpp/ViT-L-14": (302, 822.95643298, 231, 60, 7, 1.0),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_list_is_the_published_one(name):
    found = shipped_lists()[name]
    rows, values = found.rows, [value for row in found.rows for value in row]
    assert {len(row) for row in rows} == {8}
    facts = (values.count(0), values.count(1), sum(not any(row) for row in rows), max(values))
    assert (len(rows), pytest.approx(sum(values), abs=1e-6), *facts) == SHIPPED[name]
    assert min(values) >= 0
    assert max(values) <= 1
    if len(rows) > 1:
        assert {value for row in (*rows[:3], *rows[-3:]) for value in row} == {0.3}
    assert "github.com/EnnengYang/AdaMerging" in found.source["repository"]


def test_shipped_lists_are_all_of_them():
    assert list(shipped_lists()) == list(SHIPPED)


def test_list_names_the_shipped_lists_with_their_sizes(capsys):
    code, out = call(capsys, "coefficients", "list")
    assert code == 0
    assert "lw_adamergingpp/ViT-L-14 ViT-L-14 AdaMerging++ layer 302 8" in map(
        " ".join, map(str.split, out.splitlines())
    )
    assert "Columns: sun397, cars," in out
    code, out = call(capsys, "coefficients", "list", "--json")
    found = json.loads(out)
    assert {entry["name"]: entry["rows"] for entry in found} == {name: facts[0] for name, facts in SHIPPED.items()}
    assert found[0]["granularity"] == "task"


def test_chosen_list_of_texts(tmp_path):
    rows = ((0.25, 0.5), (1.0, 0.0))
    (tmp_path / "a.txt").write_text("0.25 0.5\n1, 0\n\n")
    (tmp_path / "a.json").write_text("[[0.25, 0.5], [1, 0]]")
    for suffix in ("txt", "json"):
        assert chosen_list(str(tmp_path / f"a.{suffix}")).rows == rows, suffix
    for text, words in (("[[1, 2], [3]]", "one length"), ("[[1, NaN]]", "finite"), ("[[1, 1e400]]", "finite"),
                        ("[[" + "9" * 400 + "]]", "finite"), ("nan 1", "finite")):  # fmt: skip
        (tmp_path / "b.txt").write_text(text)
        with pytest.raises(InputError, match=words):
            chosen_list(str(tmp_path / "b.txt"))


@pytest.mark.parametrize(
    "content",
    [b"a b", b"[[1, 'x']]", b'[[1, "x"]]', b"[open()]", b"", b"[" * 100_000, b"\x80\x02", b"PK\x03\x04\xff",
     b"def get():\n    return [[1.0, 0.1]]\n", b'{"format": 1}'],
)  # fmt: skip
def test_chosen_list_of_anything_else_is_refused_and_says_how_to_write_it(tmp_path, content):
    (tmp_path / "b.py").write_bytes(content)
    with pytest.raises(InputError, match=r"b\.py: expected rows .*one line per row.*JSON list") as caught:
        chosen_list(str(tmp_path / "b.py"))
    assert "\n" not in str(caught.value)


def test_chosen_list_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"no such file, and no list of that name ships.*Did you mean 'tw_adamerging/"):
        chosen_list("tw_adamerging/ViT-B-3")
    with pytest.raises(FileNotFoundError, match=r"a\.txt: no such file"):
        chosen_list(str(tmp_path / "a.txt"))


def test_import_and_export_make_the_merge_that_the_list_says(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = {name: tensor.clone().contiguous() for name, tensor in clip.state_dict().items()}
    save_file(base, "base.safetensors")
    experts = {}
    for name in EIGHT:
        moved = {key: t + 0.1 * torch.randn_like(t) for key, t in base.items() if key.startswith("visual.")}
        experts[name] = {**base, **moved}
        save_file(experts[name], f"{name}.safetensors")
    options = [word for name in reversed(EIGHT) for word in ("--expert", f"{name}={name}.safetensors")]
    assert call(capsys, "pool", "add", "mine", "--base", "base.safetensors", *options)[0] == 0
    rows = rows_of(clip)
    (tmp_path / "rows.txt").write_text("\n".join(" ".join(map(str, row)) for row in rows))
    code, out = call(capsys, "coefficients", "import", "rows.txt", "--pool", "mine", "--out", "lw.json")
    assert code == 0
    assert "layer-wise" in out
    assert json.loads((tmp_path / "lw.json").read_text())["source"]["file"] == "rows.txt"
    assert call(capsys, "export", "--pool", "mine", "--coefficients", "lw.json", "--output", "merged")[0] == 0
    merged = load_state_dict(tmp_path / "merged" / "merged.safetensors")
    for row, (name, _) in zip(rows, clip.named_parameters(), strict=True):
        expected = base[name] + sum(
            weight * (experts[expert][name] - base[name]) for weight, expert in zip(row[1:], EIGHT, strict=True)
        )
        torch.testing.assert_close(merged[name], expected, atol=1e-5, rtol=1e-5)


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code or 0, capsys.readouterr().out
