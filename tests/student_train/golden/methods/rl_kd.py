"""RL-KD: teachers that a policy chose for each row. What moves the policy is tests/student_train/test_rl_kd.py."""

from collections.abc import Callable
from dataclasses import replace

import torch
from case import Case
from formulas import hard_classes, kl_at
from given import BERT, CLASSES, Given, Reference, make_batch, make_features, ref_ce, shape
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from online.batch import Batch, Features
from online.models import LoadedModel
from student_train.methods.base import Method
from student_train.moment import Moment
from student_train.step import Step

OTHERS = {"second": BERT | dict(layers=3, windows=(None,) * 3), "third": BERT}
LABELS = [0, 2, None, 1, 2]
MOMENT = Moment(step=6, steps=100, epoch_steps=10.0, seed=3)


def chosen(g: Given, row: int, chooses: list[str], reader: str) -> list[str]:
    """The teachers whose coin fell: the policy by hand, with A in front and b at the end of each line of it."""
    meaning, lines = g.T[reader], g.P["policy"]
    assert isinstance(meaning, Tensor)
    r = meaning[row] / (meaning[row] @ meaning[row]).sqrt()
    coins, label, found = g.moment.draws(f"rl_kd row {row}", g.moment.step).random(len(chooses)), LABELS[row], []
    for k, name in enumerate(chooses):
        z = g.T[f"{name}/task_logits"][row]
        line = lines[k if len(lines) > 1 else 0]
        loss = torch.zeros(()) if label is None else ref_ce(z, label)
        score = line[: len(r)] @ r + line[len(r) : -2] @ torch.softmax(z, 0) + line[-2] * loss + line[-1]
        if coins[k] < 1 / (1 + torch.exp(-score)):
            found.append(name)
    return found


def rl_kd(alpha: float, temperature: float, chooses: list[str], reader: str, numbers: list[int]) -> Reference:
    """``numbers``: how many teachers each row was seen to have, so that the cases are known to hold all kinds."""

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        soft = torch.zeros((), dtype=torch.float64)
        rows = [chosen(g, row, chooses, f"{reader}/final") for row in range(5)]
        assert [len(names) for names in rows] == numbers
        for row, names in enumerate(rows):
            for name in names:
                soft = soft + kl_at(temperature)(g.S["task_logits"][row], g.T[f"{name}/task_logits"][row]) / len(names)
        loss, count = hard_classes(g)
        return {"soft": (alpha * soft, 5)} | ({"hard": ((1 - alpha) * loss, count)} if alpha < 1 else {})

    return reference


def policy(method: Method) -> None:
    """Numbers for which some rows take no teacher, some one and some both."""
    lines = method.get_buffer("policy")
    lines.copy_(torch.randn(lines.shape, generator=torch.Generator().manual_seed(8)))


def student() -> LoadedModel:
    """As the golden student, but real: to be paid for what it answers."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=16,
        num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    return LoadedModel.of(BertForSequenceClassification(config).train(), "classification")


def answers(method: Method, batch: Batch, seed: int) -> Features:
    """Of all teachers, for one micro-batch."""
    found: Features = {}
    for place, name in enumerate(("first", *OTHERS)):
        keys = frozenset(key.of("") for key in method.teacher_keys if key.pass_name == name)
        found |= {key.of(name): value for key, value in make_features(keys, shape(BERT, *CLASSES), batch, seed + place).items()}
    return found


def after(episodes: int, steps: int) -> Callable[[Method], None]:
    """The policy after so many episodes of as many steps, each of one micro-batch."""

    def set_up(method: Method) -> None:
        policy(method)
        batch, loaded = make_batch("classes"), student()
        meta: tuple[Batch, Features] = replace(batch, row_labels=torch.tensor([0, 0, 1, 1, 2])), {}
        for number in range(episodes):
            method.moment = replace(MOMENT, step=MOMENT.step - episodes + number + 1)
            past = [(batch, answers(method, batch, 10 * step)) for step in range(steps)]
            method.prepare(Step(loaded, batch, past[0][1], meta, past))

    return set_up


def case(options: dict[str, object], reference: Reference, set_up: Callable[[Method], None] = policy) -> Case:
    options = {"semantic": "first", **options}
    return Case("rl_kd", options, reference, CLASSES, labels="classes", others=OTHERS, moment=MOMENT, set_up=set_up)


BOTH = ["second", "third"]

CASES: dict[str, Case] = {
    "rl_kd": case({}, rl_kd(0.5, 10, BOTH, "first", [2, 1, 1, 1, 2])),
    "rl_kd shared": case({"weights": "shared", "alpha": 0.3, "temperature": 2}, rl_kd(0.3, 2, BOTH, "first", [2, 1, 0, 2, 2])),
    "rl_kd teachers alone": case({"semantic": "third", "alpha": 1}, rl_kd(1, 10, ["first", "second"], "third", [0, 1, 0, 2, 2])),
    "rl_kd learned": case({"episode": 2, "policy_rate": 3}, rl_kd(0.5, 10, BOTH, "first", [2, 1, 1, 1, 2]), set_up=after(1, 2)),
    "rl_kd by accuracy": case(
        {"episode": 1, "reward": 3, "baseline": "moving"}, rl_kd(0.5, 10, BOTH, "first", [2, 1, 1, 1, 2]), set_up=after(3, 1)
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("rl_kd", {"semantic": "second"}),
    ("rl_kd", {"alpha": 1}),
    ("rl_kd", {"temperature": 2}),
    ("rl_kd learned", {"episode": 1}),
    ("rl_kd learned", {"reward": 2}),
    ("rl_kd by accuracy", {"gamma": 0.9}),
    ("rl_kd learned", {"baseline": "none"}),
    ("rl_kd by accuracy", {"baseline": "none"}),
    ("rl_kd by accuracy", {"memory": 0.1}),
    ("rl_kd", {"weights": "shared"}),
    ("rl_kd learned", {"policy_rate": 0.1}),
]

MODELS = [
    ("rl_kd", {"semantic": "first"}, "bert", "classification"),
    ("rl_kd", {"semantic": "second", "weights": "shared"}, "llama", "classification"),
]

LIVE = [("rl_kd", "class", {"semantic": "first"}), ("rl_kd", "class", {"semantic": "second", "alpha": 1.0, "temperature": 2.0})]

RUNS = [
    ("rl_kd", {"semantic": "small", "episode": 3, "policy_rate": 5.0}),
    ("rl_kd", {"semantic": "small", "episode": 3, "policy_rate": 5.0, "reward": 2, "baseline": "moving", "weights": "shared"}),
]
