"""Rows in pairs: who takes what of whom is drawn once, the same every time, and stays within the rows."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from text_rows import jsonl
from transformers import PreTrainedTokenizerFast

from online.batch import IGNORED
from online.collate import collate, collate_rows
from online.rows import build_rows, iter_groups
from online.rows_spec import RowsSpec, building_fingerprint
from store.errors import CorruptShard
from store.manifest import Provenance, Task
from store.pairs import sound
from store.reader import Store
from store.rows import Row
from store.strict import parse

MADE = Provenance(command=("test",), versions={}, created="2026-01-01T00:00:00Z")
TEXTS = ["the old man said he lost a class", "rome", "paris is in a city", "a girl turned on the faucet", "not nice !"]


def spec(path: Path, texts: int = 61, **options: object) -> RowsSpec:
    rows = [{"text": " ".join(TEXTS[(number + k) % 5] for k in range(1 + number % 4)), "n": number} for number in range(texts)]
    name = jsonl(path / "texts.jsonl", rows)
    plain = {"sources": [{"files": [name]}], "objective": "mlm", "max_length": 32, "interchange": {}}
    return parse(RowsSpec, {**plain, **options}, "rows")


def pairs_of(spec: RowsSpec, tokenizer: PreTrainedTokenizerFast, **options: int) -> list[list[Row]]:
    return list(iter_groups(spec, tokenizer, **options))


def content(groups: list[list[Row]]) -> list[tuple]:
    return [
        (row.record, row.copy, row.group, row.draw, row.interchange.tolist(), row.input_ids.tolist()) for rows in groups for row in rows
    ]


def exchanged(rows: list[Row]) -> list[np.ndarray]:
    """Positions in each row of a pair, in the order of the first row's."""
    one = np.flatnonzero(rows[0].interchange >= 0)
    return [one, rows[0].interchange[one]]


