"""lm-eval scores an exported folder by local tasks, without a network."""

import json

import pytest

from adamerge import InputError
from adamerge.results.harness import harness_table, load_harness_tasks
from tests.support.command_line import call, refusal
from tests.support.language import llama

pytest.importorskip("lm_eval")
QUESTIONS = [
    ("what is one plus one", "two", 0),
    ("which is red plus blue", "a", 1),
    ("what is two plus two", "four", 1),
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with one task, whose data is a file beside it."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    lines = [json.dumps({"q": q, "choices": [answer, "no"], "label": label}) for q, answer, label in QUESTIONS]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    (tmp_path / "tasks" / "sums.yaml").write_text(
        f"task: my_sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/sums.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: label\nmetric_list: [{metric: acc, higher_is_better: true}, {metric: acc_norm}]\n"
    )
    return tmp_path / "tasks"


@pytest.mark.slow  # lm-eval imports for seconds, and indexes thousands of task files
@pytest.mark.filterwarnings("ignore")
def test_a_local_task_is_scored_and_unknown_ones_are_refused(tasks, tmp_path):
    folder = llama(tmp_path / "model")
    assert call("evaluate", folder, "--harness", "my_sums", "--include-path", tasks) == 0
    content = json.loads((folder / "harness.json").read_text())
    scores = content["tasks"]["my_sums"]
    assert scores["acc"]["value"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    assert scores["acc"]["higher_is_better"]
    assert ["my_sums", "acc"] in [row[:2] for row in harness_table(content).rows]
    with pytest.raises(InputError, match=r"no task 'my_sum'\. Did you mean 'my_sums'\?"):
        load_harness_tasks(["my_sum"], tasks)
    (tmp_path / "sums.jsonl").unlink()
    (tmp_path / "tasks" / "sums.yaml").write_text((tasks / "sums.yaml").read_text().replace("my_sums", "gone"))
    with pytest.raises(InputError, match="gone: cannot be loaded"):
        load_harness_tasks(["gone"], tasks)


def test_a_folder_of_tasks_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="--include-path"):
        load_harness_tasks(["sums"], tmp_path / "nothing")


def test_the_folder_of_tasks_goes_with_the_harness_alone(tmp_path, capsys):
    assert "--include-path" in refusal(capsys, "evaluate", tmp_path, "--include-path", tmp_path)
    assert "--checkpoint" in refusal(capsys, "evaluate", tmp_path, "--harness", "sums", "--checkpoint", tmp_path / "x")
