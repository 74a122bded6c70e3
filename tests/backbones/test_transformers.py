"""The backbone transformers: names, heads, tied weights, vocabularies and inputs, on tiny models of real classes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from adamerge.backbones import Transformers
from adamerge.checkpoints.model_folder import find_model
from adamerge.data.batch import Outputs
from adamerge.data.task import Task
from adamerge.data.texts import Text, Texts
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import InputError
from adamerge.pool.pool import ExpertPool
from adamerge.results.text_scores import next_tokens, score_texts
from tests.support.model_folders import (
    new_model,
    save_family,
    save_family_with_heads,
    save_file_of,
    save_model,
    save_tokenizer,
)

CLASSES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "GPT2LMHeadModel",
    "T5ForConditionalGeneration",
    "BertForTokenClassification",
    "ViTForImageClassification",
    "SegformerForSemanticSegmentation",
    "LlavaForConditionalGeneration",
)


def backbone_of(folders: Mapping[str, Path], **options: Any) -> Transformers:
    """Return a backbone for a pool's folders."""
    experts = {name: path for name, path in folders.items() if name != "base"}
    return Transformers(pool={"base": folders["base"], "experts": experts}, **options)


def pool_for(backbone: Transformers) -> ExpertPool:
    """Open the pool of a backbone, as a run does."""
    assert backbone.pool is not None
    return ExpertPool.from_files(
        backbone.pool["base"],
        backbone.pool["experts"],
        key_map=backbone.names,
        tied=backbone.tied,
        exclude=backbone.exclude,
        extended=backbone.extended,
    )


@pytest.mark.parametrize("name", CLASSES)
def test_network_without_weights_gives_the_library_s_logits(name: str, tmp_path: Path) -> None:
    folders = save_family(name, tmp_path)
    backbone = backbone_of(folders)
    pool, network = pool_for(backbone), backbone.encoder()
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert {name for name, _ in network.named_parameters()} == {*pool.names, *pool.fixed}
    import transformers

    expected = getattr(transformers, name).from_pretrained(folders["two"]).eval()
    inputs = _inputs(expected)
    buffers = pool.buffers(dict(network.named_buffers()), "two")
    parameters = {**pool.fixed, **pool.expert_parameters("two"), **buffers}
    with torch.no_grad():
        logits = torch.func.functional_call(network, parameters, kwargs=inputs, tie_weights=True).logits
        assert torch.equal(logits, expected(**inputs).logits)


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return a batch for a tiny model."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 20, (2, 7), generator=generator)
    images = torch.randn(2, 3, 32 if "Segformer" in type(model).__name__ else 16, 32, generator=generator)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": images if images.shape[2] == 32 else images[..., :16]}
    if "Llava" in type(model).__name__:
        ids[:, 1:5] = 5
        return {"input_ids": ids, "pixel_values": images[..., :16]}
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {})}


OWN_HEADS = {
    "BertModel": ("BertForSequenceClassification", "classifier"),
    "BertForMaskedLM": ("BertForSequenceClassification", "bert.pooler, classifier"),
    "DistilBertForMaskedLM": ("DistilBertForSequenceClassification", "pre_classifier, classifier"),
}


@pytest.mark.parametrize("base", OWN_HEADS)
def test_experts_with_heads_of_their_own_over_a_bare_base(base: str, tmp_path: Path) -> None:
    expert, path = OWN_HEADS[base]
    folders, tuned = save_family_with_heads(base, expert, tmp_path)
    backbone = backbone_of(folders, auto="AutoModelForSequenceClassification")
    pool = pool_for(backbone)
    head = backbone.head_module
    assert head is not None
    assert head.path == path
    network, ids = backbone.encoder(), torch.randint(6, 20, (2, 7))
    assert set(pool.names) == {name for name, _ in network.named_parameters()}
    tasks = {name: Task(dataset=[(torch.zeros(1), 0)]) for name in ("one", "two")}
    heads = backbone.heads(pool.source, {name: pool.checkpoint(name) for name in ("one", "two")}, tasks)
    for name, model in tuned.items():
        parameters = {**pool.expert_parameters(name), **dict(network.named_buffers())}
        with torch.no_grad():
            output = torch.func.functional_call(network, parameters, kwargs={"input_ids": ids}, strict=False)
            outputs = backbone.read(output, {"input_ids": ids})
            assert outputs.features is not None
            torch.testing.assert_close(heads[name](outputs.features), model(ids).logits)


