"""What a sweep tries, as an Optuna study: which combinations were proposed, and what came of them.

The study is the record of proposals, run folders that of results. Every worker of a sweep reads both, and nobody owns a combination: its
trials are claimed one by one (student_train.trial), and whoever sees that all are over tells the study. So nothing waits for a worker
that is gone, and a study that is lost is made anew from the folders.

A study is of one ``search``, seeds and metric, since what Optuna remembers of a parameter can't change. After a change there is another
one in the same storage, which begins with what was proposed before, where that fits.

<output>/study.id         names the sweep's studies in a storage that several sweeps share
<output>/proposed.json    all choices that were proposed, in their order (of a grid they follow from the file)
"""

import hashlib
import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from store.publish import replace
from store.strict import read_yaml
from student_train.output import phase_folder
from student_train.pruning import curve, made
from student_train.search import Choice, NumberRange, fits, grid, labels, text
from student_train.sweep import Sweep, Trial, trials_of
from student_train.trial import score, state, turn

if TYPE_CHECKING:
    from optuna.study import Study as OptunaStudy

IDENTITY = "study.id"
PROPOSED = "proposed.json"
AGAIN = "again"
"""Marks a proposal in the study that is an earlier one."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Combination:
    """What was proposed once."""

    number: int
    """In the study."""
    trials: tuple[Trial, ...]
    """One for each seed."""


class Study:
    """A sweep's study, open in its storage."""

    def __init__(self, sweep: Sweep, storage: BaseStorage) -> None:
        self.sweep, self.storage, self.base = sweep, storage, read_yaml(sweep.recipe)
        self.distributions = {key: _distribution(tried) for key, tried in sweep.search.items()}
        self.made: dict[int, tuple[Trial, ...]] = {}
        with turn(sweep):
            self.study: OptunaStudy = optuna.create_study(
                storage=storage, study_name=_name(sweep), pruner=made(sweep.pruner), sampler=RandomSampler(), load_if_exists=True,
                direction="minimize" if sweep.metric.startswith("-") else "maximize",
            )  # fmt: skip
            self._mend()
            there = {text(choice) for one in self._proposals() if (choice := self._choice(one)) is not None}
            for choice in grid(sweep.search) if sweep.sampler == "grid" else known(sweep):
                if text(choice) not in there:
                    self.study.enqueue_trial(dict(choice))

    def combinations(self) -> list[Combination]:
        """Each that was proposed, in the order of proposals; the same one proposed again is left out."""
        found: dict[str, Combination] = {}
        for one in self._proposals():
            if trials := self._trials(one):
                found.setdefault(trials[0].name, Combination(one.number, trials))
        return list(found.values())

    def trials(self) -> list[Trial]:
        """Those of all combinations, the seeds of a combination together."""
        return [trial for one in self.combinations() for trial in one.trials]

    def at_work(self) -> list[Combination]:
        """Those that were begun and of which no end was told."""
        return [Combination(one.number, self._trials(one)) for one in self._proposals((TrialState.RUNNING,)) if self._trials(one)]

    def propose(self) -> Combination | None:
        """Begin the next combination; None where there is none to begin."""
        with turn(self.sweep):
            self._mend()
            while self._is_more():
                proposals = self._proposals()
                # of its place in the study, not of this process, so that a sweep that goes on proposes what it would have
                seed = int.from_bytes(hashlib.sha256(f"{self.sweep.sampler_seed} {len(proposals)}".encode()).digest()[:4])
                self.study.sampler = _sampler(self.sweep, seed)
                asked = self.study.ask(self.distributions)
                (one,) = (one for one in self._proposals() if one.number == asked.number)
                if trials := self._trials(one):
                    self._keep_proposed()
                    return Combination(one.number, trials)
                self.study.tell(one.number, state=TrialState.FAIL)
        return None

    def settle(self) -> None:
        """Tell the study of the combinations all whose trials are over."""
        for combination in self.at_work():
            outcome, value = self._outcome(combination.trials)
            if outcome == TrialState.RUNNING:
                continue
            with turn(self.sweep):
                if self.storage.get_trial(self._id(combination.number)).state == TrialState.RUNNING:  # or another worker was faster
                    self.report(combination)
                    self.study.tell(combination.number, value, outcome)

    def report(self, combination: Combination) -> int | None:
        """Tell the study of new held-out scores of the first seed; the step at which the pruner gives the combination up, or None."""
        if self.sweep.pruner is None:
            return None
        first, trial_id, given_up = combination.trials[0], self._id(combination.number), None
        told = self.storage.get_trial(trial_id)
        if told.state != TrialState.RUNNING:
            return None
        scores = curve(phase_folder(first.recipe, first.scored.name), self.sweep.metric)
        for step in sorted(scores.keys() - told.intermediate_values.keys()):
            self.storage.set_trial_intermediate_value(trial_id, step, scores[step])
            if given_up is None and self.study.pruner.prune(self.study, self.storage.get_trial(trial_id)):
                given_up = step
        return given_up

    def reopen(self) -> None:
        """Propose combinations again of which the folders say another thing than the study: failures that are to be tried again, and
        runs that were removed."""
        with turn(self.sweep):
            last = {text(choice): one for one in self._proposals() if (choice := self._choice(one)) is not None}
            for one in last.values():
                trials = self._trials(one)
                if one.state.is_finished() and trials and one.state != self._outcome(trials)[0]:
                    self.study.enqueue_trial(dict(self._choice(one) or {}), user_attrs={AGAIN: one.number})

    def _outcome(self, trials: Sequence[Trial]) -> tuple[TrialState, float | None]:
        """What the folders say of a combination, and its value if it is complete."""
        states = [state(self.sweep, trial) for trial in trials]
        if "open" in states:
            return TrialState.RUNNING, None
        if "pruned" in states:
            return TrialState.PRUNED, None
        if "failed" in states:
            return TrialState.FAIL, None
        scores = [number for trial in trials if (number := score(self.sweep, trial)) is not None]
        if len(scores) < len(trials):  # one is no number
            return TrialState.FAIL, None
        return TrialState.COMPLETE, fmean(scores)

    def _is_more(self) -> bool:
        """Whether there is something to propose, or enqueued."""
        proposals = self._proposals()
        if any(one.state == TrialState.WAITING for one in proposals):
            return True
        return self.sweep.trials is not None and sum(AGAIN not in one.user_attrs for one in proposals) < self.sweep.trials

    def _proposals(self, states: Sequence[TrialState] | None = None) -> list[FrozenTrial]:
        """Optuna's trials that are whole: one was not whose worker was killed while it proposed."""
        found = self.study.get_trials(deepcopy=False, states=None if states is None else tuple(states))
        return [one for one in found if self._choice(one) is not None]

    def _choice(self, one: FrozenTrial) -> Choice | None:
        """What a proposal chose; None where it is incomplete."""
        chosen: dict[str, Any] = one.system_attrs.get("fixed_params", {}) if one.state == TrialState.WAITING else one.params
        if chosen.keys() != self.sweep.search.keys():
            return None
        return {
            key: tried.number(chosen[key]) if isinstance(tried, NumberRange) else str(chosen[key])
            for key, tried in self.sweep.search.items()
        }

    def _trials(self, one: FrozenTrial) -> tuple[Trial, ...]:
        """Those of a proposal, none of one that makes no recipe."""
        choice = self._choice(one)
        if choice is None:
            return ()
        if one.number not in self.made:
            try:
                self.made[one.number] = trials_of(self.sweep, self.base, choice)
            except ValueError as error:
                _log.warning("combination %d makes no recipe: %s", one.number + 1, error)
                self.made[one.number] = ()
        return self.made[one.number]

    def _mend(self) -> None:
        """End proposals whose worker was killed in the middle of making them; nobody else is making one now."""
        for one in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._trials(one):
                continue
            self.study.tell(one.number, state=TrialState.FAIL)
            if self._choice(one) is None and (fixed := one.system_attrs.get("fixed_params")) is not None:
                self.study.enqueue_trial(fixed, user_attrs=one.user_attrs)

    def _id(self, number: int) -> int:
        """That of a proposal in the storage, which several studies share."""
        study = self.storage.get_study_id_from_name(self.study.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study, number)

    def _keep_proposed(self) -> None:
        """Write down what was proposed, for the study that comes after this one."""
        if self.sweep.sampler != "grid":
            chosen = [choice for one in self._proposals() if (choice := self._choice(one)) is not None and self._trials(one)]
            each = {text(choice): choice for choice in (*_read_proposed(self.sweep), *chosen)}
            replace(self.sweep.output / PROPOSED, json.dumps(list(each.values()), indent=1).encode())


