"""Models of transformers from the command line: adapted, merged, packed and exported as folders that load there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.command_line import QUIET, call
from tests.support.model_folders import (
    new_model,
    save_family,
    save_family_with_heads,
    save_model,
    save_processor,
)

pytestmark = QUIET


def quiet_peft(test):
    """Let peft warn of itself and of what it uses in transformers."""
    for message in ("`is_gradient_checkpointing` is deprecated", "Setting `save_embedding_layers`"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


DATA = """
defaults: [folders]
batch_size: 4
num_workers: 0
tasks:
  one: &task
    _target_: adamerge.data.Task
    dataset: {{_target_: tests.support.model_folders.Items, kind: {kind}, seed: 1}}
  two:
    <<: *task
    dataset: {{_target_: tests.support.model_folders.Items, kind: {kind}, seed: 2}}
"""


def ok(*arguments: str) -> None:
    """Run a command that must succeed."""
    assert call(*arguments) == 0


def adapt(folder: Path, kind: str, *overrides: str) -> Path:
    """Adapt the folders ``base``, ``one`` and ``two`` in a folder to items of a kind; return the run's folder."""
    (folder / "configs" / "data").mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "data" / "items.yaml").write_text(DATA.format(kind=kind))
    ok(
        "adapt",
        f"--config-dir={folder / 'configs'}",
        "data=items",
        "pool=files",
        f"pool.base={folder / 'base'}",
        f"pool.experts={{one: {folder / 'one'}, two: {folder / 'two'}}}",
        "backbone=transformers",
        "trainer=cpu",
        "logger=none",
        "report=false",
        "evaluate=false",
        "steps=2",
        f"run_dir={folder / 'run'}",
        *overrides,
    )
    return folder / "run"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LlamaForCausalLM", "text"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("Qwen2ForCausalLM", "text"),
                ("GPT2LMHeadModel", "text"),
                ("T5ForConditionalGeneration", "text"),
                ("BertForTokenClassification", "text"),
                ("ViTForImageClassification", "image"),
                ("SegformerForSemanticSegmentation", "image"),
                ("LlavaForConditionalGeneration", "both"),
            )
        ),
    ],
)
def test_adapted_and_exported(name: str, kind: str, tmp_path: Path) -> None:
    for folder in save_family(name, tmp_path).values():
        if kind != "text":
            save_processor(name, folder)
    run = adapt(tmp_path, kind)
    ok("export", str(run), "--to", "hf", "--out", str(tmp_path / "hf"))
    import transformers

    loaded, info = getattr(transformers, name).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = getattr(transformers, name).from_pretrained(tmp_path / "base").state_dict()
    assert any(not torch.equal(tensor, base[key]) for key, tensor in loaded.state_dict().items())
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f'{name}.from_pretrained("FOLDER")' in card


def _adapters(folder: Path, name: str, targets: object, **options: object) -> None:
    """Write a base and two experts of it that peft made, of ranks 1 and 2."""
    peft = pytest.importorskip("peft")
    save_model(new_model.__wrapped__(name, 0), folder / "base")
    for seed, expert in enumerate(("one", "two"), 1):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=seed, target_modules=targets, init_lora_weights=False, **options)
        adapted = peft.get_peft_model(new_model.__wrapped__(name, 0), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                parameter += 0.1 * parameter.requires_grad
        adapted.save_pretrained(folder / expert)


@quiet_peft
@pytest.mark.parametrize(
    "granularity",
    ["row", *(pytest.param(name, marks=pytest.mark.slow) for name in ("task", "layer", "column", "rank"))],
)
@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("LlamaForCausalLM", ["q_proj", "down_proj", "embed_tokens"], {}),
        pytest.param("GPT2LMHeadModel", ["c_attn", "c_fc"], {"fan_in_fan_out": True}, marks=pytest.mark.slow),
    ],
)
def test_adapter_of_the_merge_loads_in_peft(tmp_path: Path, name, targets, options, granularity) -> None:
    import transformers

    _adapters(tmp_path, name, targets, **options)
    peft = pytest.importorskip("peft")
    run = adapt(tmp_path, "text", f"granularity={granularity}", "optimizer.lr=0.1")
    ok("export", str(run), "--to", "peft", "--out", str(tmp_path / "adapter"))
    kind = getattr(transformers, name)
    base = kind.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    merged = kind.from_pretrained(run / "model").state_dict()
    for key, tensor in adapted.state_dict().items():
        torch.testing.assert_close(tensor, merged[key], rtol=0, atol=2e-5)
    assert call("export", str(run), "--to", "peft", "--out", str(tmp_path / "adapter")) == 2
    ok("export", str(run), "--to", "peft", "--rank", "1", "--out", str(tmp_path / "short"))
    assert json.loads((tmp_path / "short" / "adapter_config.json").read_text())["r"] == 1