def test_modules_after_the_body_that_read_all_positions_are_refused(tmp_path: Path) -> None:
    folders, _ = save_family_with_heads("ModernBertModel", "ModernBertForSequenceClassification", tmp_path)
    backbone = backbone_of(folders, auto="AutoModelForSequenceClassification")
    pool = pool_for(backbone)
    with pytest.raises(InputError, match="other positions than the first"):
        backbone.heads(pool.source, {"one": pool.checkpoint("one")}, {"one": Task(dataset=[(torch.zeros(1), 0)])})


def test_tied_weights_under_both_names_are_accepted_when_equal(tmp_path: Path) -> None:
    folders = save_family("Qwen2ForCausalLM", tmp_path)
    for folder in folders.values():
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        save_file_of(model, folder / "model.safetensors")
    backbone = backbone_of(folders)
    assert backbone.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    pool = pool_for(backbone)
    assert "lm_head.weight" not in pool.names
    checkpoint = find_model(folders["one"], lambda _: True).checkpoint
    assert backbone.problems({"one": checkpoint}) == []
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    save_file_of(model, folders["two"] / "model.safetensors")
    checkpoint = find_model(folders["two"], lambda _: True).checkpoint
    assert "differ, but Qwen2ForCausalLM ties" in backbone.problems({"two": checkpoint})[0]


def test_vocabulary_shared_takes_further_rows_of_the_one_expert_that_has_them(tmp_path: Path) -> None:
    folders = save_family("LlamaForCausalLM", tmp_path)
    import transformers

    longer = transformers.AutoModelForCausalLM.from_pretrained(folders["two"])
    longer.resize_token_embeddings(66)
    save_model(longer, folders["two"], words=["other"])
    with pytest.raises(InputError, match=r"'two'.*66 tokens, but the base has 64.*backbone.vocabulary=shared"):
        pool_for(backbone_of(folders))
    backbone = backbone_of(folders, vocabulary="shared")
    pool = pool_for(backbone)
    embeddings = "model.embed_tokens.weight"
    assert pool.shapes[embeddings] == (66, 16)
    assert torch.equal(pool.base[embeddings][64:], longer.get_input_embeddings().weight[64:])
    assert pool.task_vectors(embeddings)[:, 64:].abs().max() == 0
    assert dict(backbone.encoder().named_parameters())[embeddings].shape == (66, 16)
    assert backbone.preprocess()("other")["input_ids"].tolist() == [6]  # the tokenizer is that expert's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto": "AutoModelForSeq2SeqLM"}, r"has no model of model_type 'llama'.*AutoModelForCausalLM"),
        ({"auto": "AutoModelForCasualLM"}, r"Did you mean 'AutoModelForCausalLM'"),
        ({"head": "lmhead"}, r"backbone.head: LlamaForCausalLM has no module 'lmhead'"),
        ({"features": "pool"}, r"backbone.features"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    folders = {"base": save_model(new_model("LlamaForCausalLM"), tmp_path / "base")}
    with pytest.raises(InputError, match=message):
        assert backbone_of(folders, **options).exclude


def test_code_of_a_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "configuration.Mine"}})
    )
    (tmp_path / "configuration.py").write_text("raise SystemExit('run')")
    with pytest.raises(InputError, match=r"auto_map.*never run"):
        Transformers(model=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"num_hidden_layers": 100_000}, "more than 100000 parts", marks=pytest.mark.slow),
        ({"num_labels": 10**9}, "num_labels: expected"),
        ({"pad_token_id": 10**5}, "cannot be built from its configuration"),
        ({"configuration_files": ["config.9.json"]}, "configuration_files"),
    ],
)
def test_a_network_of_absurd_size_is_refused_before_it_is_built(change, message, tmp_path: Path) -> None:
    folder = save_model(new_model("LlamaForCausalLM"), tmp_path / "base")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(InputError, match=message):
        assert Transformers(model=folder).exclude


