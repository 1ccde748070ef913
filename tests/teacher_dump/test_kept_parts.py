"""Features of a row's first tokens (``leftN``) and of a few neurons (``widthM``): what is stored, what follows, every program on them."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from tiny_dump import Outcome, Tree
from torch import Tensor

from online.collate import collate
from online.models import ModelSpec, load_model
from online.planner import Units, plan
from store import Store
from store.features import FeatureKey, neurons
from store.shape import ModelShape, Wiring
from student_train.teacher import StoredTeacher

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]
KEY = "hidden.1@left6:width5"
TOKENS, CHOSEN = 6, [0, 3, 6, 9, 12]
"""Of 16 neurons, number i * 16 / 5 rounded down."""


def truth(store: Store, teacher: str, layer: int) -> list[Tensor]:
    """[tokens, 16] hidden states of each row, which the model runs on by itself."""
    loaded, found = load_model(ModelSpec(model=Path(teacher), head="masked_lm")), []
    for row in range(len(store.rows)):
        batch = collate(store, np.array([row]))
        with torch.no_grad():
            states = loaded.model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), output_hidden_states=True).hidden_states
        found.append(states[layer][0, : int(batch.lengths[0])])
    return found


def test_neurons_are_spread_evenly() -> None:
    assert neurons(16, 5) == CHOSEN
    assert neurons(768, 77)[-1] == 758
    assert neurons(4, 4) == [0, 1, 2, 3]
    assert all(len(set(neurons(97, kept))) == kept for kept in range(1, 98))
    with pytest.raises(ValueError, match="width5: expected 1 to 4 numbers"):
        neurons(4, 5)


def test_a_dump_holds_these_numbers_alone(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    recipe = write(masked_recipe | {"features": [KEY]})
    planned = teacher_dump("plan", recipe)
    line = next(line.split() for line in planned.out.splitlines() if line.split()[:1] == [KEY])
    assert line[:6] == [KEY, "float32", "120", "B", "a", "row"]
    assert teacher_dump("run", recipe).code == 0
    store = Store.open(Path(masked_recipe["store"]))
    assert [spec.key for spec in store.manifest.passes["bert"].features] == [KEY]
    numbers, array = store.rows.columns, zarr.open_group(store.path, mode="r")["bert/hidden.1/left6.width5"]
    assert array.shape[1] == TOKENS * len(CHOSEN)
    lengths = set()
    for row, states in enumerate(truth(store, masked_recipe["teacher"]["model"], 1)):
        found = array[int(numbers.slot[row]) * store.manifest.rows.slot_tokens + int(numbers.index[row])].reshape(TOKENS, len(CHOSEN))
        real = min(TOKENS, len(states))
        lengths.add(real)
        np.testing.assert_allclose(found[:real], states[:real, CHOSEN], atol=2e-5)
        assert not found[real:].any()
    assert TOKENS in lengths
    assert min(lengths) < TOKENS


def test_what_is_kept_follows_from_all_tokens_and_all_neurons_to_the_bit(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    wanted = frozenset(map(FeatureKey.parse, ("hidden.1@left6:width5", "hidden.1@all:width5", "hidden.1@left3", "hidden.1@first:width2")))
    store = Path(masked_recipe["store"])
    assert teacher_dump("run", write(masked_recipe | {"features": ["hidden.1"]})).code == 0
    assert teacher_dump("run", write(masked_recipe | {"features": sorted(map(str, wanted)), "pass_name": "small"})).code == 0
    stored = {spec.key for spec in Store.open(store).manifest.passes["small"].features}
    assert stored == {"hidden.1@all:width5", "hidden.1@left3", "hidden.1@first:width2"}
    rows = np.arange(20)
    batch = collate(Store.open(store), rows)
    answers = [(teacher := StoredTeacher(store, name, wanted)).features(batch, teacher.fetch(rows)) for name in ("bert", "small")]
    for key in wanted:
        one, other = (answer[key] for answer in answers)
        assert isinstance(one, Tensor)
        assert isinstance(other, Tensor)
        assert torch.equal(one, other), key


def shape(layers: int = 2) -> ModelShape:
    return ModelShape(
        family="bert", head="base", layers=layers, width=384, heads=12, kv_heads=12, head_width=32, vocab=1000, causal=False,
        pre_norm=False, windows=(None,) * layers,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "tokens", "expected"),
    [
        (["hidden.2@left10:width38"], 60, {"hidden.2@left10:width38"}),
        (["hidden.2@left10:width38"], 8, {"hidden.2@all:width38"}),
        (["hidden.2@left10:width38", "hidden.2@all"], 60, {"hidden.2@all"}),
        (["hidden.2@left10:width38", "hidden.2@left10"], 60, {"hidden.2@left10"}),
        (["hidden.1@left10:width38", "attention_scores.2"], 60, {"hidden.1@all"}),
        (["hidden.1@left4", "hidden.2@first:width9"], 60, {"hidden.1@left4", "hidden.2@first:width9"}),
    ],
)
def test_the_plan_stores_the_fewest_bytes(names: list[str], tokens: float, expected: set[str]) -> None:
    wiring = Wiring(attention_scale=(1.0, 1.0))
    found = plan({FeatureKey.parse(name): "float32" for name in names}, shape(), wiring, Units(tokens, 0.0))
    alias = {"input.2@all": "hidden.1@all"}
    assert {alias.get(str(key), str(key)) for key in found.stored} == expected


@pytest.mark.parametrize(
    ("kept", "relative", "of_largest"),
    [
        ({"dtype": "float16"}, 2.0**-11, 0),
        ({"dtype": "bfloat16", "compression": "zstd", "keep_bits": 4}, 2.0**-5, 0),
        ({"dtype": "int8"}, 0, 1 / 253),
        ({"dtype": "float8"}, 2.0**-4, 2.0**-10 / 448),
    ],
)
def test_every_type_keeps_its_bound(
    kept: dict[str, object], relative: float, of_largest: float, masked_recipe: Tree, write: Write, teacher_dump: Run
) -> None:
    assert teacher_dump("run", write(masked_recipe | {"features": [KEY], **kept})).code == 0
    path, key = Path(masked_recipe["store"]), FeatureKey.parse(KEY)
    store = Store.open(path)
    teacher, rows = StoredTeacher(path, "bert", {key}), np.arange(len(store.rows))
    found = teacher.features(collate(store, rows), teacher.fetch(rows))[key]
    assert isinstance(found, Tensor)
    for row, states in enumerate(truth(store, masked_recipe["teacher"]["model"], 1)):
        exact = torch.zeros(TOKENS, len(CHOSEN))
        exact[: len(states)] = states[:TOKENS, CHOSEN]
        assert ((found[row] - exact).abs() <= relative * exact.abs() + of_largest * exact.abs().max() + 2e-5).all()
    assert float((found[0] - truth(store, masked_recipe["teacher"]["model"], 1)[0][:TOKENS, CHOSEN]).abs().max()) > 1e-6, "rounded"


def test_programs_show_verify_copy_and_export_them(masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    store, copied = Path(masked_recipe["store"]), tmp_path / "copied"
    assert teacher_dump("run", write(masked_recipe | {"features": [KEY, "hidden.2@all:width4"]})).code == 0
    assert KEY in teacher_dump("show", store).out
    assert "120 B a row" in teacher_dump("status", store).out.replace("  ", " ")
    assert "is whole" in teacher_dump("verify", store).out
    done = teacher_dump("copy", store, copied, "--dtype", "float16", "--positions", "first")
    assert done.code == 0, done.err
    kept = {spec.key: spec.unit_bytes for spec in Store.open(copied).manifest.passes["bert"].features}
    assert kept == {KEY: 60, "hidden.2@first:width4": 8}
    done = teacher_dump("export", store, tmp_path / "exported", "--format", "parquet")
    assert done.code == 0, done.err
    column = pq.read_table(next((tmp_path / "exported").glob("*.parquet")))[f"bert/{KEY}"]
    assert column.type.list_size == TOKENS * len(CHOSEN)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ("hidden.1@all:width17", "width17: expected 1 to 16 numbers"),
        ("lm_logits@left4", "unknown positions 'left4' of lm_logits"),
        ("lm_logits@labels:width4", "unknown form 'width4' of lm_logits: lm_logits has topK .* hidden vectors have widthM"),
        ("hidden.1@left0", "unknown positions 'left0' of hidden; .*hidden vectors also have leftN, such as left10"),
        ("attention_scores.1@left4", "unknown positions 'left4' of attention_scores"),
    ],
)
def test_what_cannot_be_kept_is_refused(feature: str, message: str, masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    done = teacher_dump("plan", write(masked_recipe | {"features": [feature]}))
    assert done.code == 2
    assert re.search(message, done.err), done.err
