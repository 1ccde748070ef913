"""Exports say what the store holds, to readers that know nothing of it; a killed one goes on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from foreign import VOCAB, bring_in
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from small_store import GROUPS, SPECS, Made, make_store, spec
from step_kills import killed_at_random

from store import FeatureKey, MissingFeature, Store, StoreBusy, StoreError, StoreWriter, feature_spec
from store.commits import replay
from store.exports import FORMATS, Format, export
from store.exports.folder import open_folder
from store.imports import HiddenStates, natural

HERE = Path(__file__).parent


def numbers(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """What stored values are, through torch."""
    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float().numpy()
    return values.astype(np.float32) if values.dtype == np.float16 else values


@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
def test_every_value_is_there(kind: Format, made: Made, tmp_path: Path) -> None:
    done = export(made.path, tmp_path / "out", kind)
    assert done.rows == len(made.rows)
    found = {"parquet": from_parquet, "safetensors": from_tensors}[kind](tmp_path / "out")
    assert sorted(found) == list(range(len(made.rows)))
    for number, row in enumerate(made.rows):
        assert found[number]["input_ids"].tolist() == row.input_ids.tolist()
        for feature in SPECS:
            for array in feature.arrays:
                name = f"bert/{feature.key}/{array.name}" if array.name else f"bert/{feature.key}"
                expected = numbers(made.values[feature.key, array.name][number], array.dtype)
                np.testing.assert_array_equal(found[number][name], expected.reshape(found[number][name].shape), err_msg=name)


def from_parquet(folder: Path) -> dict[int, dict[str, NDArray[Any]]]:
    """Row -> column -> its values, read by pyarrow as one table."""
    return {row.pop("row"): {name: np.array(value) for name, value in row.items()} for row in pq.read_table(folder).to_pylist()}


def from_tensors(folder: Path) -> dict[int, dict[str, NDArray[Any]]]:
    """The same from safetensors, read by their own library."""
    found: dict[int, dict[str, NDArray[Any]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            specs = json.loads(file.metadata()["features"])
        for place, row in enumerate(tensors["row"].tolist()):
            tokens = slice(*tensors["token_offsets"][place : place + 2].tolist())
            labels = slice(*tensors["label_offsets"][place : place + 2].tolist())
            found[row] = {"input_ids": tensors["tokens/input_ids"][tokens].numpy()}
            for key in specs:
                at = FeatureKey.parse(key).positions
                units = {"all": tokens, "labels": labels, "masked": labels}.get(at, slice(place, place + 1))
                for name in tensors:
                    if name == key or name.startswith(f"{key}/"):
                        values = tensors[name][units]
                        found[row][name] = (values.float() if values.is_floating_point() else values.to(torch.int64)).numpy()
    return found


def test_types_and_metadata_survive(made: Made, tmp_path: Path) -> None:
    export(made.path, tmp_path / "parquet", "parquet")
    export(made.path, tmp_path / "tensors", "safetensors")
    schema = pyarrow.dataset.dataset(tmp_path / "parquet").schema
    column = schema.field("bert/hidden.1@all")
    assert str(column.type) == "list<element: fixed_size_list<element: float>[8]>"
    assert json.loads(column.metadata[b"stored"]) == {"": "bfloat16"}
    assert str(schema.field("bert/final@first").type) == "fixed_size_list<element: float>[8]"
    about = json.loads(schema.metadata[b"teachercache"])
    assert about["passes"]["bert"]["shape"] == Store.open(made.path).manifest.passes["bert"].shape.model_dump(mode="json")
    tensors = load_file(next(iter(sorted((tmp_path / "tensors").glob("*.safetensors")))))
    assert tensors["bert/hidden.1@all"].dtype == torch.bfloat16
    assert tensors["bert/lm_logits@masked:top3/ids"].dtype == torch.uint16
    assert tensors["bert/lm_logits@masked:top3/log_probs"].dtype == torch.float16


def test_some_features_of_some_rows(made: Made, tmp_path: Path) -> None:
    dev = [number for number, row in enumerate(made.rows) if row.split == "dev"]
    export(made.path, tmp_path / "dev", "parquet", features=["final@first"], split="dev")
    table = pq.read_table(tmp_path / "dev")
    assert table["row"].to_pylist() == dev
    assert [name for name in table.column_names if "/" in name] == ["bert/final@first"]
    export(made.path, tmp_path / "rows", "safetensors", passes=["bert"], first=2, after=5)
    assert sorted(from_tensors(tmp_path / "rows")) == [2, 3, 4]
    labels = {row["row"]: row["label"] for row in table.to_pylist()}
    assert labels == {number: made.rows[number].label for number in dev}


def test_int8_and_float8_are_numbers_in_parquet_and_bits_in_safetensors(tmp_path: Path) -> None:
    specs = (feature_spec(FeatureKey("hidden", 1), "int8", 8), feature_spec(FeatureKey("hidden", 0), "float8", 8))
    made = make_store(tmp_path / "store", GROUPS[:2], specs)
    for kind in ("parquet", "safetensors"):
        export(made.path, tmp_path / kind, kind)
    ((_, first), *_) = sorted(from_parquet(tmp_path / "parquet").items())
    values, scale = (made.values["hidden.1@all", name][0] for name in ("values", "scale"))
    np.testing.assert_array_equal(first["bert/hidden.1@all"], values.astype(np.float32) * scale)
    (path,) = (tmp_path / "safetensors").glob("*.safetensors")
    tensors = load_file(path)
    assert tensors["bert/hidden.1@all/values"].dtype == torch.int8
    assert tensors["bert/hidden.0@all/values"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_hidden_states_go_out_and_come_back(dtype: str, tmp_path: Path) -> None:
    specs = (spec("hidden.0@all", dtype), spec("hidden.1@all", dtype), spec("final@all", dtype), spec("final@first", "float32"))
    made = make_store(tmp_path / "store", GROUPS, specs)
    names = ["hidden.0", "hidden.1", "final"]
    done = export(made.path, tmp_path / "out", "hidden-states", features=names)
    assert done.features == ("bert/hidden.0@all", "bert/hidden.1@all", "bert/final@all")
    for number, row in enumerate(made.rows):
        sample = load_file(tmp_path / "out" / f"hs_{number}.safetensors")
        assert sorted(sample) == ["hidden_states", "token_ids"]
        assert sample["token_ids"].dtype == torch.int64
        assert sample["token_ids"].tolist() == row.input_ids.tolist()
        assert sample["hidden_states"].dtype == getattr(torch, dtype)
        assert sample["hidden_states"].shape == (len(row.input_ids), 3, 8)
    files = sorted((tmp_path / "out").glob("*.safetensors"), key=natural)
    keys = [FeatureKey.parse(name) for name in names]
    vocab = 1 + max(int(row.input_ids.max()) for row in made.rows)
    source = HiddenStates(files, keys, max(vocab, VOCAB), None)
    bring_in(source, tmp_path / "back", width=8)
    back = Store.open(tmp_path / "back")
    for number, row in enumerate(made.rows):
        one = np.array([number])
        assert back.tokens("input_ids", one).tolist() == row.input_ids.tolist()
        for key in keys:
            assert back.read(key.of("teacher"), one)[""].tobytes() == made.values[str(key), ""][number].tobytes()
    export(tmp_path / "back", tmp_path / "again", "hidden-states", features=names)
    for path in files:
        first, second = load_file(path), load_file(tmp_path / "again" / path.name)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_hidden_states_without_names_are_all_layers_in_order(tmp_path: Path) -> None:
    specs = tuple(spec(f"hidden.{layer}@all", "float16") for layer in (1, 0))
    made = make_store(tmp_path / "store", GROUPS[:2], specs)
    done = export(made.path, tmp_path / "out", "hidden-states")
    assert done.features == ("bert/hidden.0@all", "bert/hidden.1@all")
    first = load_file(tmp_path / "out" / "hs_0.safetensors")["hidden_states"]
    for layer in range(2):
        np.testing.assert_array_equal(first[:, layer].numpy(), made.values[f"hidden.{layer}@all", ""][0])


def test_a_finished_export_is_left_alone_and_another_is_refused(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(made.path, out, "parquet").new_files > 1
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert export(made.path, out, "parquet").new_files == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(StoreError, match="holds a finished export with another format"):
        export(made.path, out, "safetensors")
    with pytest.raises(StoreError, match="another split"):
        export(made.path, out, "parquet", split="dev")
    with StoreWriter.open(made.path) as writer:
        info = writer.manifest.passes["bert"]
        writer.add_pass("other", info.model_copy(update={"features": (spec("final@first", "float32"),)}), {})
    with pytest.raises(MissingFeature, match="pass other lacks"):
        export(made.path, tmp_path / "all", "parquet")
    assert not (tmp_path / "all").exists()
    with pytest.raises(ValueError, match="expected the pass before the feature"):
        export(made.path, tmp_path / "all", "parquet", features=["final@first"])
    assert export(made.path, out, "parquet", passes=["bert"]).new_files == 0


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "pass": ({"passes": ["brt"]}, "has no pass 'brt'; did you mean 'bert'"),
    "split": ({"split": "deve"}, "did you mean 'dev'"),
    "rows": ({"first": 100}, "has rows 0 to"),
    "no rows": ({"first": 5, "after": 5}, "has rows 0 to"),
    "none of the split": ({"split": "dev", "first": 0, "after": 1}, "no row of split 'dev' is among rows 0 to 0"),
    "feature": ({"features": ["hidden.7@all"]}, "has no bert/hidden.7@all; it holds"),
    "name": ({"features": ["hiden.7@all"]}, "did you mean 'hidden'"),
    "hidden states": ({"kind": "hidden-states", "features": ["final@first"]}, "expected hidden states of all tokens"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_exported_is_said_before_a_folder_is_made(what: str, made: Made, tmp_path: Path) -> None:
    options, message = REFUSALS[what]
    with pytest.raises((ValueError, StoreError)) as caught:
        export(made.path, tmp_path / "out", **{"kind": "parquet", **options})
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_not_touched(made: Made, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"holds thesis\.tex; nothing was touched"):
        export(made.path, tmp_path / "out", "parquet")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="found a file"):
        export(made.path, tmp_path / "file", "parquet")
    with open_folder(tmp_path / "busy", {"format": "parquet"}), pytest.raises(StoreBusy):
        export(made.path, tmp_path / "busy", "parquet")


def test_a_damaged_shard_ends_the_export_without_a_file_for_it(made: Made, tmp_path: Path) -> None:
    commit = replay(made.path)["bert"][2]
    path = made.path / "bert" / next(iter(commit.files)) / "c.2.0"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    for kind in FORMATS:
        with pytest.raises(StoreError, match="verify"):
            export(made.path, tmp_path / kind, kind)
        assert not any("000002" in file.name and file.name[0] != "." for file in (tmp_path / kind).iterdir())
        assert not (tmp_path / kind / "_export.json").exists()


EXPORT = """
import sys
from pathlib import Path
from store.exports import export
print("ready", flush=True)
export(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "hidden-states"])
def test_a_killed_export_goes_on_and_ends_in_the_same_files(kind: Format, tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", [[(60, 3)]] * 30)
    export(made.path, tmp_path / "whole", kind)
    killed_at_random([sys.executable, "-c", EXPORT, made.path, tmp_path / "out", kind], kills=3, within=0.2, seed=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_long_slots_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_store(tmp_path / "store", [[(100, 9)]] * 12, slot_tokens=1280)
    export(made.path, tmp_path / "whole", "parquet")
    monkeypatch.setattr("store.exports.selection.TOKENS_AT_ONCE", 250)
    for kind, read in READERS.items():
        export(made.path, tmp_path / kind, kind)
        found = read(tmp_path / kind)
        assert len(found) == 12
        for number in range(12):
            values = made.values["hidden.1@all", ""][number]
            np.testing.assert_array_equal(found[number]["bert/hidden.1@all"], numbers(values, "bfloat16"))
    assert pq.ParquetFile(tmp_path / "parquet" / "slot-000000.parquet").num_row_groups > 3


READERS: dict[Format, Callable[[Path], dict[int, dict[str, NDArray[Any]]]]] = {"parquet": from_parquet, "safetensors": from_tensors}
