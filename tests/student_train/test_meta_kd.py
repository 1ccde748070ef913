"""Meta-KD's means of domains and classes, and the weights that follow from them."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from given import BERT, CLASSES, SMALL_BERT, make_batch, make_features, shape

from online.batch import Batch, Features
from online.models import LoadedModel
from store.features import FeatureKey
from student_train.methods import parse_method
from student_train.methods.meta_kd import POOLED, MetaKD
from student_train.step import Step

LOGITS = FeatureKey("task_logits", positions="row")


def method() -> MetaKD:
    made = parse_method("meta_kd", {"domains": 3}, shape(SMALL_BERT, *CLASSES), shape(BERT, *CLASSES))
    assert isinstance(made, MetaKD)
    return made


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3)
    return LoadedModel.of(BertForSequenceClassification(config), "classification")


def answers(made: MetaKD, batch: Batch, pooled: Tensor, logits: Tensor) -> Features:
    return make_features(made.teacher_keys, shape(BERT, *CLASSES), batch, 1) | {POOLED: pooled, LOGITS: logits}


def test_means_are_of_all_labelled_rows_seen_so_far(student: LoadedModel) -> None:
    made, batch = method(), make_batch("classes")
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.randn(5, 12, generator=generator) for _ in range(2))
    for pooled in (first, second):
        made.prepare(Step(student, batch, answers(made, batch, pooled, torch.zeros(5, 3)), None))
    assert made.seen.tolist() == [[2, 2, 0], [0, 0, 0], [0, 0, 4]]  # the third row has no label
    torch.testing.assert_close(made.sums[0, 0], first[0] + second[0])
    torch.testing.assert_close(made.sums[0, 1], first[3] + second[3])
    torch.testing.assert_close(made.sums[2, 2], first[1] + first[4] + second[1] + second[4])
    assert not made.sums[1].any()
    assert made.state_dict().keys() >= {"sums", "seen"}
    made.eval()
    made(make_features(made.student_keys, shape(SMALL_BERT, *CLASSES), batch, 2), answers(made, batch, first, torch.zeros(5, 3)), batch)
    assert made.seen.sum() == 8  # measuring changes nothing


def test_a_row_like_its_class_in_all_domains_with_a_sure_and_right_teacher_counts_most() -> None:
    made, batch = method(), make_batch("classes")
    made.sums.copy_(torch.eye(12)[:3].expand(3, 3, 12))  # a direction for each class, the same in all domains
    made.seen.fill_(7)
    labels = torch.tensor([0, 2, 0, 1, 2])
    towards = torch.eye(12)[labels]
    sure = torch.nn.functional.one_hot(labels, 3) * 40.0

    def weights(pooled: Tensor, logits: Tensor) -> list[float]:
        found: list[float] = made.row_weights(answers(made, batch, pooled, logits), batch).tolist()
        return found

    assert weights(towards, sure) == pytest.approx([1, 1, 0, 1, 1])  # (1 + 1) / (1 + 1)
    assert weights(-towards, sure) == pytest.approx([0] * 5)
    assert weights(towards.roll(1, 1), sure) == pytest.approx([0.5, 0.5, 0, 0.5, 0.5])
    wrong = 2 / (1 + math.e)
    assert weights(towards, sure.roll(1, 1)) == pytest.approx([wrong, wrong, 0, wrong, wrong])