def known(sweep: Sweep) -> list[Choice]:
    """What was proposed in the folder of ``sweep`` so far and fits its search; nothing where the folder is new."""
    return [choice for choice in _read_proposed(sweep) if fits(sweep.search, choice)]


def _read_proposed(sweep: Sweep) -> list[Choice]:
    file = sweep.output / PROPOSED
    try:
        found: list[Choice] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; remove it, and start the sweep again") from None
    return found


def _name(sweep: Sweep) -> str:
    """That of the study, within ``turn``: of this folder, and of what its parameters and values mean."""
    file = sweep.output / IDENTITY
    if not file.exists():
        replace(file, secrets.token_hex(8).encode())
    of = sweep.model_dump(mode="json", include={"search", "sampler", "seeds", "metric", "phase"})
    return f"{sweep.output.name}-{file.read_text(encoding='utf-8').strip()}-{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:8]}"


def _distribution(tried: tuple[object, ...] | dict[str, dict[str, object]] | NumberRange) -> BaseDistribution:
    if not isinstance(tried, NumberRange):
        return CategoricalDistribution(tuple(labels(tried)))
    if tried.whole:
        return IntDistribution(int(tried.low), int(tried.high), tried.log, int(tried.step or 1))
    return FloatDistribution(tried.low, tried.high, tried.log, tried.step)


def _sampler(sweep: Sweep, seed: int) -> BaseSampler:
    """Combinations at work count as poor ones (``constant_liar``), so that what is tried at once differs."""
    return TPESampler(seed=seed, constant_liar=True) if sweep.sampler == "tpe" else RandomSampler(seed=seed)