def test_tokenizers_that_are_no_files_are_refused(tmp_path: Path) -> None:
    folders = {"base": save_model(new_model("LlamaForCausalLM"), tmp_path / "base")}
    (tmp_path / "base" / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "base" / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json: expected a file, found a named pipe"):
        backbone_of(folders).preprocess()("a")


def test_texts_become_ids_with_the_positions_of_the_answer(tmp_path: Path) -> None:
    folders = {"base": save_model(new_model("LlamaForCausalLM"), tmp_path / "base")}
    backbone = backbone_of(folders, max_length=6)
    preprocess = backbone.preprocess()
    sample = preprocess(Text("2 plus 3 equals", "five"))
    assert sample["input_ids"].tolist() == [16, 18, 17, 19, 20]
    assert sample["_answer"].tolist() == [False, False, False, False, True]
    long = "a very very good film was 2 plus 3"
    assert len(preprocess(long)["input_ids"]) == 6
    assert preprocess.count_cut([long, "a film", long]) == 2  # type: ignore[attr-defined]
    left = backbone_of(folders, max_length=6, truncation_side="left").preprocess()(long)["input_ids"].tolist()
    assert left == preprocess("good film was 2 plus 3")["input_ids"].tolist()
    learned = Transformers(model=save_model(new_model("GPT2LMHeadModel"), tmp_path / "gpt2"), max_length=41)
    with pytest.raises(InputError, match="max_length: 41, but GPT2LMHeadModel has learned 40 positions"):
        learned.preprocess()
    batch = backbone.collate([sample, preprocess("good film")])
    assert batch["input_ids"].tolist() == [[16, 18, 17, 19, 20], [6, 9, 0, 0, 0]]
    valid = backbone.valid(batch)
    assert valid is not None
    assert valid.tolist() == [[True] * 4, [True, False, False, False]]
    answers = backbone_of(folders, positions="answer").valid(batch)
    assert answers is not None
    assert answers.nonzero().tolist() == [[0, 3], [1, 1]]  # without an answer: where one would begin


def test_a_decoder_is_scored_by_what_it_is_to_say(tmp_path: Path) -> None:
    model = new_model("T5ForConditionalGeneration")
    backbone = Transformers(model=save_model(model, tmp_path))
    texts = [Text("2 plus 3 equals", "five"), Text("a film", "very good film"), Text("a film")]
    batch = backbone.collate([backbone.preprocess()(text) for text in texts])
    assert batch["decoder_input_ids"].tolist() == [[0, 0, 0], [0, 15, 6], [0, 0, 0]]
    outputs = backbone.read(model(**{key: value for key, value in batch.items() if not key.startswith("_")}), batch)
    said = next_tokens(outputs, batch)
    assert said is not None
    logits, targets, lengths = said
    assert targets.tolist() == [20, 15, 6, 9]
    assert lengths.tolist() == [1, 3, 0]
    ids = torch.tensor([[15, 6, 9]])
    alone = model(input_ids=torch.tensor([[8, 9]]), labels=ids)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits[1:], targets[1:]), alone.loss)
    questions = Texts([{"prompt": "a film", "choices": ["good", "bad"], "label": n} for n in (0, 1)])
    task = Task(adapt=questions, evaluate=questions)
    data = UnlabeledTasks({"one": task}, preprocess=backbone.preprocess(), collate=backbone.collate)

    def outputs(inputs: Any, _: str) -> Outputs:
        given = {key: value for key, value in inputs.items() if not key.startswith("_")}
        return backbone.read(model(**given), inputs)

    score = score_texts(outputs, data, "one", torch.device("cpu"))
    assert score is not None
    assert (score.metric, score.accuracy) == ("choice accuracy", 0.5)


def test_padding_on_either_side_gives_the_same_logits(tmp_path: Path) -> None:
    model = new_model("LlamaForCausalLM")
    texts = ("2 plus 3 equals", "a good film")
    logits = {}
    for side in ("left", "right"):
        folder = save_model(model, tmp_path / side, padding_side=side)
        backbone = Transformers(model=folder)
        batch = backbone.collate([backbone.preprocess()(text) for text in texts])
        with torch.no_grad():
            output = model(**{key: value for key, value in batch.items() if not key.startswith("_")})
        outputs = backbone.read(output, batch)
        valid = backbone.valid(batch)
        assert valid is not None
        logits[side] = outputs.logits[:, :-1][valid]
    torch.testing.assert_close(logits["left"], logits["right"], rtol=0, atol=1e-6)


def test_tokenizers_without_a_pad_token_or_templates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_model(new_model("LlamaForCausalLM"), tmp_path / "base")
    save_tokenizer(folder, pad_token=None)
    inputs = Transformers(model=folder).preprocess()
    with caplog.at_level("INFO"):
        inputs("a good film")
        assert inputs.pad_token == 2  # type: ignore[attr-defined]
    assert "no pad token: '[EOS]' fills up shorter texts" in caplog.text
    with pytest.raises(InputError, match="no chat template"):
        inputs(Text(({"role": "user", "content": "a"},)))
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(InputError, match=r"no tokenizer.*tokenizer\.json"):
        Transformers(model=folder).preprocess()("a good film")


