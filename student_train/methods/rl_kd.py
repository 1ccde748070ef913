"""A policy that learns which teachers each row learns from.

Shapes: B rows of a micro-batch, R those of a whole episode, K teachers to choose from, C classes, W width of the semantic encoder,
S = W + C + 2 numbers of a state, the last of them 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from online.batch import IGNORED, Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from store.strict import did_you_mean
from student_train.gather import summed
from student_train.methods.base import Method, Stages, TeacherShapes, Temperature, Terms, check_site, row_token
from student_train.methods.decisions import hard_losses, shared_task
from student_train.methods.losses import kl, vectors
from student_train.methods.task_loss import answer_count, label_count, label_loss, row_labels
from student_train.step import Step


class Played(NamedTuple):
    """Rows whose actions were taken, and what came of them."""

    states: Tensor
    """[R, K, S]."""
    surprises: Tensor
    """[R, K] action minus its probability."""
    rewards: Tensor
    """[R]."""
    labelled: Tensor
    """[R] bool."""


class RLKD(Method):
    """alpha / |chosen| sum_{k chosen} T^2 KL(softmax(z_k / T) || softmax(z_s / T)) + (1 - alpha) CE(y, z_s), chosen by a policy.

    Yuan, Shou, Pei, Lin, Gong, Fu, Jiang, "Reinforced Multi-Teacher Selection for Knowledge Distillation", AAAI 2021, arXiv
    2012.06048. For each row and teacher k a coin of its own falls with probability

        pi(a_k = 1 | s_k) = sigmoid(A s_k + b),    s_k = [ R(x) ; softmax(z_k) ; CE(y, z_k) ]

    where R(x) is what the teacher named ``semantic`` has at [CLS] (causal ones: at the last token) after its last norm, at unit length,
    so that rates mean the same at any width. That one teaches nothing; a model that is to do both gets two names. A row for which no
    teacher is chosen learns from its label alone. The policy starts at 1/2 and stays as it is for an episode of so many optimiser steps, in
    which the student learns. Then the rows of the episode are looked at again with the student that came of it (dropout off), and
    REINFORCE moves the policy before the next step is taken, by

        policy_rate * mean over rows of (reward - baseline) grad log pi(actions of the row)

    Rewards of a row: ``1`` is -CE(y, z_s); ``2`` that minus the mean T^2 KL to its chosen teachers (0 where there is none, which it
    favours); ``3`` is -gamma CE + (1 - gamma) times the accuracy on the phase's ``meta`` rows, as many as a micro-batch has. Baselines:
    the mean of the ``episode``'s other rows, which leaves the expected step as it is; a ``moving`` mean of earlier episodes, each of
    which counts ``memory`` times the one after it; ``none``. What is the same for all rows of an episode, as accuracy is, the first
    takes away. Rows without a label have CE 0 in their states and move no policy.

    Coins follow from seed, step and number of the row alone, so nothing has to be remembered of an episode but the policy, which
    ``carry`` takes into a later phase. When the student is measured, all teachers are chosen.

    Unverified for the paper: (A, b) ``shared`` by all teachers, as the formula is written, or one for ``each``, which told a good teacher
    from a misleading one more surely; rewards 2 and 3 and gamma; that a row is paid for itself; episode, rate (less for reward 2,
    which is as large as T^2 KL) and baseline. alpha and T are those of GLMD's authors (Tan et al. 2023, arXiv 2306.06625, without
    T^2). Their code deviates, and none of it is offered: pi instead of log pi without a baseline, so that every action becomes less
    likely as long as rewards are negative; the action of a step is paid by the loss of the next batch; the sum is divided by the
    number of all teachers; logits stand for probabilities; the policy learns with the student's optimizer.

    Terms ``soft`` (rows) and ``hard`` (those with a label).
    """

    paper = "Yuan, Shou, Pei, Lin, Gong, Fu, Jiang 2021, AAAI, arXiv 2012.06048"
    stages: ClassVar[Stages] = {"task average": ("soft", "hard"), "task reinforced": ("soft", "hard")}
    kinds = frozenset({"changes its loss as it goes", "learns from several teachers", "trains in several phases"})
    accepts = "classes; a teacher more, to read rows"
    several = True
    learned_buffers = ("policy",)

    policy: Tensor
    """[K, S], or [1, S] for all teachers: A, and b in the last column."""
    average: Tensor
    """[2] sum of the mean rewards of earlier episodes, each ``memory`` times the one after it, and of as many ones."""

    def __init__(
        self,
        student: ModelShape,
        teachers: TeacherShapes,
        *,
        semantic: str,
        alpha: Annotated[float, Field(gt=0, le=1)] = 0.5,
        temperature: Temperature = 10.0,
        episode: Annotated[int, Field(ge=1)] = 10,
        reward: Literal[1, 2, 3] = 1,
        gamma: Annotated[float, Field(ge=0, le=1)] = 0.5,
        baseline: Literal["episode", "moving", "none"] = "episode",
        memory: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        weights: Literal["each", "shared"] = "each",
        policy_rate: Annotated[float, Field(gt=0)] = 10.0,
    ) -> None:
        check_site("task_logits", student, None)
        if student.head != "classification" or student.labels == 1:
            found = "scores (one label)" if student.head == "classification" else student.head
            raise ValueError(
                f"its policy looks at the probability of each class: expected a head of classification, found {found}; for others dgkd "
                "with survival: 1.0 and combine: mean is the average of all teachers"
            )
        if semantic not in teachers:
            raise ValueError(f"semantic: no teacher {semantic!r}{did_you_mean(semantic, sorted(teachers))}")
        choice = {name: shape for name, shape in teachers.items() if name != semantic}
        if not choice:
            raise ValueError(f"{semantic} is the only teacher and reads rows: expected others to choose from; a model may have two names")
        if reward == 3 and baseline == "episode":
            raise ValueError("reward: 3 is the same for all rows in part, which baseline: episode takes away; expected moving or none")
        key = shared_task(student, choice)
        reader = FeatureKey("final", positions=row_token(teachers[semantic])).of(semantic)
        super().__init__({key}, {key.of(name) for name in choice} | {reader}, reads_labels=True)
        self.key, self.reader, self.shape, self.teachers = key, reader, student, tuple(choice)
        self.alpha, self.temperature, self.policy_rate = alpha, temperature, policy_rate
        self.reward, self.gamma, self.baseline, self.memory = reward, gamma, baseline, memory
        self.look_back, self.reads_meta = episode, reward == 3
        size = teachers[semantic].width + student.labels + 2
        self.register_buffer("policy", torch.zeros(len(choice) if weights == "each" else 1, size))
        self.register_buffer("average", torch.zeros(2))

    def counts(self, batch: Batch) -> Terms:
        terms = {"soft": answer_count(batch, self.shape)}
        return terms | ({"hard": label_count(batch, self.shape)} if self.alpha < 1 else {})

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        logits_BC = vectors(student, self.key, batch)
        action_BK = self.actions(self.chances(self.states(teacher, batch)), batch, self.moment.step)
        terms = {"soft": self.alpha * self._divergence(logits_BC, teacher, batch, action_BK).sum()}
        if self.alpha < 1:
            terms["hard"] = (1 - self.alpha) * label_loss(logits_BC, batch, self.shape)
        return terms

    def states(self, teacher: Features, batch: Batch) -> Tensor:
        """[B, K, S] what the policy knows of each row and teacher."""
        meaning_BW = F.normalize(vectors(teacher, self.reader, batch), dim=-1)
        states = []
        for name in self.teachers:
            logits_BC = vectors(teacher, self.key.of(name), batch)
            loss_B1 = hard_losses(logits_BC, batch, self.shape)[:, None]
            states.append(torch.cat([meaning_BW, logits_BC.softmax(-1), loss_B1, torch.ones_like(loss_B1)], 1))
        return torch.stack(states, 1)

    def chances(self, state_BKS: Tensor) -> Tensor:
        """[B, K] probability that the policy chooses a teacher."""
        return (state_BKS * self.policy).sum(-1).sigmoid()

    def actions(self, chance_BK: Tensor, batch: Batch, step: int) -> Tensor:
        """[B, K] 1 where a teacher is chosen in ``step``; all are while the student is measured."""
        if not self.training:
            return torch.ones_like(chance_BK)
        coins = [self.moment.draws(f"rl_kd row {row}", step).random(len(self.teachers)) for row in batch.rows.tolist()]
        return (torch.from_numpy(np.stack(coins)).to(chance_BK.device) < chance_BK).float()

    @torch.no_grad()
    def prepare(self, step: Step) -> None:
        taught = [(number, batch, teacher) for number, (batch, teacher) in enumerate(step.past) if teacher]
        if not taught:  # on all ranks alike
            return
        first, in_a_step = self.moment.step - self.look_back, len(step.past) // self.look_back
        with _measured(step.student.model):
            accuracy = self._accuracy(step) if self.reads_meta else torch.zeros(())
            parts = [self._replayed(step, batch, teacher, first + number // in_a_step) for number, batch, teacher in taught]
        played = Played(*map(torch.cat, zip(*parts, strict=True)))
        if self.reads_meta:
            played = played._replace(rewards=self.gamma * played.rewards + (1 - self.gamma) * accuracy)
        self.learn(played)

    def learn(self, played: Played) -> None:
        """REINFORCE with this rank's rows of an episode; a collective."""
        state_RKS, surprise_RK, reward_R = (value[played.labelled] for value in played[:3])
        total, number = summed(torch.stack([reward_R.sum(), reward_R.new_tensor(len(reward_R))]), self.training)
        if number == 0:  # over all ranks
            return
        gain_R = self._gains(reward_R, total, number)
        slope_KS = torch.einsum("r,rk,rks->ks", gain_R, surprise_RK, state_RKS)
        if len(self.policy) == 1:
            slope_KS = slope_KS.sum(0, keepdim=True)
        self.policy.add_(summed(slope_KS, self.training), alpha=self.policy_rate / float(number))

    def _gains(self, reward_R: Tensor, total: Tensor, number: Tensor) -> Tensor:
        """[R] rewards less the baseline; ``total`` is the sum of all ranks' ``number`` rewards."""
        if self.baseline == "none":
            return reward_R
        if self.baseline == "episode":
            return (number * reward_R - total) / (number - 1).clamp(min=1)
        earlier, weight = self.average.tolist()
        self.average.mul_(self.memory).add_(torch.stack([total / number, torch.ones_like(total)]))
        return reward_R - (earlier / weight if weight else total / number)

    def _replayed(self, step: Step, batch: Batch, teacher: Features, at: int) -> Played:
        """The rows of a micro-batch of step ``at`` with the actions that were taken there, paid by the student as it is now."""
        answers = step.run(batch, {self.key})
        with torch.autocast(batch.mask.device.type, enabled=False):
            logits_BC, state_BKS = vectors(answers, self.key, batch), self.states(teacher, batch)
            chance_BK = self.chances(state_BKS)
            action_BK = self.actions(chance_BK, batch, at)
            reward_B = -hard_losses(logits_BC, batch, self.shape)
            if self.reward == 2:
                reward_B = reward_B - self._divergence(logits_BC, teacher, batch, action_BK)
        return Played(state_BKS, action_BK - chance_BK, reward_B, row_labels(batch, self.shape) != IGNORED)

    def _divergence(self, logits_BC: Tensor, teacher: Features, batch: Batch, action_BK: Tensor) -> Tensor:
        """[B] mean of T^2 KL to the teachers that are chosen; 0 where there is none."""
        temperature = self.now(self.temperature)
        losses_BK = torch.stack([kl(logits_BC, vectors(teacher, self.key.of(name), batch), temperature) for name in self.teachers], 1)
        return (action_BK * losses_BK).sum(1) / action_BK.sum(1).clamp(min=1)

    def _accuracy(self, step: Step) -> Tensor:
        """0-d share of the held-out rows, of all ranks, that the student gets right."""
        assert step.meta is not None
        batch = step.meta[0]
        labels_B = row_labels(batch, self.shape)
        right_B = vectors(step.run(batch, {self.key}), self.key, batch).argmax(-1) == labels_B
        right, number = summed(torch.stack([right_B.sum(), (labels_B != IGNORED).sum()]).float(), self.training)
        return right / number.clamp(min=1)


@contextmanager
def _measured(model: nn.Module) -> Iterator[None]:
    """``model`` without dropout for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
