"""What moves RL-KD's policy: the gradient of the expected reward, and rewards of a real student, by hand in float64."""

import copy
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from given import BERT, CHOICES, CLASSES, MLM, SCORES, SMALL_BERT, TOKENS, make_batch, ref_ce, ref_kl, shape

from online.batch import IGNORED, Batch, Features
from online.models import LoadedModel
from store.features import FeatureKey
from student_train.methods import parse_method
from student_train.methods.rl_kd import RLKD, Played
from student_train.moment import Moment
from student_train.step import Step

LOGITS, FIRST = FeatureKey("task_logits", positions="row"), FeatureKey("final", positions="first")
NAMES = ("one", "other")


def built(**options: object) -> RLKD:
    """A policy of random numbers over the teachers ``one`` and ``other``."""
    teachers = {"reader": shape(SMALL_BERT, *MLM), **{name: shape(BERT, *CLASSES) for name in NAMES}}
    method = parse_method("rl_kd", {"semantic": "reader", **options}, shape(SMALL_BERT, *CLASSES), teachers)
    assert isinstance(method, RLKD)
    method.policy.copy_(torch.randn(method.policy.shape, generator=torch.Generator().manual_seed(2)))
    method.moment = Moment(step=4, steps=100, epoch_steps=10.0, seed=3)
    return method


def answers(batch: Batch, seed: int) -> Features:
    draw = torch.Generator().manual_seed(seed)
    found: Features = {LOGITS.of(name): torch.randn(len(batch.rows), 3, generator=draw) * 2 for name in NAMES}
    return found | {FIRST.of("reader"): torch.randn(len(batch.rows), 8, generator=draw)}


def line(method: RLKD, teacher: int) -> int:
    return teacher if len(method.policy) > 1 else 0


# The gradient


ROWS, TEACHERS = 2, 2


def expectations(baseline: str, weights: str) -> tuple[Tensor, Tensor, float]:
    """Gradient of the expected reward of two rows, the expected step, and the expected square of the step, over all actions.

    A row's reward depends on its own actions alone, and is far from 0, as minus a loss is.
    """
    start = built(baseline=baseline, weights=weights, policy_rate=0.5)
    draw = torch.Generator().manual_seed(6)
    state_RKS = torch.cat([torch.randn(ROWS, TEACHERS, 12, generator=draw), torch.ones(ROWS, TEACHERS, 1)], -1)
    assert state_RKS.shape[-1] == start.policy.shape[-1]
    reward_of = torch.randn(ROWS, 2, 2, generator=draw) - 5  # row, action of each teacher
    policy = start.policy.double().requires_grad_()

    def probability(row: int, actions: tuple[int, ...]) -> Tensor:
        chances = [torch.sigmoid(state_RKS[row, k].double() @ policy[line(start, k)]) for k in range(TEACHERS)]
        return torch.stack([chance if action else 1 - chance for chance, action in zip(chances, actions, strict=True)]).prod()

    pairs = list(itertools.product((0, 1), repeat=TEACHERS))
    expected = torch.stack([reward_of[row][pair].double() * probability(row, pair) for row in range(ROWS) for pair in pairs]).sum() / ROWS
    (exact,) = torch.autograd.grad(expected, policy)
    mean, square = torch.zeros_like(exact), 0.0
    for first, second in itertools.product(pairs, repeat=ROWS):
        method = copy.deepcopy(start)
        method.average.copy_(torch.tensor([-9.0, 2.0]))  # of two earlier episodes
        surprise_RK = torch.tensor([first, second]).float() - method.chances(state_RKS)
        method.learn(Played(state_RKS, surprise_RK, torch.stack([reward_of[0][first], reward_of[1][second]]), torch.ones(ROWS).bool()))
        step, likely = (method.policy.double() - start.policy) / 0.5, float((probability(0, first) * probability(1, second)).detach())
        mean, square = mean + likely * step, square + likely * float(step.square().sum())
    return exact, mean, square


@pytest.mark.parametrize("weights", ["each", "shared"])
@pytest.mark.parametrize("baseline", ["none", "moving", "episode"])
def test_the_expected_step_is_the_gradient_of_the_expected_reward(baseline: str, weights: str) -> None:
    exact, mean, _ = expectations(baseline, weights)
    assert exact.abs().max() > 1e-2
    torch.testing.assert_close(mean, exact, rtol=1e-4, atol=1e-5)


def test_a_baseline_makes_steps_less_noisy() -> None:
    square = {baseline: expectations(baseline, "each")[2] for baseline in ("none", "moving", "episode")}
    assert square["moving"] < square["none"] / 4
    assert square["episode"] < square["none"] / 4