def test_experts_of_another_architecture_are_refused(tmp_path: Path) -> None:
    folders = save_family("LlamaForCausalLM", tmp_path, ["one"])
    folders["two"] = save_model(new_model("GPT2LMHeadModel"), tmp_path / "two")
    with pytest.raises(InputError, match="'two': model_type 'gpt2', but the base has 'llama'"):
        pool_for(backbone_of(folders))
    config = json.loads((folders["one"] / "config.json").read_text())
    (folders["one"] / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(InputError, match="'one': hidden_size 32, but the base has 16"):
        pool_for(backbone_of(folders))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of transformers
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "ViTForImageClassification", "BertForSequenceClassification"])
def test_adapters_trained_on_the_network_are_its_experts(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = new_model.__wrapped__(name, 0)
    is_bert = name.startswith("Bert")
    folders = {"base": save_model(model.bert if is_bert else model, tmp_path / "base")}
    targets = ["query"] if is_bert else ["q_proj"]
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=targets, init_lora_weights=False, task_type="SEQ_CLS" if is_bert else None
    )
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "one")
    backbone = backbone_of({**folders, "one": tmp_path / "one"}, auto=_AUTO[name])
    pool, network = pool_for(backbone), backbone.encoder()
    inputs = _inputs(model)
    parameters = {**pool.expert_parameters("one"), **dict(network.named_buffers())}
    heads = backbone.heads(pool.source, {"one": pool.checkpoint("one")}, {"one": Task(dataset=[(torch.zeros(1), 0)])})
    with torch.no_grad():
        output = torch.func.functional_call(network, parameters, kwargs=inputs, strict=False)
        outputs = backbone.read(output, inputs)
        logits = heads["one"](outputs.features) if heads else outputs.logits
        torch.testing.assert_close(logits, adapted(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # peft warns of tied weights
def test_adapters_of_a_tied_output_layer_are_those_of_the_embeddings_or_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = save_model(new_model("Qwen2ForCausalLM"), tmp_path / "base")
    options: dict[str, dict[str, Any]] = {
        "apart": {"target_modules": ["q_proj", "lm_head"]},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "tied": {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "ensure_weight_tying": True},
    }
    for name, chosen in options.items():
        model = new_model.__wrapped__("Qwen2ForCausalLM")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **chosen)).eval()
        for key, parameter in adapted.named_parameters():
            if "modules_to_save" in key:
                parameter.data += 0.1
        adapted.save_pretrained(tmp_path / name)
        backbone = backbone_of({"base": base, "one": tmp_path / name})
        if name != "tied":
            with pytest.raises(InputError, match=r"trains 'lm_head.*Tied weights"):
                pool_for(backbone)
            continue
        pool, network, inputs = pool_for(backbone), backbone.encoder(), _inputs(model)
        parameters = {**pool.expert_parameters("one"), **dict(network.named_buffers())}
        with torch.no_grad():
            output = torch.func.functional_call(network, parameters, kwargs=inputs, tie_weights=True)
            torch.testing.assert_close(output.logits, adapted(**inputs).logits)


_AUTO = {
    "LlamaForCausalLM": "AutoModelForCausalLM",
    "ViTForImageClassification": "AutoModelForImageClassification",
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
}


def test_heads_of_segmentation_have_their_classes_last(tmp_path: Path) -> None:
    name = "SegformerForSemanticSegmentation"
    folders = {"base": save_model(new_model(name), tmp_path / "base")}
    tuned = new_model(name, 1, num_labels=3)
    folders["one"] = save_model(tuned, tmp_path / "one")
    backbone = backbone_of(folders)
    pool, network, inputs = pool_for(backbone), backbone.encoder(), _inputs(tuned)
    head = backbone.heads(pool.source, {"one": pool.checkpoint("one")}, {"one": Task(dataset=[(torch.zeros(1), 0)])})
    parameters = {**pool.expert_parameters("one"), **pool.buffers(dict(network.named_buffers()), "one")}
    with torch.no_grad():
        output = torch.func.functional_call(network, parameters, kwargs=inputs, strict=False)
        features = backbone.read(output, inputs).features
        assert features is not None
        torch.testing.assert_close(head["one"](features), tuned(**inputs).logits.movedim(1, -1))
        assert head["one"](torch.zeros(1, features.shape[-1])).shape == (1, 3)