@quiet_peft
def test_what_no_adapter_holds_is_refused_by_name(tmp_path: Path, capsys) -> None:
    _adapters(tmp_path, "LlamaForCausalLM", ["q_proj"], modules_to_save=["norm"])
    run = adapt(tmp_path, "text")
    capsys.readouterr()
    assert call("export", str(run), "--to", "peft", "--out", str(tmp_path / "adapter")) == 2
    said = capsys.readouterr().err
    assert "found others in " in said
    assert "'model.norm.weight'" in said
    assert not (tmp_path / "adapter").exists()


@quiet_peft
def test_adapters_beside_the_base_learn_what_the_merge_learns(tmp_path: Path) -> None:
    _adapters(tmp_path, "LlamaForCausalLM", "all-linear")
    learned = []
    for engine in ("merged", "beside"):
        options = ("granularity=rank", "optimizer=sgd", f"encoder.engine={engine}", "encoder.checkpoint=true")
        run = adapt(tmp_path, "text", *options)
        learned.append(load_file(run / "merged.safetensors"))
        shutil.rmtree(tmp_path / "configs")
        shutil.rmtree(run)
    assert all(torch.allclose(learned[0][key], learned[1][key], rtol=0, atol=1e-5) for key in learned[0])
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert any((learned[0][key] - tensor).abs().max() > 0.01 for key, tensor in base.items())


@pytest.mark.slow
def test_run_from_a_rules_merge_is_gone_on_with_and_leaves_a_folder(tmp_path: Path) -> None:
    save_family("LlamaForCausalLM", tmp_path)
    options = ["start=auto", "init=0", "trainer.precision=auto", "resume=auto", f"run_dir={tmp_path / 'run'}"]
    run = adapt(tmp_path, "text", *options)
    written = (run / "merged.safetensors").read_bytes()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (run / "start").iterdir()}
    assert (run / "model" / "config.json").is_file()
    adapt(tmp_path, "text", *options)
    assert (run / "merged.safetensors").read_bytes() == written