# The rewards


def student_of(dropout: float) -> LoadedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, max_position_embeddings=16,
        num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.5,
    )  # fmt: skip
    return LoadedModel.of(BertForSequenceClassification(config).train(), "classification")


def micro_batch(number: int) -> Batch:
    """Three rows of their own numbers; one of all has no label."""
    draw = torch.Generator().manual_seed(number)
    ids, labels = torch.randint(1, 20, (3, 5), generator=draw), torch.randint(3, (3,), generator=draw)
    if number == 1:
        labels[1] = IGNORED
    rows = torch.arange(3) + 10 * number
    return Batch(rows, ids, torch.ones(3, 5).bool(), torch.zeros(3, 5).long(), None, None, None, labels, rows)


def policy_by_hand(
    method: RLKD, student: LoadedModel, past: list[tuple[Batch, Features]], meta: Batch, options: dict[str, Any], earlier: list[float]
) -> tuple[Tensor, float]:
    """The policy after the episode, and the mean of its rewards; ``earlier``: means of the episodes before."""
    exact, policy = copy.deepcopy(student.model).double().eval(), method.policy.double()

    def logits_of(batch: Batch) -> Tensor:
        z: Tensor = exact(input_ids=batch.input_ids).logits.detach()
        return z

    rewards, slopes = [], []
    for number, (batch, teacher) in enumerate(past):
        step = method.moment.step - 2 + number // 2
        z, labels, meaning = logits_of(batch), batch.row_labels, teacher[FIRST.of("reader")]
        assert labels is not None
        assert isinstance(meaning, Tensor)
        for place, row in enumerate(batch.rows.tolist()):
            label = int(labels[place])
            if label == IGNORED:
                continue
            r = meaning[place].double() / float(meaning[place].double().square().sum()) ** 0.5
            coins, slope, distances = method.moment.draws(f"rl_kd row {row}", step).random(2), torch.zeros_like(policy), []
            for k, name in enumerate(NAMES):
                t = torch.as_tensor(teacher[LOGITS.of(name)])[place].double()
                state = torch.cat([r, torch.softmax(t, 0), ref_ce(t, label)[None], torch.ones(1).double()])
                chance = torch.sigmoid(state @ policy[line(method, k)])
                chosen = coins[k] < float(chance)
                slope[line(method, k)] += ((1 if chosen else 0) - chance) * state
                distances += [ref_kl(z[place], t, float(options.get("temperature", 10)))] if chosen else []
            reward = -float(ref_ce(z[place], label))
            if options.get("reward") == 2 and distances:
                reward -= float(sum(distances)) / len(distances)
            rewards.append(reward)
            slopes.append(slope)
    if options.get("reward") == 3:
        assert meta.row_labels is not None
        right = float((logits_of(meta).argmax(1) == meta.row_labels).double().mean())
        rewards = [options["gamma"] * reward + (1 - options["gamma"]) * right for reward in rewards]
    mean, number = float(np.mean(rewards)), len(rewards)
    for place, slope in enumerate(slopes):
        others = (sum(rewards) - rewards[place]) / (number - 1)
        shares = [0.8**age for age in range(len(earlier))][::-1]
        moving = float(np.dot(earlier, shares)) / sum(shares) if earlier else mean
        baseline = {"episode": others, "moving": moving, "none": 0.0}[options.get("baseline", "episode")]
        policy = policy + options["policy_rate"] / number * (rewards[place] - baseline) * slope
    return policy, mean


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "shared", "baseline": "none"},
        {"reward": 2, "temperature": 3.0},
        {"reward": 3, "gamma": 0.3, "baseline": "moving", "memory": 0.8},
        {"baseline": "moving", "memory": 0.8, "weights": "shared"},
    ],
)
def test_the_policy_moves_as_the_formula_says(options: dict[str, Any]) -> None:
    """Two steps of two micro-batches an episode, three episodes, and a student that has dropout and moves meanwhile."""
    options = {"episode": 2, "policy_rate": 2.0, **options}
    method, student, earlier = built(**options), student_of(dropout=0.5), []
    for episode in range(3):
        method.moment = dataclasses.replace(method.moment, step=4 + 2 * episode)
        past = [(micro_batch(number), answers(micro_batch(number), number)) for number in range(4 * episode, 4 * episode + 4)]
        meta, now = micro_batch(50 + episode), micro_batch(40)
        before = method.policy.clone()
        expected, mean = policy_by_hand(method, student, past, meta, options, earlier)
        drawn = torch.get_rng_state()
        method.prepare(Step(student, now, answers(now, 40), (meta, {}), past))
        assert torch.equal(torch.get_rng_state(), drawn)
        assert (expected - before).abs().max() > 1e-3
        torch.testing.assert_close(method.policy.double(), expected, rtol=1e-4, atol=1e-5)
        earlier.append(mean)
        method.prepare(Step(student, now, answers(now, 40), (meta, {})))  # another micro-batch of the step
        torch.testing.assert_close(method.policy.double(), expected, rtol=1e-4, atol=1e-5)
        assert student.model.training
        assert student.model.bert.encoder.layer[0].output.dropout.training
        assert all(weight.grad is None for weight in student.model.parameters())
        with torch.no_grad():
            for weight in student.model.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(episode)) * 0.3)


