"""A sweep's study with results that are written by hand: what is proposed, what is kept, and what is made anew where it was lost."""

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from types import ModuleType
from typing import Any

import pytest
from optuna.trial import TrialState

from store.strict import load_yaml
from student_train.database import opened
from student_train.study import Combination, Study
from student_train.sweep import Sweep, Trial
from student_train.trial import Ending, begin, forget_failures, state, write_ending, write_pruned

RATE = "phases.0.trainer.learning_rate"
ROWS = "phases.0.batch_rows"
RATES = {"low": 1e-4, "high": 1e-1, "log": True}
Make = Callable[..., Sweep]


@pytest.fixture
def make(tiny_sweep: ModuleType, tmp_path: Path) -> Make:
    """A sweep over methods and learning rates; ``name`` is that of its folder."""

    def made(name: str = "one", **changes: object) -> Sweep:
        search = {"method": tiny_sweep.METHODS, RATE: RATES}
        proposed = None if changes.get("sampler") == "grid" else 6
        options: dict[str, Any] = {"search": search, "sampler": "tpe", "trials": proposed, "seeds": [3], **changes}
        sweep: Sweep = load_yaml(Sweep, tiny_sweep.write_sweep(tmp_path / name, tmp_path / "no store", **options))
        return sweep

    return made


@contextmanager
def study(sweep: Sweep) -> Iterator[Study]:
    begin(sweep)
    with opened(sweep) as storage:
        yield Study(sweep, storage)


def finish(trial: Trial, loss: float | None = None) -> None:
    """Leave what a finished run does; the best loss is that of kd with a rate of 0.003."""
    rate = float(str(trial.parameters[RATE])) if RATE in trial.parameters else 0.003
    loss = math.log10(rate / 0.003) ** 2 + (trial.parameters.get("method") != "kd") if loss is None else loss
    folder = trial.recipe.output / "only"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"after": {"loss": loss}, "start": "a"}))


def log(trial: Trial, curve: dict[int, float]) -> None:
    folder = trial.recipe.output / "only"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"eval_loss": score, "step": step}) + "\n" for step, score in curve.items()))


def fail(sweep: Sweep, trial: Trial) -> None:
    write_ending(sweep, trial, Ending(code=2, seconds=1.0, device="", error="error: it"))


def drive(one: Study, most: int = 1000) -> list[dict[str, object]]:
    """Finish at most so many combinations as they are proposed; their parameters."""
    found = []
    while len(found) < most and (combination := one.propose()) is not None:
        for trial in combination.trials:
            finish(trial)
        one.settle()
        found.append(dict(combination.trials[0].parameters))
    return found


def states(one: Study) -> list[TrialState]:
    return [proposal.state for proposal in one.study.get_trials()]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_propose_within_ranges_and_the_same_again(sampler: str, make: Make, tiny_sweep: ModuleType) -> None:
    search = {"method": tiny_sweep.METHODS, RATE: RATES, ROWS: {"low": 2, "high": 8, "step": 2}}

    def proposed(name: str, **changes: object) -> list[dict[str, object]]:
        with study(make(name, search=search, sampler=sampler, trials=15, **changes)) as one:
            return drive(one)

    found = proposed("one")
    assert len(found) == 15
    assert {str(one["method"]) for one in found} == {"kd", "labels"}
    assert all(1e-4 <= float(str(one[RATE])) <= 1e-1 and one[ROWS] in (2, 4, 6, 8) for one in found)
    assert len({str(one) for one in found}) > 10
    assert proposed("two") == found
    assert proposed("three", sampler_seed=1) != found


def test_a_sweep_that_goes_on_proposes_what_it_would_have(make: Make) -> None:
    with study(make("whole", trials=14)) as one:
        whole = drive(one)
    found = []
    for most in (2, 9, 100):
        with study(make("stopped", trials=14)) as one:
            found += drive(one, most)
    assert found == whole


def test_tpe_looks_where_it_was_good(make: Make) -> None:
    with study(make(trials=30)) as one:
        found = drive(one)
    away = [abs(math.log10(float(str(one[RATE])) / 0.003)) + (one["method"] != "kd") for one in found]
    assert fmean(away[20:]) < fmean(away[:10]) / 2


def test_values_are_means_over_seeds_and_no_seed_is_left_out(make: Make) -> None:
    with study(make(seeds=[3, 5])) as one:
        combination = one.propose()
        assert combination is not None
        first, second = combination.trials
        assert (first.seed, second.seed) == (3, 5)
        finish(first, 0.25)
        one.settle()
        assert [found.trials for found in one.at_work()] == [(first, second)]
        finish(second, 0.5)
        one.settle()
        assert one.at_work() == []
        assert [proposal.value for proposal in one.study.get_trials()] == [0.375]


