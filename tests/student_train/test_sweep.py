"""Sweeps before they start: which trials there are, what is refused, what stores lack; and how results are ranked."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from store.strict import load_yaml
from student_train.ranking import ranked, table
from student_train.sweep import Sweep, trials
from student_train.sweep_check import check_sweep
from student_train.sweep_run import trial_environment
from student_train.trial import Row, begin
from teacher_dump.dump import dump
from teacher_dump.recipe import DumpRecipe

Run = Callable[..., tuple[int, str, str]]
RATE = "phases.0.trainer.learning_rate"


def test_trials_are_all_combinations_with_all_seeds(tiny_sweep: ModuleType, tmp_path: Path) -> None:
    search = {"method": tiny_sweep.METHODS, RATE: [0.1, 0.2]}
    tried = trials(load_yaml(Sweep, tiny_sweep.write_sweep(tmp_path, tmp_path / "no store", search=search)))
    found = [
        (trial.recipe.phases[0].methods[0].name, trial.recipe.phases[0].trainer["learning_rate"], trial.recipe.seed) for trial in tried
    ]
    assert found == [(method, rate, seed) for method in ("kd", "task_loss") for rate in (0.1, 0.2) for seed in (3, 5)]
    assert {trial.recipe.output for trial in tried} == {tmp_path / "out" / "trials" / trial.name for trial in tried}
    assert len({trial.name for trial in tried}) == 8
    assert tried[0].name.startswith("method=kd-learning_rate=0.1-seed=3-")


def test_names_follow_from_what_is_set_and_not_from_the_rest_of_the_grid(tiny_sweep: ModuleType, tmp_path: Path) -> None:
    def names(**changes: object) -> list[str]:
        return [trial.name for trial in trials(load_yaml(Sweep, tiny_sweep.write_sweep(tmp_path, tmp_path, **changes)))]

    few, more = names(search={RATE: [0.1]}), names(search={RATE: [0.3, 0.1]}, seeds=[3, 5, 7])
    assert set(few) < set(more)
    assert names() == names()
    heavier = {"kd": {"phases.0.methods": [{"name": "kd", "weight": 2.0}]}}
    assert not set(names(search={"method": heavier})) & set(names())  # same words, other settings


def test_shared_options_of_a_recipe_change_together(tiny_sweep: ModuleType, tmp_path: Path) -> None:
    file = tiny_sweep.write_sweep(tmp_path, tmp_path, search={RATE: [0.5]}, seeds=[0])
    tree = yaml.safe_load((tmp_path / "train.yaml").read_text())
    tree["phases"].append({**tree["phases"][0], "name": "second"})  # the same objects: anchors in the file
    tiny_sweep.write(tmp_path / "train.yaml", tree)
    (trial,) = trials(load_yaml(Sweep, file))
    assert [phase.trainer["learning_rate"] for phase in trial.recipe.phases] == [0.5, 0.5]
    assert trial.scored.name == "second"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serch": {}}, "unknown key 'serch'; did you mean 'search'?"),
        ({"search": {}}, "search"),
        ({"search": {RATE: []}}, RATE),
        ({"search": {RATE: 0.1}}, f"search.{RATE}: expected a list of values, alternatives by name, or a range with low"),
        ({"search": {RATE: {"low": 0.1}}}, f"search.{RATE}.high: required, not given"),
        ({"search": {RATE: [0.1, 0.1]}}, "found one of them twice"),
        ({"search": {"seed": [1]}}, "seed of a trial follow"),
        ({"search": {"a": {"b": {"output": "x"}}}}, "output of a trial follow"),
        ({"search": {"phases.0.methodz": [[]]}}, "unknown key 'phases.0.methodz'; did you mean 'methods'?"),
        ({"search": {"phases.7.steps": [1]}}, "expected an item from 0 to 0, found '7'"),
        ({"search": {"phases.0.trainer.learning_rat": [1]}}, "did you mean 'learning_rate'?"),
        ({"search": {"phases.0.methods.0.name": ["kd", "pdk"]}}, "name=pdk: phase 'only': unknown method 'pdk'; did you mean 'pkd'?"),
        ({"seeds": [1, 1]}, "expected different seeds"),
        ({"seeds": [-1]}, "seeds.0"),
        ({"metric": "acuracy"}, "measures no 'acuracy'; did you mean 'accuracy'?"),
        ({"phase": "onyl"}, "did you mean 'only'?"),
        ({"devices": ["gpu"]}, "devices.0"),
        ({"devices": ["cuda:99"]}, "found cuda:99"),
        ({"recipe": "absent.yaml"}, "no such recipe: absent.yaml"),
        ({"storage": "$ABSENT_STUDIES"}, "in the environment variable ABSENT_STUDIES, which is not set"),
        (
            {"pruner": "median", "search": {"phases.0.trainer.eval_strategy": ["no"]}},
            "pruner: phase 'only' measures nothing while it trains",
        ),
        ({"sampler": "tpe", "trials": 2, "search": {"phases.0.student.layers.1": {"low": 3, "high": 9}}}, "blocks 1 to 4, found 9"),
    ],
)
def test_a_bad_sweep_is_one_message_before_anything_is_written(
    changes: dict[str, object], message: str, program: Run, tiny_sweep: ModuleType, sentiment: Path, tmp_path: Path
) -> None:
    code, _, err = program("sweep", tiny_sweep.write_sweep(tmp_path, sentiment, **changes))
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_several_combinations_is_said_once(
    program: Run, tiny_sweep: ModuleType, sentiment: Path, tmp_path: Path
) -> None:
    search = {"phases.0.student.layers": [[2], [9]], RATE: [0.1, 0.2, 0.3]}
    code, _, err = program("sweep", tiny_sweep.write_sweep(tmp_path, sentiment, search=search))
    assert code == 2
    assert err.count("the source has blocks 1 to 4, found 9") == 1
    assert "layers=[9] learning_rate=0.1 and 2 other combinations: phase 'only'" in err


def test_a_folder_that_holds_something_else_is_left_alone(program: Run, tiny_sweep: ModuleType, sentiment: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    code, _, err = program("sweep", tiny_sweep.write_sweep(tmp_path, sentiment))
    assert code == 2
    assert "holds something else than a sweep" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_workers_that_begin_at_once_make_one_folder(tiny_sweep: ModuleType, tmp_path: Path) -> None:
    file = tiny_sweep.write_sweep(tmp_path, tmp_path / "no store")
    for round_ in range(20):
        sweep = load_yaml(Sweep, file, [f"output={tmp_path / str(round_)}"])
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(begin, sweep) for _ in range(8)]:
                future.result()
        assert load_yaml(Sweep, sweep.output / "sweep.yaml") == sweep


def test_a_trial_sees_the_one_device_that_it_trains_on() -> None:
    seen = {"CUDA_VISIBLE_DEVICES": "4,7", "OMP_NUM_THREADS": "8"}
    assert trial_environment(seen, "cuda:1", None) == {"CUDA_VISIBLE_DEVICES": "7", "OMP_NUM_THREADS": "8"}
    assert trial_environment({}, "cuda:1", 2) == {"CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "2"}
    assert trial_environment(seen, "cpu", None)["CUDA_VISIBLE_DEVICES"] == ""
    assert trial_environment(seen, "", None) == seen


def test_printing_lists_the_trials_and_needs_no_store(program: Run, tiny_sweep: ModuleType, tmp_path: Path) -> None:
    code, out, _ = program("sweep", tiny_sweep.write_sweep(tmp_path, tmp_path / "no store"), "seeds=[0, 4]", "--print")
    assert code == 0
    assert [line.rpartition("  ")[0] for line in out.splitlines()] == [
        "1  method=kd seed=0", "2  method=kd seed=4", "3  method=labels seed=0", "4  method=labels seed=4",
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_lacking_features_are_one_message_with_the_lines_of_one_dump(
    program: Run, tiny_sweep: ModuleType, stores: ModuleType, sentiment: Path, tmp_path: Path
) -> None:
    methods = {
        name: {"phases.0.methods": [{"name": name, "options": {"layers": layers}}]}
        for name, layers in (("hid_seq", [[1, 1]]), ("att_mse", [[1, 3]]))
    }
    methods["both"] = {"phases.0.methods": [{"name": "kd"}, {"name": "hid_seq", "options": {"layers": [[2, 3]]}}]}
    file = tiny_sweep.write_sweep(tmp_path, sentiment, search={"method": methods})
    code, _, err = program("sweep", file)
    assert code == 2
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    lines = yaml.safe_load(err.partition("A dump with these lines serves all trials:\n")[2])
    assert lines["features"] == ["attention_scores.3@all", "hidden.1@all", "hidden.3@all", "task_logits@row"]

    made = tmp_path / "made"
    shutil.copytree(sentiment.parent, made)
    teacher = stores.write_teacher(tmp_path / "teacher", "classification")
    recipe = {
        **lines, "store": made / "store", "pass_name": "wider", "device": "cpu",
        "teacher": {"model": teacher, "head": "classification"}, "rows": stores_rows(made),
    }  # fmt: skip
    dump(DumpRecipe.model_validate(recipe), ("tests",))
    tree = yaml.safe_load((tmp_path / "train.yaml").read_text())
    for data in (*tree["phases"][0]["data"], *tree["phases"][0]["evaluate"]):
        data |= {"store": str(made / "store"), "pass_name": "wider"}
    tiny_sweep.write(tmp_path / "train.yaml", tree)
    loaded = load_yaml(Sweep, file)
    check_sweep(loaded, trials(loaded))


def stores_rows(folder: Path) -> dict[str, Any]:
    sources = [{"files": [str(folder / f"{split}.jsonl")], "split": split} for split in ("train", "dev")]
    return {"sources": sources, "max_length": 16, "slot_tokens": 256, "label": {"column": "label", "classes": ["negative", "positive"]}}


def row(method: str, seed: int, score: float | None, state: str = "finished", start: str = "a" * 64) -> Row:
    done = state == "finished"
    return Row(
        trial=f"{method}-{seed}", parameters={"method": method}, seed=seed, state=state, score=score, scores={},
        start=start if done else None, student_parameters=1234 if done else None, seconds=10.0 * (seed + 1) if done else None,
        device="", error=None if done else "error: it",
    )  # fmt: skip


def test_the_best_mean_over_seeds_comes_first() -> None:
    rows = [
        row("poor", 0, 0.2), row("poor", 1, 0.4), row("good", 0, 0.7), row("good", 1, 0.9),
        row("broken", 0, None, "failed"), row("broken", 1, None, "failed"),
    ]  # fmt: skip
    best, worse, last = ranked(rows, "accuracy")
    assert (best.parameters["method"], worse.parameters["method"], last.parameters["method"]) == ("good", "poor", "broken")
    assert best.mean == pytest.approx(0.8)
    assert best.std == pytest.approx((2 * 0.1**2 / 1) ** 0.5)  # of a sample: n - 1
    assert [one.parameters["method"] for one in ranked(rows, "-loss")] == ["poor", "good", "broken"]
    lines = table(rows, "accuracy").splitlines()
    assert lines[1].split()[:5] == ["1", "good", "0.8000", "±", "0.1414"]
    assert "2 of 2" in lines[1]
    assert " 15 " in lines[1]  # seconds: the mean of 10 and 20
    assert "failed" in lines[3]
    assert "0 of 2" in lines[3]
    assert lines[4] == "all students of a seed began with the same weights"


def test_other_starts_are_said() -> None:
    rows = [row("a", 0, 0.5), row("b", 0, 0.6, start="b" * 64), row("a", 1, 0.5), row("b", 1, 0.6)]
    assert table(rows, "accuracy").splitlines()[-1] == "students of one seed began with different weights: 2 with seed 0, 1 with seed 1"


def test_a_combination_that_was_given_up_has_no_mean_and_comes_last() -> None:
    pruned = row("poor", 0, None, "pruned").model_copy(update={"error": None, "pruned": 40, "best": 0.95})
    rows = [pruned, row("poor", 1, 0.99), row("good", 0, 0.7), row("good", 1, 0.9)]
    assert [(one.parameters["method"], one.mean) for one in ranked(rows, "accuracy")] == [("good", pytest.approx(0.8)), ("poor", None)]
    lines = table(rows, "accuracy").splitlines()
    assert lines[2].startswith("2  poor    0.9500, pruned at 40  1 of 2")
    assert "no number, pruned at 40" in table([pruned.model_copy(update={"best": None})], "accuracy")
