"""What a sweep may search: ranges, samplers, pruners and databases, and what is refused of them; corners that are checked."""

import math
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

from store.strict import load_yaml
from student_train.pruning import Pruner, best, curve
from student_train.search import NumberRange, corners, fits, grid, labels, parameters, settings
from student_train.sweep import Sweep, trials

RATE = "phases.0.trainer.learning_rate"
ROWS = "phases.0.batch_rows"
LAYERS = "phases.0.student.layers"


def loaded(tiny_sweep: ModuleType, folder: Path, **changes: object) -> Sweep:
    sweep: Sweep = load_yaml(Sweep, tiny_sweep.write_sweep(folder, folder / "no store", **changes))
    return sweep


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ({"low": 1, "high": 8}, True),
        ({"low": 1.0, "high": 8}, False),
        ({"low": 2, "high": 8, "step": 3}, True),
        ({"low": 0, "high": 1, "step": 0.1}, False),
        ({"low": "1e-5", "high": "1e-3", "log": True}, False),  # as YAML reads numbers without a dot
    ],
)
def test_a_range_is_whole_where_all_its_numbers_are(given: dict[str, object], whole: bool) -> None:
    assert NumberRange.model_validate(given).whole is whole


def test_proposed_numbers_are_short_and_stay_in_their_range() -> None:
    rates = NumberRange(low=1.00004e-5, high=9.99996e-4, log=True)
    assert rates.number(2.34567e-5) == 2.346e-5
    assert (rates.number(1.00004e-5), rates.number(9.99996e-4)) == (1.00004e-5, 9.99996e-4)  # and not 1e-5 and 1e-3
    tenths = NumberRange(low=0, high=1, step=0.1)
    assert [tenths.number(number * 0.1) for number in range(11)] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert [tenths.holds(number) for number in (0.3, 0.35, 1.1, True, "0.3")] == [True, False, False, False, False]
    threes = NumberRange(low=2, high=8, step=3)
    assert [number for number in range(-3, 12) if threes.holds(number)] == [2, 5, 8]
    assert not threes.holds(5.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {RATE: {"low": 1e-5}}}, f"search.{RATE}.high: required, not given"),
        ({"search": {RATE: {"low": 0.1, "high": 0.1}}}, f"search.{RATE}: expected low below high, found 0.1 and 0.1"),
        ({"search": {RATE: {"low": 0, "high": 1, "log": True}}}, "expected low above 0, since log is true, found 0"),
        ({"search": {RATE: {"low": 1, "high": 9, "log": True, "step": 2}}}, "expected log or step, found both"),
        ({"search": {RATE: {"low": 0, "high": 1, "step": 0.3}}}, "expected high to be some steps above low"),
        ({"search": {RATE: {"low": 0, "high": 1, "step": 0}}}, f"search.{RATE}.step"),
        ({"search": {RATE: {"low": 0, "high": 1, "stp": 1}}}, "did you mean 'step'?"),
        ({"search": {RATE: {"low": 0.1, "high": 1.0}}}, f"found the range {RATE}: give sampler: tpe (or random) and trials"),
        ({"sampler": "tpe"}, "trials: expected how many combinations tpe proposes, found none"),
        ({"trials": 3}, "trials: a grid is tried as a whole, found 3"),
        ({"sampler": "tpe", "trials": 0}, "trials"),
        ({"sampler": "bayes", "trials": 3}, "sampler"),
        ({"pruner": "medain"}, "pruner.name: Input should be 'median', 'halving' or 'hyperband', found 'medain'"),
        ({"pruner": {"name": "median", "min_steps": 3}}, "median takes startup and warmup, found min_steps"),
        ({"pruner": "halving"}, "halving needs min_steps, found no options"),
        ({"pruner": {"name": "hyperband", "reduction": 3}}, "hyperband needs min_steps and max_steps, found reduction"),
        ({"pruner": {"name": "hyperband", "min_steps": 9, "max_steps": 3}}, "expected max_steps to be at least min_steps, found 3 and 9"),
        ({"storage": "study.db"}, "expected the address of a database, such as sqlite:///study.db"),
    ],
)
def test_what_makes_no_search_is_refused(changes: dict[str, object], message: str, tiny_sweep: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        loaded(tiny_sweep, tmp_path, **changes)
    assert message in str(refused.value)


@pytest.mark.parametrize("address", ["postgresql://me:hush@host/name", "mysql://host/name?user=me&password=hush"])
def test_no_password_is_taken_from_a_file_or_said_again(address: str, tiny_sweep: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        loaded(tiny_sweep, tmp_path, storage=address)
    assert "give its $NAME" in str(refused.value)
    assert "hush" not in str(refused.value)


def test_an_address_may_come_from_the_environment(tiny_sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = loaded(tiny_sweep, tmp_path, storage="$STUDIES")
    monkeypatch.delenv("STUDIES", raising=False)
    with pytest.raises(ValueError, match="in the environment variable STUDIES, which is not set"):
        sweep.database()
    monkeypatch.setenv("STUDIES", "postgresql://me:hush@host/name")
    assert sweep.database() == "postgresql://me:hush@host/name"
    assert "hush" not in sweep.model_dump_json()


def test_alternatives_may_be_called_low_and_high(tiny_sweep: ModuleType, tmp_path: Path) -> None:
    tried = trials(loaded(tiny_sweep, tmp_path, search={"rate": {"low": {RATE: 0.1}, "high": {RATE: 0.2}}}, seeds=[0]))
    assert [trial.recipe.phases[0].trainer["learning_rate"] for trial in tried] == [0.1, 0.2]


def test_corners_hold_every_alternative_with_each_value_and_end(tiny_sweep: ModuleType, tmp_path: Path) -> None:
    search = {
        "method": tiny_sweep.METHODS, LAYERS: [[2, 4], [1, 3], [1, 2]], RATE: {"low": 1e-4, "high": 1e-1, "log": True},
        ROWS: {"low": 2, "high": 8, "step": 2},
    }  # fmt: skip
    sweep = loaded(tiny_sweep, tmp_path, search=search, sampler="tpe", trials=5, seeds=[0])
    found = [tuple(parameters(sweep.search, choice).values()) for choice in corners(sweep.search)]
    lay, low = [2, 4], 1e-4
    others = [(lay, low, 2), ([1, 3], low, 2), ([1, 2], low, 2), (lay, 1e-1, 2), (lay, low, 8)]
    assert found == [(method, *other) for method, other in product(("kd", "labels"), others)]
    assert all(fits(sweep.search, choice) for choice in corners(sweep.search))
    phases = [trial.recipe.phases[0] for trial in trials(sweep)]
    assert [(phase.trainer["learning_rate"], phase.batch_rows) for phase in phases[:5]] == [(1e-4, 2)] * 3 + [(1e-1, 2), (1e-4, 8)]


def test_labels_tell_values_apart_that_are_equal_in_python(tiny_sweep: ModuleType, tmp_path: Path) -> None:
    sweep = loaded(tiny_sweep, tmp_path, search={RATE: [1, 1.0, True, None, "1", [1]]})
    assert list(labels(sweep.search[RATE])) == ["1", "1.0", "true", "null", '"1"', "[1]"]
    assert [settings(sweep.search, choice) for choice in grid(sweep.search)] == [[(RATE, one)] for one in (1, 1.0, True, None, "1", [1])]


def test_what_does_not_fit_a_search_is_known(tiny_sweep: ModuleType, tmp_path: Path) -> None:
    search = {"method": tiny_sweep.METHODS, RATE: {"low": 0.1, "high": 0.2}}
    tried = loaded(tiny_sweep, tmp_path, search=search, sampler="random", trials=1).search
    assert fits(tried, {"method": "kd", RATE: 0.15})
    assert not fits(tried, {"method": "pkd", RATE: 0.15})
    assert not fits(tried, {"method": "kd", RATE: 0.25})
    assert not fits(tried, {"method": "kd"})
    assert not fits(tried, {"method": "kd", RATE: 0.15, LAYERS: "[1]"})


def test_a_curve_is_what_was_logged_of_the_metric(tmp_path: Path) -> None:
    lines = ['{"loss": 9.0, "step": 1}', '{"eval_loss": 2.0, "eval_accuracy": 0.5, "step": 2}', '{"eval_loss": 3.0, "step": 4}', '{"eval_l']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert curve(tmp_path, "-loss") == {2: 2.0, 4: 3.0}
    assert curve(tmp_path, "accuracy") == {2: 0.5}
    assert curve(tmp_path / "absent", "loss") == {}
    assert best({2: 2.0, 4: 3.0, 6: math.nan}, "-loss") == 2.0
    assert best({2: 2.0, 4: 3.0, 6: math.nan}, "accuracy") == 3.0
    assert best({}, "accuracy") is None


def test_a_name_is_short_for_a_pruner_with_its_defaults() -> None:
    assert Pruner.model_validate("median") == Pruner(name="median", startup=5, warmup=0)
