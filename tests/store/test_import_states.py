"""Dumps of hidden states become a store: the stored bits, or a refusal that names the file; pickles are never read."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign import (
    VOCAB,
    bring_in,
    sentences,
)

from store import FeatureKey, Store, StoreError
from store.exports import export
from store.imports import HiddenStates, natural
from store.tensors import Tensor, TensorFile, write_tensors


def write_states(path: Path, ids: list[int], layers: int, width: int, dtype: str = "BF16", **more: Tensor) -> np.ndarray:
    """A file of speculators; the bits of its hidden states."""
    held = {"BF16": np.uint16, "F32": np.float32, "F16": np.float16}[dtype]
    numbers = np.random.default_rng(len(ids)).standard_normal((len(ids), layers, width)).astype(np.float32)
    states = (numbers.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else numbers.astype(held)
    write_tensors(path, {"hidden_states": Tensor.of(dtype, states), "token_ids": Tensor.of("I64", np.array(ids)), **more}, {})
    return states


KEYS = [FeatureKey("hidden", 2), FeatureKey("hidden", 5), FeatureKey("hidden", 8)]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_hidden_states_of_speculators_are_kept_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    texts = sentences(12)
    states = [write_states(tmp_path / f"hs_{number}.safetensors", ids, 3, 6, dtype) for number, ids in enumerate(texts)]
    files = sorted(tmp_path.glob("*.safetensors"), key=natural)
    source = HiddenStates(files, KEYS, VOCAB, None)
    bring_in(source, tmp_path / "store", width=source.width)
    store = Store.open(tmp_path / "store")
    shape = store.manifest.passes["teacher"].shape
    assert (shape.layers, shape.width) == (8, 6)
    for row, (ids, bits) in enumerate(zip(texts, states, strict=True)):
        one = np.array([row])
        assert store.tokens("input_ids", one).tolist() == ids
        assert store.rows.about(row)["record"] == row
        for layer, key in enumerate(KEYS):
            np.testing.assert_array_equal(store.read(key.of("teacher"), one)[""], bits[:, layer])
    assert store.rows.columns.labelled.tolist() == [len(ids) - 1 for ids in texts]
    export(tmp_path / "store", tmp_path / "out", "hidden-states")
    for row, (ids, bits) in enumerate(zip(texts, states, strict=True)):
        file = TensorFile(tmp_path / "out" / f"hs_{row}.safetensors")
        assert file.dtype("hidden_states") == dtype
        np.testing.assert_array_equal(file.read("hidden_states"), bits)
        assert file.read("token_ids").tolist() == ids


def test_states_in_eight_bits_are_multiplied_by_their_scale(tmp_path: Path) -> None:
    codes = np.arange(4 * 2 * 8, dtype=np.uint8).reshape(4, 2, 8)
    scales = np.array([0.5, 1.0, 2.0, 0.25], np.float32).reshape(4, 1, 1)
    tensors = {
        "hidden_states": Tensor.of("F8_E4M3", codes),
        "hidden_states_scales": Tensor.of("F32", scales),
        "token_ids": Tensor.of("I64", np.arange(4)),
    }
    write_tensors(tmp_path / "hs_0.safetensors", tensors, {})
    source = HiddenStates([tmp_path / "hs_0.safetensors"], KEYS[:2], VOCAB, "float32")
    bring_in(source, tmp_path / "store", width=8)
    store = Store.open(tmp_path / "store")

    def number(code: int) -> float:
        exponent, mantissa = code >> 3, code & 7
        return mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)

    for layer in range(2):
        expected = [[number(int(code)) * float(scales[t, 0, 0]) for code in codes[t, layer]] for t in range(4)]
        np.testing.assert_array_equal(store.read(KEYS[layer].of("teacher"), np.array([0]))[""], np.array(expected, np.float32))
    assert HiddenStates([tmp_path / "hs_0.safetensors"], KEYS[:2], VOCAB, None).features[0].arrays[0].dtype == "bfloat16"
    del tensors["hidden_states_scales"]
    write_tensors(tmp_path / "hs_1.safetensors", tensors, {})
    with pytest.raises(ValueError, match=r"hs_1\.safetensors: numbers of eight bits need hidden_states_scales"):
        HiddenStates([tmp_path / "hs_1.safetensors"], KEYS[:2], VOCAB, None)


def test_converted_files_of_specforge_name_their_last_layer_apart_and_say_what_is_scored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    aux, last = rng.standard_normal((1, 5, 12)).astype(np.float32), rng.standard_normal((1, 5, 4)).astype(np.float32)
    tensors = {
        "input_ids": Tensor.of("I64", np.array([10, 11, 12, 13, 14])),
        "loss_mask": Tensor.of("I64", np.array([0, 0, 1, 1, 0])),
        "aux_hidden_state": Tensor.of("F32", aux),
        "hidden_state": Tensor.of("F32", last),
    }
    write_tensors(tmp_path / "data_7.safetensors", tensors, {})
    keys = [*KEYS, FeatureKey("final")]
    source = HiddenStates([tmp_path / "data_7.safetensors"], keys, VOCAB, None)
    bring_in(source, tmp_path / "store", width=4)
    store, one = Store.open(tmp_path / "store"), np.array([0])
    for layer, key in enumerate(KEYS):
        np.testing.assert_array_equal(store.read(key.of("teacher"), one)[""], aux[0, :, 4 * layer : 4 * layer + 4])
    np.testing.assert_array_equal(store.read(keys[3].of("teacher"), one)[""], last[0])
    assert store.tokens("token_labels", one).tolist() == [-100, 12, 13, -100, -100]
    assert store.rows.columns.labelled.tolist() == [2]
    assert store.rows.about(0)["record"] == 7
    with pytest.raises(ValueError, match=r"3 features are named; expected 2 layers in aux_hidden_state"):
        HiddenStates([tmp_path / "data_7.safetensors"], KEYS, VOCAB, None)


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "data_0.ckpt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"data_0\.ckpt is a pickle.*\n.*weights_only=True") as caught:
        HiddenStates([tmp_path / "data_0.ckpt"], KEYS, VOCAB, None)
    assert "'*.ckpt'" in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_files_of_hidden_states_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    good = tmp_path / "hs_0.safetensors"
    write_states(good, [1, 2, 3], 3, 6)
    nan = np.full((3, 3, 6), 0x7FC0, np.uint16)
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "layers": ({"hidden_states": Tensor.of("BF16", nan[:, :2])}, "3 features are named"),
        "width": ({"hidden_states": Tensor.of("BF16", nan[:, :, :5])}, "6 wide, found [3, 5]"),
        "tokens": ({"hidden_states": Tensor.of("BF16", nan[:2])}, "3 tokens, 6 wide, found [2, 6]"),
        "type": ({"hidden_states": Tensor.of("I32", nan.astype(np.int32))}, "in one type of"),
        "finite": ({"hidden_states": Tensor.of("BF16", nan)}, "hidden.2@all is not finite"),
        "ids": ({"token_ids": Tensor.of("I64", np.array([1, 2, 40]))}, "expected token ids 0 to 39, found 1 to 40"),
        "id type": ({"token_ids": Tensor.of("F32", np.ones(3, np.float32))}, "in whole numbers"),
        "mask": ({"loss_mask": Tensor.of("I64", np.ones(3, np.int64))}, "loss_mask in all files or in none"),
    }
    for name, (tensors, message) in cases.items():
        path = tmp_path / f"{name}_1.safetensors"
        write_states(path, [1, 2, 3], 3, 6, **tensors)
        with pytest.raises(ValueError, match=rf"{name}_1\.safetensors") as caught:
            bring_in(HiddenStates([good, path], KEYS, VOCAB, None), tmp_path / f"store-{name}", width=6)
        assert message in str(caught.value), name
    with pytest.raises(ValueError, match="expected the feature of each layer"):
        HiddenStates([good], [], VOCAB, None)
    with pytest.raises(ValueError, match="expected hidden states of all tokens"):
        HiddenStates([good], [FeatureKey("lm_logits")], VOCAB, None)


def damaged_headers(good: bytes) -> dict[str, bytes]:
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])

    def changed(**about: object) -> bytes:
        tree = {**header, "token_ids": {**header["token_ids"], **about}}
        text = json.dumps(tree).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + length :]

    start, stop = header["token_ids"]["data_offsets"]
    return {
        "empty": b"",
        "short": good[:5],
        "huge header": (1 << 60).to_bytes(8, "little") + good[8:],
        "no JSON": good[:8] + b"x" * length + good[8 + length :],
        "a list": (2).to_bytes(8, "little") + b"[]",
        "cut": good[:-1],
        "more": good + b"\0",
        "absurd": changed(shape=[1 << 47, 1 << 47]),
        "negative": changed(shape=[-3]),
        "outside": changed(data_offsets=[start + (1 << 40), stop + (1 << 40)]),
        "overlap": changed(data_offsets=[start + 2, stop + 2]),
        "before": changed(data_offsets=[start - 4096, stop - 4096]),
        "type": changed(dtype="C64"),
        "shape": changed(shape="3"),
        "number": changed(shape=[True, True, 3]),
    }


def test_damaged_safetensors_files_are_refused(tmp_path: Path) -> None:
    write_states(tmp_path / "good.safetensors", [1, 2, 3], 1, 6)
    for name, data in damaged_headers((tmp_path / "good.safetensors").read_bytes()).items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(StoreError, match=rf"{name}\.safetensors"):
            TensorFile(path)