def test_a_grid_is_proposed_in_the_order_of_its_file_and_grows(make: Make, tiny_sweep: ModuleType) -> None:
    def grid(rates: list[float]) -> Sweep:
        return make(search={RATE: rates, "method": tiny_sweep.METHODS}, sampler="grid")

    with study(grid([0.2, 0.1])) as one:
        before = one.trials()
        assert [tuple(trial.parameters.values()) for trial in before] == [(0.2, "kd"), (0.2, "labels"), (0.1, "kd"), (0.1, "labels")]
        assert [tuple(found.values()) for found in drive(one)] == [tuple(trial.parameters.values()) for trial in before]
        assert one.propose() is None
    with study(grid([0.3, 0.2, 0.1])) as one:
        assert [trial.name for trial in one.trials()][2:] == [trial.name for trial in before]
        opened_ = []
        while (combination := one.propose()) is not None:
            one.settle()
            if one.at_work():
                opened_.append(combination.trials[0].parameters)
                finish(combination.trials[0])
        assert opened_ == [{RATE: 0.3, "method": "kd"}, {RATE: 0.3, "method": "labels"}]  # the rest is done
        one.settle()
        assert states(one) == [TrialState.COMPLETE] * 6


def test_what_a_dead_worker_left_is_at_work_for_the_next(make: Make) -> None:
    with study(make()) as one:
        left = one.propose()
        assert left is not None
        one.study.ask()  # killed before it knew what to propose
    with study(make()) as one:
        assert [found.trials for found in one.at_work()] == [left.trials]
        finish(left.trials[0])
        assert len(drive(one)) == 5
        assert one.at_work() == []  # settled with the others
        assert next(trial.name for trial in one.trials()) == left.trials[0].name


def test_a_lost_study_is_made_anew_from_the_folders(make: Make) -> None:
    with study(make()) as one:
        drive(one)
        before = [(trial.name, state(one.sweep, trial)) for trial in one.trials()]
        values = [proposal.value for proposal in one.study.get_trials()]
    (make().output / "study.log").unlink()
    with study(make()) as one:
        assert [(trial.name, state(one.sweep, trial)) for trial in one.trials()] == before
        while one.propose() is not None:
            one.settle()
        assert [proposal.value for proposal in one.study.get_trials()] == values
    with study(make(trials=7)) as one:
        assert len(drive(one)) == 1


def test_what_was_proposed_is_taken_along_where_it_fits_a_changed_search(make: Make, tiny_sweep: ModuleType) -> None:
    with study(make(trials=10)) as one:
        before = drive(one)
    narrower = {"method": tiny_sweep.METHODS, RATE: {"low": 1e-3, "high": 1e-1, "log": True}}
    with study(make(trials=10, search=narrower)) as one:
        kept = [found for found in before if float(str(found[RATE])) >= 1e-3]
        assert 0 < len(kept) < 10
        assert [trial.parameters for trial in one.trials()] == kept
        after = drive(one)
        assert after[: len(kept)] == kept
        assert len(after) == 10


def test_failures_are_told_and_proposed_again_when_they_are_retried(make: Make, tiny_sweep: ModuleType) -> None:
    sweep = make(search={"method": tiny_sweep.METHODS}, sampler="grid", seeds=[3, 5])
    with study(sweep) as one:
        (first, second), (third, fourth) = (found.trials for found in one.combinations())
        for trial in (first, third, fourth):
            finish(trial, 1.0)
        fail(sweep, second)
        while one.propose() is not None:
            one.settle()
        assert states(one) == [TrialState.FAIL, TrialState.COMPLETE]
    with study(sweep) as one:
        one.reopen()
        assert one.propose() is None  # nobody asked for it
        forget_failures(sweep, one.trials())
        one.reopen()
        again = one.propose()
        assert again is not None
        assert again.trials == (first, second)
        finish(second, 2.0)
        one.settle()
        assert states(one) == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
        assert one.study.get_trials()[2].value == 1.5
        assert len(one.combinations()) == 2


def test_a_run_that_was_removed_is_tried_again(make: Make) -> None:
    with study(make(trials=2)) as one:
        drive(one)
        (removed, kept) = one.trials()
    (removed.recipe.output / "only" / "result.json").unlink()
    with study(make(trials=2)) as one:
        one.reopen()
        assert drive(one) == [removed.parameters]
        assert [trial.name for trial in one.trials()] == [removed.name, kept.name]


def test_a_combination_that_is_proposed_twice_is_trained_once(make: Make, tiny_sweep: ModuleType) -> None:
    with study(make(search={"method": tiny_sweep.METHODS}, sampler="random", trials=6)) as one:
        assert len(drive(one)) == 6
        assert len(one.trials()) == 2
        assert states(one) == [TrialState.COMPLETE] * 6


