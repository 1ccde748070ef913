"""Dumps of a teacher into which partners' hidden states are written: partners stay together, and what a pass is does not change."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from tiny_dump import Outcome, Tree, World, stored_bytes

from online.batch import BUCKET
from online.collate import collate
from online.encode import assemble
from online.interchange import answered
from online.models import ModelSpec, load_model
from store.features import FeatureKey
from store.intervention import Intervention
from store.reader import Store
from teacher_dump.answering import Answering
from teacher_dump.batch_size import longest_row
from teacher_dump.batches import cut, padded_lengths, padding, whole
from teacher_dump.work import Item, Work

Run = Callable[..., Outcome]


@pytest.fixture
def recipe(masked_recipe: Tree) -> Tree:
    rows = {**masked_recipe["rows"], "interchange": {}}
    return {**masked_recipe, "rows": rows, "intervention": {"layers": [[1], [2]]}, "features": ["hidden.*@all", "lm_logits@labels"]}


def test_a_dump_holds_what_the_teacher_says_with_its_partners_states(
    recipe: Tree, write: Callable[[Tree], Path], teacher_dump: Run, world: World
) -> None:
    done = teacher_dump("run", write(recipe))
    assert done.code == 0, done.err
    store = Store.open(Path(recipe["store"]))
    assert store.manifest.passes["bert"].intervention == Intervention(layers=((1,), (2,)))
    loaded = load_model(ModelSpec(model=world.masked, head="masked_lm"))
    keys = [FeatureKey("hidden", block) for block in (0, 1, 2)]
    for batch_rows in cut(store.rows, store.rows.rows_of(1), 256):
        batch = collate(store, batch_rows)
        live = answered(loaded, batch, keys, Intervention(layers=((1,), (2,))))
        for key in keys:
            arrays = store.read(key.of("bert"), batch_rows)
            assert torch.equal(assemble(key, store.spec(key.of("bert")), arrays, batch), live[key]), key
    plain = answered(loaded, batch, keys)
    assert not torch.equal(plain[keys[2]], live[keys[2]])
    verified = teacher_dump("verify", recipe["store"])
    assert verified.code == 0, verified.out
    assert teacher_dump("show", recipe["store"]).code == 0
    status = teacher_dump("status", recipe["store"])
    assert "in pairs, with what each row takes of the other" in status.out
    assert "with the partner's hidden states written over the output of blocks 1 or 2" in status.out


def test_partners_stand_in_one_batch_and_are_padded_alike(recipe: Tree, write: Callable[[Tree], Path], teacher_dump: Run) -> None:
    assert teacher_dump("rows", write(recipe)).code == 0
    rows = Store.open(Path(recipe["store"])).rows
    for slot in range(rows.info.slots):
        members, lengths = rows.rows_of(slot), rows.at(rows.rows_of(slot)).length
        longer = np.repeat(np.maximum(lengths[0::2], lengths[1::2]), 2)
        assert padded_lengths(rows, members).tolist() == (-(-longer // BUCKET) * BUCKET).tolist()
        for tokens in (16, 64, 100, 4096):
            batches = cut(rows, members, tokens)
            assert sorted(np.concatenate(batches)) == members.tolist()
            for batch in batches:
                assert (batch[0::2] % 2 == 0).all()
                assert (batch[1::2] == batch[0::2] + 1).all()
                assert len(set(padded_lengths(rows, batch))) == 1
                assert len(batch) == 2 or int(padded_lengths(rows, batch).sum()) <= tokens
    assert whole(rows, np.array([1, 4, 5])).tolist() == [0, 1, 4, 5]
    assert padding(rows, range(rows.info.slots)) > 0
    assert rows.at(whole(rows, np.array([longest_row(rows)]))).length.max() == rows.longest


def test_a_batch_that_is_too_large_is_halved_between_pairs(recipe: Tree, write: Callable[[Tree], Path], teacher_dump: Run) -> None:
    assert teacher_dump("rows", write(recipe)).code == 0
    store = Store.open(Path(recipe["store"]))
    work = Work(None, "bert", store.rows, 4096)  # type: ignore[arg-type]
    members = store.rows.rows_of(0)
    work.halve(Item(0, members, 4096, last=False))
    assert sorted(np.concatenate(list(work._batches))) == members.tolist()
    assert all(len(batch) % 2 == 0 for batch in work._batches)
    with pytest.raises(Exception, match="out of memory with row 2 of"):
        work.halve(Item(0, np.array([2, 3]), 4096, last=False))


def test_automatic_batches_and_a_plan_run_the_teacher_on_whole_pairs(
    recipe: Tree, write: Callable[[Tree], Path], teacher_dump: Run
) -> None:
    told = teacher_dump("plan", write({**recipe, "batch_tokens": "auto"}))
    assert told.code == 0, told.err
    assert "batches of" in told.out + told.err
    assert not Path(recipe["store"]).exists()
    again = teacher_dump("plan", write(recipe), "--no-measure", "--json")
    assert again.code == 0, again.err
    assert teacher_dump("run", write({**recipe, "batch_tokens": "auto"})).code == 0


def test_a_pass_goes_on_with_its_own_intervention_alone(recipe: Tree, write: Callable[[Tree], Path], teacher_dump: Run) -> None:
    assert teacher_dump("run", write(recipe)).code == 0
    kept = stored_bytes(Path(recipe["store"]))
    for changed in ({"layers": [[1]]}, None):
        refused = teacher_dump("run", write({**recipe, "intervention": changed}))
        assert refused.code == 2
        assert "has another intervention: expected layers=((1,), (2,)) as stored" in refused.err
        planned = teacher_dump("plan", write({**recipe, "intervention": changed}))
        assert planned.code == 2
        assert "has a pass bert with another intervention" in planned.err
        further = teacher_dump("add", write({**recipe, "intervention": changed, "features": ["hidden.1@all", "final@first"]}))
        assert further.code == 2
        assert "has a pass bert with another intervention: expected layers=((1,), (2,)) as stored" in further.err
    assert stored_bytes(Path(recipe["store"])) == kept
    shutil.rmtree(recipe["store"])
    assert teacher_dump("run", write(recipe)).code == 0
    assert stored_bytes(Path(recipe["store"])) == kept


def test_what_cannot_be_is_refused_before_weights_load(recipe: Tree, write: Callable[[Tree], Path], teacher_dump: Run) -> None:
    plain = {name: value for name, value in recipe["rows"].items() if name != "interchange"}
    for changed, message in (
        ({"rows": plain}, "intervention: rows need partners to take hidden states of: build them with rows.interchange"),
        ({"intervention": {"layers": [[3]]}}, "intervention: layers: expected different blocks from 1 to 2, found [3]"),
        ({"intervention": {"layers": []}}, "intervention.layers"),
        ({"intervention": {"layer": [[1]]}}, "did you mean 'layers'"),
    ):
        refused = teacher_dump("run", write({**recipe, **changed}))
        assert refused.code == 2
        assert message in refused.err
        assert not Path(recipe["store"]).exists()


def test_a_dummy_of_a_sharded_teacher_has_its_partner(recipe: Tree, write: Callable[[Tree], Path], teacher_dump: Run) -> None:
    assert teacher_dump("rows", write(recipe)).code == 0
    store = Store.open(Path(recipe["store"]))
    answering = Answering(None, store, None, None, None, None)  # type: ignore[arg-type]
    members = answering._shortest()
    assert len(members) == 2
    assert collate(store, members).interchange is not None
    assert store.rows.at(members).length.min() == store.rows.at(store.rows.rows_of(0)).length.min()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["zero3", "fsdp", "tp"])
def test_a_sharded_teacher_makes_the_store_of_one_rank(
    kind: str, recipe: Tree, write: Callable[[Tree], Path], teacher_dump: Run, tmp_path: Path
) -> None:
    # few shards, of which the ranks have unequally many: one answers dummies meanwhile
    rows = {**recipe["rows"], "slot_tokens": 640}
    features = ["hidden.*@all", "attention_probs.2", "lm_logits@labels"]
    made = write({**recipe, "rows": rows, "features": features, "batch_tokens": 64})
    job = jobs.start(made, 2, tmp_path / "said", [f"store={tmp_path / 'sharded'}", f"sharding.kind={kind}", "sharding.size=2"], replica=2)
    assert job.codes() == [0, 0], job.said()
    assert teacher_dump("run", made, f"store={tmp_path / 'alone'}").code == 0
    stores = [Store.open(tmp_path / name) for name in ("sharded", "alone")]
    infos = [store.manifest.passes["bert"].model_dump(exclude={"made"}) for store in stores]
    assert infos[0] == infos[1]
    assert stores[0].manifest.rows.slots == 3
    every = np.arange(len(stores[0].rows))
    for spec in stores[1].manifest.passes["bert"].features:
        found, expected = (store.read(spec.feature.of("bert"), every)[""] for store in stores)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=spec.key)
