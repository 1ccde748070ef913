"""Rows that keep their padding: what they are, and that models answer on them as transformers does on a padded batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from text_rows import jsonl, rows, spec
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from online.batch import IGNORED, PADDING, Batch, dense
from online.capture import Capture
from online.collate import collate_rows
from online.models import LoadedModel, forward
from online.padded import filled
from online.rows_spec import building_fingerprint
from store.features import FeatureKey
from store.manifest import Task
from store.rows import Row

TEXTS = [{"text": "the girl lives in rome"}, {"text": "a man"}]


def test_rows_are_filled_up_with_padding_that_nothing_masks_or_labels(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    files = jsonl(tmp_path / "a.jsonl", TEXTS)
    options = {"objective": "mlm", "mask_probability": 0.9, "max_length": 12}
    for row, plain in zip(rows(spec(files, padding=True, **options), bert), rows(spec(files, **options), bert), strict=True):
        length = len(plain.input_ids)
        assert row.input_ids.tolist() == [*plain.input_ids.tolist(), *[bert.pad_token_id] * (12 - length)]
        assert plain.token_labels is not None
        assert row.token_labels is not None
        assert row.token_labels.tolist() == [*plain.token_labels.tolist(), *[IGNORED] * (12 - length)]
        assert row.documents is not None
        assert row.documents.tolist() == [*[0] * length, *[PADDING] * (12 - length)]
        assert row.labelled == plain.labelled


def test_rows_without_padding_are_known_by_the_fingerprint_that_they_always_had(tmp_path: Path) -> None:
    files = jsonl(tmp_path / "a.jsonl", TEXTS)
    plain = spec(files, objective="mlm")
    assert building_fingerprint(plain) == building_fingerprint(spec(files, objective="mlm", padding=False))
    assert building_fingerprint(plain) != building_fingerprint(spec(files, objective="mlm", padding=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "padding: expected objective mlm"),
        ({"objective": "causal"}, "padding: expected objective mlm"),
        ({"objective": "mlm", "long": "pack"}, "padding: expected rows of one text"),
        ({"objective": "mlm", "interchange": {}}, "padding: rows in pairs"),
    ],
)
def test_what_padding_does_not_go_with_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        spec(jsonl(tmp_path / "a.jsonl", TEXTS), padding=True, **options)


LENGTH = 16


def padded_batch(pad_id: int) -> Batch:
    generator = torch.Generator().manual_seed(3)
    made = []
    for number, length in enumerate((11, 4, LENGTH)):
        ids = torch.randint(4, 61, (length,), generator=generator, dtype=torch.int32).numpy()
        row = Row(ids, None, None, None, 0, None, number, 0, "train", "", number, 0, [])
        made.append(filled(row, LENGTH, pad_id))
    return collate_rows(made, "plain", Task(kind="none"), pad_id)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "electra", "distilbert", "roberta", "xlm-roberta"])
def test_answers_on_padding_are_those_of_transformers_on_a_padded_batch(
    name: str, attention: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model, batch = tiny_model(name, "masked_lm", attention), padded_batch(1)
    assert batch.mask.all()
    loaded = LoadedModel.of(model, "masked_lm", None)
    keys = [FeatureKey("lm_logits"), FeatureKey("hidden", 2), FeatureKey("attention_scores", 1)]
    with torch.no_grad(), Capture(loaded, keys) as capture:
        forward(loaded, batch)
        features = capture.features(batch)
        text = (batch.input_ids != 1).long()
        assert text.sum(1).tolist() == [11, 4, LENGTH]
        eager = tiny_model(name, "masked_lm", "eager")
        expected = eager(input_ids=batch.input_ids, attention_mask=text, output_hidden_states=True, output_attentions=True)
    close = {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(dense(features, keys[0]), expected.logits, **close)
    torch.testing.assert_close(dense(features, keys[1]), expected.hidden_states[2], **close)
    torch.testing.assert_close(dense(features, keys[2]).softmax(-1), expected.attentions[0], **close)