@quiet_peft
@pytest.mark.slow
def test_two_processes_with_parts_of_the_base_learn_what_one_does(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    _adapters(tmp_path, "LlamaForCausalLM", "all-linear")
    learned = []
    parts = ("trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=2")
    for options in ((), parts):
        run = adapt(tmp_path, "text", "granularity=rank", "optimizer=sgd", "encoder.engine=beside", *options)
        learned.append(load_file(run / "merged.safetensors"))
        shutil.rmtree(tmp_path / "configs")
        shutil.rmtree(run)
    assert all(torch.allclose(learned[0][key], learned[1][key], rtol=0, atol=1e-6) for key in learned[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification"])
def test_merged_by_rules_and_with_transforms(name: str, tmp_path: Path) -> None:
    folders = save_family(name, tmp_path)
    files = ["--base", str(folders["base"]), *(f"--expert={expert}={folders[expert]}" for expert in ("one", "two"))]
    merges = [adapt(tmp_path, "text", "transform=ties")]
    for rule in ("ties", "iso_c", "tsvm"):
        merges.append(tmp_path / rule)
        ok("merge", "--rule", rule, *files, "--out", str(merges[-1]))
    for transform in ("breadcrumbs", "lines"):
        merges.append(tmp_path / transform)
        ok("transform", "--rule", transform, *files, "--out", str(tmp_path / f"{transform}_packed"))
        pool = str(tmp_path / f"{transform}_packed" / "pool.yaml")
        ok("merge", "--rule", "task_arithmetic", "--pool", pool, "--out", str(merges[-1]))
    weights = set()
    for merge in merges:  # each is loaded back, compared and, where it can, lets say something
        ok("export", str(merge), "--to", "hf", "--out", str(tmp_path / "hf" / merge.name))
        weights.add((tmp_path / "hf" / merge.name / "model.safetensors").read_bytes())
    assert len(weights) == len(merges)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "expert"),
    [
        ("BertModel", "BertForSequenceClassification"),
        ("BertForMaskedLM", "BertForSequenceClassification"),
        ("DistilBertForMaskedLM", "DistilBertForSequenceClassification"),
    ],
)
def test_export_with_the_head_of_a_task(base: str, expert: str, tmp_path: Path) -> None:
    _, experts = save_family_with_heads(base, expert, tmp_path, (2, 2))
    run = adapt(tmp_path, "text", "backbone.auto=AutoModelForSequenceClassification")
    ok("export", str(run), "--to", "hf", "--task", "one", "--out", str(tmp_path / "one_hf"))
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one_hf")
    own = {name: tensor for name, tensor in experts["one"].state_dict().items() if "class" in name or "pooler" in name}
    base_keys = set(new_model(base).state_dict())
    assert all(torch.equal(loaded.state_dict()[name], own[name]) for name in own.keys() - base_keys)
    assert loaded.config.id2label == {0: "bad", 1: "good"}
    ok("export", str(run), "--to", "hf", "--out", str(tmp_path / "shared"))
    assert json.loads((tmp_path / "shared" / "config.json").read_text())["architectures"] == [base]


def packed_mixtral(folder: Path) -> str:
    """Write a base and experts of Mixtral, which the library puts together at loading; return their packed pool."""
    folders = save_family("MixtralForCausalLM", folder)
    lines = [f"base: {folders['base']}", "experts:", f"  one: {folders['one']}", f"  two: {folders['two']}"]
    (folder / "pool.yaml").write_text("\n".join(lines))
    ok("pool", "pack", str(folder / "pool.yaml"), "--through", "transformers", "--out", str(folder / "packed"))
    return str(folder / "packed" / "pool.yaml")


def test_pool_packed_through_the_library_merges_and_is_written_as_files_have_it(tmp_path: Path) -> None:
    packed = packed_mixtral(tmp_path)
    ok("merge", "--rule", "weight_average", "--pool", packed, "--out", str(tmp_path / "merged"))
    ok("export", str(tmp_path / "merged"), "--to", "hf", "--out", str(tmp_path / "hf"))
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    with (
        safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file,
        safe_open(tmp_path / "base" / "model.safetensors", "pt") as base,
    ):
        assert set(file.keys()) == set(base.keys())
    models = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two", "hf")}
    for key, tensor in models["hf"].items():
        torch.testing.assert_close(tensor, (models["one"][key] + models["two"][key]) / 2)


@pytest.mark.slow  # five commands and four loads by the library
def test_packed_mixtral_is_adapted_and_its_layers_swapped(tmp_path: Path) -> None:
    packed = packed_mixtral(tmp_path)
    run = adapt(tmp_path, "text", "pool.base=null", "pool.experts=null", f"pool.file={packed}")
    swapping = [f"--set={option}" for option in ("outer=one", "inner=two", "top=0")]
    ok("merge", "--rule", "layer_swapping", *swapping, "--pool", packed, "--out", str(tmp_path / "swap"))
    for source in (run, tmp_path / "swap"):
        ok("export", str(source), "--to", "hf", "--out", str(source) + "_hf")
    from transformers import AutoModelForCausalLM

    models = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two")}
    swapped = AutoModelForCausalLM.from_pretrained(tmp_path / "swap_hf").state_dict()
    for key, tensor in swapped.items():
        torch.testing.assert_close(tensor, models["two" if ".layers.1." in key else "one"][key])
