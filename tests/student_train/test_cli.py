"""The program from outside: help, exit codes, and bad recipes that get one message and harm nothing."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

Run = Callable[..., tuple[int, str, str]]


def tree(store: Path, output: Path) -> dict[str, Any]:
    """A recipe of two phases that works."""
    data = {"store": str(store), "pass_name": "tiny"}
    common = {"data": [data], "evaluate": [{**data, "split": "dev"}], "metrics": ["accuracy"], "steps": 2, "batch_rows": 4}
    first = {"name": "first", "student": {"layers": [2, 4]}, "methods": [{"name": "hid_cls"}], **common}
    second = {"name": "second", "student": {"phase": "first"}, "methods": [{"name": "kd"}], **common}
    return {"output": str(output), "phases": [first, second]}


def write(folder: Path, recipe: object) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe), encoding="utf-8")
    return file


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from student_train.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "torchrun" in done.stdout
    assert "--smoke" in done.stdout
    assert time.perf_counter() - started < 20


def test_needs_prints_what_can_be_parsed(program: Run, sentiment: Path, tmp_path: Path) -> None:
    code, out, err = program("needs", write(tmp_path, tree(sentiment, tmp_path / "out")))
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["features"] == ["hidden.2@first", "hidden.4@first", "task_logits@row"]
    code, out, err = program("needs")
    assert code == 2
    assert "RECIPE" in err


def change(recipe: dict[str, Any], path: str, value: object) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node: Any = recipe
    for part in parents:
        node = node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("phasses", [], "unknown key 'phasses'; did you mean 'phases'?"),
        ("phases.0.student.layer", [1], "unknown key 'phases.0.student.layer'; did you mean 'layers'?"),
        ("phases.0.steps", "many", "phases.0.steps"),
        ("phases.0.steps", None, "expected one of steps and epochs; given: none"),
        ("phases.0.epochs", 1, "expected one of steps and epochs; given: both"),
        ("phases.0.batch_rows", -1, "phases.0.batch_rows"),
        ("phases.1.accumulation", 3, "phase 'second': batch_rows: expected a multiple of 3 (1 ranks x 3 accumulation steps), found 4"),
        ("phases.0.name", "../../escape", "phases.0.name"),
        ("phases.0.student.layers", [2, 5], "the source has blocks 1 to 4, found 5"),
        ("phases.0.student.layers", [0], "the source has blocks 1 to 4, found 0"),
        ("phases.0.student.layers", "all but one", "expected a list of blocks"),
        ("phases.0.student.layers", [1], "no weights of block 1; dump pass tiny with 'ship_layers: [1]'"),
        ("phases.0.student.random", {}, "expected exactly one of model, layers, phase, random; given: layers, random"),
        ("phases.0.student", {"random": {"hidden_sice": 8}}, "did you mean 'hidden_size'"),
        ("phases.0.student", {"random": {"hidden_size": 7, "num_hidden_layers": 2}}, "not a multiple of the number of attention heads"),
        ("phases.0.student", {"phase": "second"}, "starts from 'second', which is no earlier phase"),
        ("phases.1.student.phase", "frist", "which is no earlier phase; did you mean 'first'?"),
        ("phases.1.name", "first", "two phases are named 'first'"),
        ("phases.0.data.0.store", "no/such/store", "expected a store at no/such/store, found nothing"),
        ("phases.0.data.0.split", "trian", "has no split 'trian'; did you mean 'train'?"),
        ("phases.0.data.0.pass_name", "tinny", "has no pass 'tinny'; did you mean 'tiny'?"),
        ("phases.0.data.0.pass_name", None, "give its data a pass_name"),
        ("phases.0.methods.0.name", "hidcls", "did you mean 'hid_cls'?"),
        ("phases.0.methods.0.options", {"layers": [[1, 9]]}, "the teacher has blocks"),
        ("phases.0.methods.0.options", {"layerz": "last"}, "did you mean 'layers'?"),
        ("phases.1.methods.0.options", {"temperature": -1}, "temperature"),
        ("phases.0.teacher", "none", "method hid_cls learns from a teacher"),
        ("phases.1.metrics", ["acuracy"], "did you mean 'accuracy'?"),
        ("phases.1.metrics", ["pearson"], "needs labels of kind regression"),
        ("phases.1.metrics", ["perplexity"], "metric 'perplexity' needs"),
        ("phases.1.best", "f1", "best: unknown metric"),
        ("phases.1.patience", 2, "patience needs best"),
        ("phases.1.evaluate", [], "metrics need data to measure on"),
        ("phases.1.trainer", {"learning_rat": 1}, "did you mean 'learning_rate'?"),
        ("phases.1.trainer", {"max_steps": 1}, "the phase's steps"),
        ("phases.1.methods.0", {"name": "lm_kd"}, "head"),
        ("phases.1.methods.0", {"name": "hid_seq", "options": {"layers": [[1, 1]]}}, "- hidden.1"),
        ("seed", -1, "seed"),
        ("phases.0.student.labels", 3, "the student has 3 outputs, the labels of"),
    ],
)  # fmt: skip
def test_a_bad_recipe_is_one_message_and_nothing_is_harmed(
    path: str, value: object, message: str, program: Run, sentiment: Path, tmp_path: Path
) -> None:
    recipe = tree(sentiment, tmp_path / "out")
    change(recipe, path, value)
    before = sorted(sentiment.rglob("*"))
    code, _, err = program("run", write(tmp_path, recipe))
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert "phases: Tuple" not in err  # the list is there; only its item is wrong
    assert not (tmp_path / "out").exists()
    assert sorted(sentiment.rglob("*")) == before


@pytest.mark.parametrize(
    "text", ["", "- a list", "output: [", "output: x", "phases: 3\noutput: x", "\x00", "output: !!python/object:os.system {}"]
)
def test_what_is_no_recipe_is_refused(text: str, program: Run, tmp_path: Path) -> None:
    code, _, err = program("run", write(tmp_path, text))
    assert code == 2
    assert "Traceback" not in err
    assert "recipe.yaml" in err


def test_wrong_command_lines_are_refused(program: Run, sentiment: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, tree(sentiment, tmp_path / "out"))
    for arguments, message in (
        (("run", tmp_path / "absent.yaml"), "no such recipe"),
        (("run", tmp_path), "found a folder"),
        (("run", recipe, "phases.7.steps=1"), "expected an item from 0 to 1"),
        (("run", recipe, "steps"), "expected key.path=value"),
        (("run", recipe, "--phase", "frist"), "did you mean 'first'?"),
        (("run", recipe, "--phase", "second"), "goes on from phase 'first', which is not finished"),
        (("run", recipe, "--phase", "first", "--smoke"), "--smoke tries all phases"),
        (("train", recipe), "No such command"),
    ):
        code, _, err = program(*arguments)
        assert (code, message in err) == (2, True), err


def test_an_output_folder_that_holds_something_else_is_left_alone(program: Run, sentiment: Path, tmp_path: Path) -> None:
    output = tmp_path / "thesis"
    (output / "first").mkdir(parents=True)
    (output / "first" / "chapter.tex").write_text("years of work")
    code, _, err = program("run", write(tmp_path, tree(sentiment, output)))
    assert code == 2
    assert "holds something else than a run of student-train" in err
    assert [path.name for path in output.rglob("*")] == ["first", "chapter.tex"]
    file = tmp_path / "file"
    file.write_text("x")
    code, _, err = program("run", write(tmp_path, tree(sentiment, file)))
    assert (code, file.read_text()) == (2, "x")
    code, _, err = program("run", write(tmp_path, tree(sentiment, file / "below")))
    assert (code, file.read_text()) == (2, "x")
    assert f"found a file: {file}" in err


def test_a_store_of_another_tokenizer_or_an_unfinished_pass_is_refused(
    program: Run, stores: ModuleType, sentiment: Path, tmp_path: Path
) -> None:
    recipe = tree(sentiment, tmp_path / "out")
    other = stores.write_teacher(tmp_path / "other", "classification")
    tokenizer = stores.tokenizer()
    tokenizer.add_tokens(["brilliant"])
    tokenizer.save_pretrained(other)
    recipe["phases"][0]["student"] = {"model": {"model": str(other), "head": "classification"}}
    code, _, err = program("run", write(tmp_path, recipe))
    assert (code, "rows.tokenizer is" in err) == (2, True), err

    unfinished = tmp_path / "unfinished"
    shutil.copytree(sentiment, unfinished)
    shutil.rmtree(unfinished / "commits")
    code, _, err = program("run", write(tmp_path, tree(unfinished, tmp_path / "out")))
    assert code == 2
    assert "is unfinished (0 of" in err
    assert not (tmp_path / "out").exists()


def test_several_processes_train_one_phase_a_launch(program: Run, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = program("run", write(tmp_path, tree(sentiment, tmp_path / "out")))
    assert code == 2
    assert "add --phase with one of first, second" in err
