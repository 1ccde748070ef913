"""Teachers that transformers quantises: features, statics and fingerprints are of the weights as they run; sharding them is refused.

On a CPU: torchao's int8 and float8, bitsandbytes' int8 and nf4, which `make quantised` puts beside the environment (skipped elsewhere).
transformers' own fp8 takes a GPU.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from online.models import LoadedModel, ModelSpec, load_model
from online.quantised import Quantised
from online.sharding import Sharding, ShardingError
from online.statics import live_statics
from store.strict import parse
from student_train.recipe import StudentSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "student_train"))
from tiny_answers import llama, write_model

INT8 = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}}
FLOAT8 = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}}}}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed: make quantised")
bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: make quantised")
KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(INT8, id="int8", marks=torchao),
        pytest.param(FLOAT8, id="float8", marks=torchao),
        pytest.param(BNB8, id="bitsandbytes int8", marks=bitsandbytes),
        pytest.param(NF4, id="bitsandbytes nf4", marks=bitsandbytes),
    ],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "teacher", llama(hidden_size=32), 1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a size that all kinds take."""
    return write_model(tmp_path_factory.mktemp("wide") / "teacher", llama(hidden_size=64, intermediate_size=64), 1)


def load(folder: Path, **options: Any) -> LoadedModel:  # noqa: ANN401
    return load_model(parse(ModelSpec, {"model": str(folder), "head": "causal_lm", **options}, "teacher"))


@torchao
def test_statics_are_floats_of_the_weights_as_they_run(folder: Path) -> None:
    quantised, plain = load(folder, quantisation=INT8), load(folder)
    assert isinstance(quantised.weights, Quantised)
    names = [f"1.{part}.weight" for part in ("query", "key", "value", "norm")] + ["head.weight"]
    found, exact = live_statics(quantised, names), live_statics(plain, names)
    for name in names:
        assert found[name].dtype == torch.float32
        assert type(found[name].detach()) in (torch.Tensor, torch.nn.Parameter)
        if "norm" in name or "head" in name:
            assert torch.equal(found[name], exact[name])
            continue
        steps_O1 = exact[name].abs().amax(1, keepdim=True) / 127  # eight bits, symmetric about 0, for each output
        assert ((found[name] - exact[name]).abs() < steps_O1).all(), name
        whole = found[name] / found[name].abs().amax(1, keepdim=True) * 128
        near = [(whole * scale / 128 - (whole * scale / 128).round()).abs().amax(1) < 1e-3 for scale in range(100, 129)]
        assert torch.stack(near).any(0).all(), "whole multiples of one step"


@torchao
def test_a_folder_that_is_quantised_loads_as_it_is_and_has_a_fingerprint_of_its_own(folder: Path, tmp_path: Path) -> None:
    quantised = load(folder, quantisation=INT8)
    quantised.model.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, quantised.model(ids).logits)
        far = (quantised.model(ids).logits - LlamaForCausalLM.from_pretrained(folder)(ids).logits).abs().max()
    assert 0 < far < 0.2
    assert len({load(folder).fingerprint, quantised.fingerprint}) == 2
    with pytest.raises(ValueError, match="weights are quantised already"):
        load(tmp_path / "int8", quantisation=INT8)


@KINDS
def test_answers_and_fingerprint_stay_when_weights_are_read_after_the_model_has_run(kind: dict[str, Any], wide: Path) -> None:
    ids = torch.arange(3, 13)[None]
    first, other = load(wide, quantisation=kind), load(wide, quantisation=kind)
    with torch.no_grad():
        before = first.model(ids).logits
        live_statics(first, ["1.query.weight", "head.weight"])
        fingerprint = first.fingerprint
        assert torch.equal(first.model(ids).logits, before)
        assert (before - load(wide).model(ids).logits).abs().max() > 1e-3
    assert fingerprint == other.fingerprint
    assert len({fingerprint, load(wide).fingerprint}) == 2


@pytest.mark.slow
@KINDS
def test_a_dump_of_a_quantised_teacher_answers_for_it(kind: dict[str, Any], wide: Path, tmp_path: Path) -> None:
    from online.batch import dense
    from online.collate import collate
    from online.models import forward
    from online.teacher import LiveTeacher
    from store.features import FeatureKey
    from store.reader import Store
    from student_train.teacher import StoredTeacher
    from teacher_dump.dump import dump
    from teacher_dump.recipe import DumpRecipe

    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"w1 w2 w3 w{number}"}) for number in range(20)))
    made = {
        "store": str(tmp_path / "store"), "pass_name": "small", "device": "cpu",
        "teacher": {"model": str(wide), "head": "causal_lm", "quantisation": kind},
        "rows": {"sources": [{"files": str(tmp_path / "text.jsonl")}], "objective": "causal", "max_length": 8},
        "features": ["lm_logits@labels", "query.1@all", "value.1@all", "attention_scores.1@all"],
    }  # fmt: skip
    dump(parse(DumpRecipe, made, "recipe"), ["tests"])
    store, rows = Store.open(tmp_path / "store"), np.arange(6)
    keys = frozenset(FeatureKey.parse(key) for key in made["features"])  # type: ignore[union-attr]
    stored, live = StoredTeacher(store, "small", keys), LiveTeacher(load(wide, quantisation=kind), keys)
    batch = collate(store, rows)
    one, other = stored.features(batch, stored.fetch(rows)), live.features(batch, live.fetch(rows))
    for key in keys:
        torch.testing.assert_close(dense(one, key), dense(other, key), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        true = forward(load(wide, quantisation=kind), batch).logits[batch.labelled]
    torch.testing.assert_close(dense(one, FeatureKey.parse("lm_logits@labels")), true, rtol=1e-4, atol=1e-4)


@bitsandbytes
def test_int8_that_looks_at_the_whole_batch_is_warned_of(wide: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(wide, quantisation=BNB8)
    assert "a row's answers depend on the rows beside it" not in caplog.text
    mixed = load(wide, quantisation={**BNB8, "llm_int8_threshold": 6.0})
    assert "a row's answers depend on the rows beside it" in caplog.text
    ids = torch.randint(3, 13, (6, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (mixed.model(ids).logits[:1] - mixed.model(ids[:1]).logits).abs().max() > 1e-3


def test_what_cannot_be_quantised_is_refused(folder: Path) -> None:
    spec = parse(ModelSpec, {"model": str(folder), "head": "causal_lm", "quantisation": INT8}, "teacher")
    with pytest.raises(ShardingError, match="fsdp splits weights as floats, and this teacher's are quantised; expected kind: none"):
        load_model(spec, sharding=Sharding(kind="fsdp", size=2))
    with pytest.raises(ValueError, match="quantisation: transformers cannot read it"):
        load(folder, quantisation={"quant_method": "int7"})
    with pytest.raises(ValueError, match="quantised weights do not train"):
        parse(StudentSpec, {"model": {"model": str(folder), "head": "causal_lm", "quantisation": INT8}}, "student")