def test_a_combination_that_makes_no_recipe_is_told_and_the_others_go_on(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    search = {"phases.0.patience": [None, 2], "phases.0.best": ["loss", None]}  # patience needs best
    with study(make(search=search, sampler="random", trials=12)) as one:
        found = drive(one)
        assert {tuple(proposed.values()) for proposed in found} == {(None, "loss"), (None, None), (2, "loss")}
        assert len(states(one)) == 12
        assert states(one).count(TrialState.FAIL) == 12 - len(found) > 0
        assert len(one.trials()) == 3
    assert "makes no recipe: " in caplog.text
    assert "patience needs best" in caplog.text


@pytest.mark.parametrize("storage", [None, "sqlite"])
def test_two_workers_share_what_is_proposed(storage: str | None, make: Make, tmp_path: Path) -> None:
    sweep = make(trials=10, storage=storage and f"sqlite:///{tmp_path / 'study.db'}")

    def work() -> list[str]:
        with study(sweep) as one:
            found = []
            while (combination := one.propose()) is not None:
                found.append(combination.trials[0].name)
                finish(combination.trials[0])
                one.settle()
            return found

    with ThreadPoolExecutor(2) as pool:
        parts = [future.result() for future in [pool.submit(work) for _ in range(2)]]
    assert sum(map(len, parts)) == 10
    assert len({*parts[0], *parts[1]}) == 10
    with study(sweep) as one:
        one.settle()
        assert states(one) == [TrialState.COMPLETE] * 10
    assert (sweep.output / "study.log").exists() is (storage is None)


def test_sweeps_share_a_database_without_seeing_each_other(make: Make, tmp_path: Path) -> None:
    for name in ("one", "two"):
        with study(make(name, trials=2, storage=f"sqlite:///{tmp_path / 'study.db'}")) as one:
            assert len(drive(one)) == 2


def test_a_damaged_journal_says_what_to_do(make: Make) -> None:
    with study(make()) as one:
        drive(one, 2)
    file = make().output / "study.log"
    file.write_bytes(file.read_bytes()[:-20] + b"\n{}\n")
    with pytest.raises(ValueError, match=r"study\.log: .*; remove .*study\.log, and start the sweep again"), study(make()):
        pass


def test_a_database_that_fails_is_said_without_its_password(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIES", "sqlite://me:hush@/nowhere/study.db")
    with pytest.raises(ValueError, match=r"^storage: ") as failed, study(make(storage="$STUDIES")):
        pass
    assert "hush" not in str(failed.value)
    assert "mend it, and start the sweep again" in str(failed.value)


@pytest.mark.parametrize(("loss", "given_up"), [(0.4, None), (0.6, 4), (1.4, 4)])
def test_the_median_pruner_gives_up_what_is_worse_than_half(loss: float, given_up: int | None, make: Make) -> None:
    finished = [{4: 0.2, 8: 0.1}, {4: 0.5, 8: 0.3}, {4: 1.0, 8: 0.9}]
    assert (loss > median(one[4] for one in finished)) == (given_up == 4)
    sweep = make(pruner={"name": "median", "startup": 3}, seeds=[3, 5])
    with study(sweep) as one:
        for curve in finished:
            combination = proposed(one)
            log(combination.trials[0], {4: curve[4]})
            assert one.report(combination) is None
            log(combination.trials[0], curve)
            assert one.report(combination) is None
            for trial in combination.trials:
                finish(trial, curve[8])
            one.settle()
        poor = proposed(one)
        assert one.report(poor) is None  # it has logged nothing
        log(poor.trials[0], {4: loss})
        assert one.report(poor) == given_up
        if given_up is not None:
            for trial in poor.trials:
                write_pruned(sweep, trial, given_up)
            one.settle()
            last = one.study.get_trials()[-1]
            assert (last.state, last.intermediate_values, last.value) == (TrialState.PRUNED, {4: loss}, loss)
            assert one.at_work() == []


def test_halving_lets_the_best_of_so_many_pass(make: Make) -> None:
    with study(make(pruner={"name": "halving", "min_steps": 4, "reduction": 3}, trials=6)) as one:
        given_up = []
        for loss in (0.5, 0.6, 0.4, 0.45, 0.3, 0.9):
            combination = proposed(one)
            log(combination.trials[0], {2: 9.0, 4: loss})
            given_up.append(one.report(combination))
        # asynchronously: each is compared with those that came to step 4 before it, and the best third (one at least) passes
        assert given_up == [None, 4, None, 4, None, 4]


def test_hyperband_gives_up_more_of_the_groups_that_are_looked_at_early(make: Make) -> None:
    with study(make(pruner={"name": "hyperband", "min_steps": 4, "max_steps": 12, "reduction": 3}, trials=30)) as one:
        given_up = []
        while (combination := one.propose()) is not None:  # each is worse than those before it
            log(combination.trials[0], {step: len(given_up) + step / 100 for step in (4, 8, 12)})
            given_up.append(one.report(combination))
            finish(combination.trials[0])
            one.settle()
        assert set(given_up) == {None, 4, 12}  # the first of each group passes, and who isn't looked at before the end
        assert given_up.count(None) < 15


def proposed(one: Study) -> Combination:
    combination = one.propose()
    assert combination is not None
    return combination