def test_each_row_stands_in_one_pair_and_an_odd_one_is_left_out(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    groups = pairs_of(spec(tmp_path), bert)
    assert [len(rows) for rows in groups] == [2] * 30
    assert [row.group for rows in groups for row in rows] == [number for number in range(30) for _ in range(2)]
    records = [row.record for rows in groups for row in rows]
    assert len(set(records)) == 60
    assert records != sorted(records)
    for rows in groups:
        plan = np.concatenate([row.interchange for row in rows])
        lengths = [len(row.input_ids) for row in rows]
        assert sound(plan, np.array(lengths), np.array([row.draw for row in rows]))
        assert (rows[0].interchange >= 0).sum() == int(0.3 * min(lengths))
        assert 0 <= rows[0].draw < 1 << 31
    assert len({rows[0].draw for rows in groups}) == 30


def test_a_stretch_starts_anywhere_in_each_row(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    groups = pairs_of(spec(tmp_path, texts=801), bert)
    starts: Counter[tuple[int, int, int]] = Counter()
    for rows in groups:
        one, other = exchanged(rows)
        if len(one):
            assert (np.diff(one) == 1).all()
            assert (np.diff(other) == 1).all()
            for row, places in zip(rows, (one, other), strict=True):
                starts[len(row.input_ids), len(one), int(places[0])] += 1
    for length, count in {(length, count) for length, count, _ in starts}:
        found = {start for many, some, start in starts if (many, some) == (length, count)}
        assert found <= set(range(length - count + 1))
        if sum(starts[length, count, start] for start in found) > 200:
            assert found == set(range(length - count + 1))  # the special tokens at both ends among them


@pytest.mark.parametrize("most", [None, 2])
def test_random_and_masked_positions_are_those_alone(tmp_path: Path, bert: PreTrainedTokenizerFast, most: int | None) -> None:
    seen = set()
    for rows in pairs_of(spec(tmp_path, interchange={"positions": "random", "share": 0.5, "most": most}), bert):
        one, other = exchanged(rows)
        assert len(one) == min(int(0.5 * min(len(row.input_ids) for row in rows)), most or 99)
        assert (np.diff(other) > 0).all()
        seen.add(tuple(one))
    assert len(seen) > 10
    for rows in pairs_of(spec(tmp_path, interchange={"positions": "masked", "share": 0.9, "most": most}), bert):
        masked = [np.flatnonzero(row.token_labels != IGNORED) for row in rows]
        assert len(exchanged(rows)[0]) == min(*map(len, masked), most or 99)
        for places, of_row in zip(exchanged(rows), masked, strict=True):
            assert set(places) <= set(of_row)


def test_pairs_are_the_same_every_time_however_the_corpus_is_read(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    first = content(pairs_of(spec(tmp_path), bert))
    assert content(pairs_of(spec(tmp_path), bert, read_rows=7)) == first
    assert content(pairs_of(spec(tmp_path, seed=1), bert)) != first


def test_masking_copies_have_partners_positions_and_draws_of_their_own(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    groups = pairs_of(spec(tmp_path, texts=60, copies=3), bert)
    partners, plans = [{}, {}, {}], [{}, {}, {}]
    for one, other in groups:
        for row, partner in ((one, other), (other, one)):
            assert row.copy == partner.copy
            partners[row.copy][row.record] = partner.record
            plans[row.copy][row.record] = (row.draw, row.interchange.tolist())
    assert all(len(found) == 60 for found in partners)
    same = [sum(partners[a][record] == partners[b][record] for record in partners[0]) for a, b in ((0, 1), (1, 2), (0, 2))]
    assert max(same) < 12  # two of 60 by chance
    assert all(plans[0][record] != plans[1][record] for record in plans[0])
    alone = content(pairs_of(spec(tmp_path, texts=60), bert))
    assert [row for row in content(groups) if row[1] == 0] == alone


def test_partners_are_of_one_split_and_close_together(
    tmp_path: Path,
    bert: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("online.pairs.WINDOW", 10)
    groups = pairs_of(spec(tmp_path, texts=100, hold_out=0.3), bert)
    place: Counter[str] = Counter()
    number = {}
    for line in (tmp_path / "texts.jsonl").read_text().splitlines():
        record = json.loads(line)["n"]
        split = next((row.split for rows in groups for row in rows if row.record == record), None)
        number[record] = place[split]
        place[split] += 1
    assert set(place) >= {"train", "dev"}
    for one, other in groups:
        assert one.split == other.split
        assert abs(number[one.record] - number[other.record]) <= 11  # a row that was left out is not counted


def test_rows_without_pairs_are_as_they_always_were(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    plain = spec(tmp_path, interchange=None)
    assert building_fingerprint(plain) != building_fingerprint(spec(tmp_path))
    masks = {row.record: row.input_ids.tolist() for (row,) in pairs_of(plain, bert)}
    assert all(row.input_ids.tolist() == masks[row.record] for rows in pairs_of(spec(tmp_path), bert) for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "n"}, "interchange: pairs are groups: leave choices and group out"),
        ({"choices": ["a", "b"], "objective": "plain"}, "interchange: pairs are groups"),
        ({"objective": "plain", "interchange": {"positions": "masked"}}, "positions: only objective mlm has masked tokens"),
        ({"interchange": {"share": 0}}, "share"),
        ({"interchange": {"most": 0}}, "most"),
        ({"interchange": {"position": "random"}}, "did you mean 'positions'"),
    ],
)
def test_pairs_that_cannot_be_made_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(tmp_path, **options)


def test_a_batch_has_plans_where_partners_stand_together(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    groups = pairs_of(spec(tmp_path), bert)
    build_rows(spec(tmp_path), bert, tmp_path / "store", MADE)
    store = Store.open(tmp_path / "store")
    batch = collate(store, np.array([6, 7, 2, 3]))
    rows = [*groups[3], *groups[1]]
    assert batch.draws.tolist() == [row.draw for row in rows]
    for place, row in enumerate(rows):
        length = len(row.input_ids)
        assert batch.interchange[place, :length].tolist() == row.interchange.tolist()
        assert (batch.interchange[place, length:] == -1).all()
    direct = collate_rows(rows, "mlm", Task(kind="none"), 0)
    assert direct.interchange.equal(batch.interchange)
    assert direct.draws.equal(batch.draws)
    for some in ([5], [5, 5], [2, 3, 4], [1, 2]):
        alone = collate(store, np.array(some))
        assert alone.interchange is None
        assert alone.draws is None


def test_a_plan_that_lies_is_found_before_it_is_used(
    tmp_path: Path,
    bert: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_rows(spec(tmp_path), bert, tmp_path / "store", MADE)
    store = Store.open(tmp_path / "store")
    monkeypatch.setattr(type(store.rows), "draw_at", lambda table, rows: rows)
    with pytest.raises(CorruptShard, match="hold pairs of which one takes what the other has not"):
        collate(store, np.array([0, 1]))