def test_rows_without_labels_or_teachers_leave_the_policy_alone() -> None:
    method, student, now = built(episode=1), student_of(0.0), micro_batch(40)
    before = method.policy.clone()
    blank = dataclasses.replace(micro_batch(2), row_labels=torch.full((3,), IGNORED))
    for past in ([(blank, answers(blank, 2))], [(micro_batch(2), {})], []):
        method.prepare(Step(student, now, answers(now, 40), None, past))
        assert torch.equal(method.policy, before)
    some = micro_batch(3)
    method.prepare(Step(student, now, answers(now, 40), None, [(some, answers(some, 3)), (blank, {})]))
    assert not torch.equal(method.policy, before)


# The coins


def test_coins_fall_as_the_policy_says_and_follow_from_seed_step_and_row_alone() -> None:
    method, batch = built(), make_batch("classes")
    teacher = answers(batch, 5)
    chance_BK = method.chances(method.states(teacher, batch))
    torch.manual_seed(1)
    seen = torch.stack([method.actions(chance_BK, batch, step) for step in range(3000)])
    torch.testing.assert_close(seen.mean(0), chance_BK, rtol=0, atol=0.04)
    assert float((seen[:, 0, 0] * seen[:, 0, 1]).mean()) == pytest.approx(float(chance_BK[0].prod()), abs=0.04)
    assert float((seen[:, 0, 0] * seen[:, 1, 0]).mean()) == pytest.approx(float(chance_BK[:2, 0].prod()), abs=0.04)
    torch.manual_seed(2)
    order = torch.tensor([3, 1])  # other company, other places
    fewer = Batch(**{f.name: v if (v := getattr(batch, f.name)) is None else v[order] for f in dataclasses.fields(batch)})
    for step in range(20):
        assert torch.equal(method.actions(chance_BK[order], fewer, step), seen[step][order])
    method.moment = dataclasses.replace(method.moment, seed=4)
    assert not all(torch.equal(method.actions(chance_BK, batch, step), seen[step]) for step in range(20))
    assert method.eval().actions(chance_BK, batch, 0).all()


# What is refused


def test_what_cannot_be_served_is_refused_with_what_would() -> None:
    def parsed(options: dict[str, object], head: tuple[str, int] = CLASSES, names: tuple[str, ...] = ("reader", *NAMES)) -> None:
        parse_method("rl_kd", {"semantic": "reader", **options}, shape(SMALL_BERT, *head), {name: shape(BERT, *head) for name in names})

    for head, found in ((SCORES, r"scores \(one label\)"), (CHOICES, "multiple_choice"), (TOKENS, "token_classification")):
        with pytest.raises(
            ValueError, match=f"probability of each class: expected a head of classification, found {found}; for others dgkd"
        ):
            parsed({}, head)
    with pytest.raises(ValueError, match="task_logits needs a student with a head of classification"):
        parsed({}, MLM)
    with pytest.raises(ValueError, match="method rl_kd: semantic: no teacher 'raeder'; did you mean 'reader'"):
        parsed({"semantic": "raeder"})
    with pytest.raises(ValueError, match="reader is the only teacher and reads rows: expected others to choose from"):
        parsed({}, names=("reader",))
    with pytest.raises(ValueError, match=r"reward: 3 is the same for all rows in part, .* expected moving or none"):
        parsed({"reward": 3})
    with pytest.raises(ValueError, match="semantic: "):
        parse_method("rl_kd", {}, shape(SMALL_BERT, *CLASSES), {"reader": shape(BERT, *CLASSES)})
    students, others = shape(SMALL_BERT, *CLASSES), shape(BERT, "classification", 4)
    with pytest.raises(ValueError, match=r"equal numbers of labels \(teacher one\) of student and teacher, found 3 and 4"):
        parse_method("rl_kd", {"semantic": "reader"}, students, {"reader": shape(BERT, *MLM), "one": others})
    assert built(reward=3, baseline="none").reads_meta
    assert not built().reads_meta
