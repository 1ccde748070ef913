"""Plain Zarr software reads a store without our code."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from small_store import GROUPS, SPECS, Made, answers, make_rows, pass_info, spec, units

from store import FeatureKey, FeatureSpec, Store, StoreWriter, decode, encode, feature_spec, layout

ROOT = Path(__file__).parents[2]


def expected(made: Made, name: str, specs: tuple[FeatureSpec, ...] = SPECS) -> np.ndarray:
    """The array ``name`` below the pass as a whole, NaN (or 0 for ids) where nothing is stored."""
    store = Store.open(made.path)
    info = store.manifest.rows
    for feature in specs:
        for array in feature.arrays:
            if layout.array_name(feature.feature, array.name) != name:
                continue
            values = made.values[feature.key, array.name]
            fill = {"bfloat16": 0x7FC0, "float8_e4m3fn": 0x7F}.get(array.dtype, 0 if values[0].dtype.kind in "iu" else np.nan)
            whole = np.full((info.slots * info.slot_tokens, array.width), fill, values[0].dtype)
            start, _ = store.rows.columns.units(feature.feature.positions)
            for row, value in enumerate(values):
                first = store.rows.columns.slot[row] * info.slot_tokens + start[row]
                whole[first : first + len(value)] = value
            return whole
    raise KeyError(name)


NAMES = [layout.array_name(feature.feature, array.name) for feature in SPECS for array in feature.arrays]


def with_tensorstore(path: Path) -> np.ndarray:
    tensorstore = pytest.importorskip("tensorstore")
    return tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}, open=True).result().read().result()


def with_zarr(path: Path) -> np.ndarray:
    return np.asarray(zarr.open_array(str(path), mode="r")[:])


def with_zarrs(path: Path) -> np.ndarray:
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return with_zarr(path)


Read = Callable[[Path], np.ndarray]


@pytest.mark.parametrize("read", [with_zarr, with_zarrs, with_tensorstore])
def test_three_readers_give_the_same_values_and_nan_for_what_is_missing(made: Made, read: Read) -> None:
    for name in NAMES:
        np.testing.assert_array_equal(read(made.path / "bert" / name), expected(made, name))
    ids = read(made.path / "tokens" / "input_ids")
    assert ids[:30].tolist() == made.rows[0].input_ids.tolist()
    np.testing.assert_array_equal(read(made.path / "static" / "bert" / "1.query.weight"), np.arange(64.0).reshape(8, 8))


CODED = (
    spec("hidden.0@all", "int8", 24),
    spec("hidden.1@all", "float8", 24),
    spec("query.1@all", "int8", 24, compression="zstd"),
    spec("key.1@all", "float8", 24, compression="zstd"),
    spec("value.1@first", "float16", 24, compression="zstd"),
    feature_spec(FeatureKey("final"), "bfloat16", 24, keep_bits=3, compression="zstd"),
    feature_spec(FeatureKey("input", 1), "float32", 24, keep_bits=8, compression="zstd"),
    spec("lm_logits@masked:top5", "float16", 50, compression="zstd"),
    spec("lm_logits@labels:select", "bfloat16", 50, (1, 7), compression="zstd"),
)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store with what every codec makes of numbers."""
    made = make_rows(tmp_path_factory.mktemp("coded") / "store", GROUPS)
    with StoreWriter.open(made.path) as writer:
        writer.add_pass("bert", pass_info(CODED), {})
        for shard in writer.pending("bert"):
            stored = {}
            for number, feature in enumerate(CODED):
                lengths = [units(made.rows[row], feature.feature.positions) for row in writer.rows.rows_of(shard)]
                rng = np.random.default_rng([shard, number])
                values = rng.normal(size=(sum(lengths), 50 if feature.feature.form else 24)).astype(np.float32)
                stored[feature.feature] = encode(feature, values, rng.integers(0, 50, len(values)))
                for name, array in stored[feature.feature].items():
                    made.values.setdefault((feature.key, name), []).extend(np.split(array, np.cumsum(lengths)[:-1]))
            writer.commit("bert", shard, stored)
    return made


@pytest.mark.parametrize("read", [with_zarr, with_zarrs, with_tensorstore])
def test_three_readers_give_the_same_values_of_every_codec_and_of_compressed_arrays(coded: Made, read: Read) -> None:
    for feature in CODED:
        for array in feature.arrays:
            name = layout.array_name(feature.feature, array.name)
            np.testing.assert_array_equal(read(coded.path / "bert" / name), expected(coded, name, CODED), err_msg=name)


def test_attributes_say_what_zarr_has_no_type_for(coded: Made) -> None:
    group = zarr.open_group(str(coded.path), mode="r")
    values, scale = group["bert/hidden.1/all/values"], group["bert/hidden.1/all/scale"]
    assert (values.dtype, values.attrs["true_dtype"], scale.dtype) == ("uint8", "float8_e4m3fn", "float32")
    assert (group["bert/hidden.0/all/values"].dtype, group["bert/hidden.0/all/values"].attrs["true_dtype"]) == ("int8", "int8")
    rounded = group["bert/final/all"]
    assert (rounded.attrs["true_dtype"], rounded.attrs["keep_bits"]) == ("bfloat16", 3)
    assert "keep_bits" not in group["bert/value.1/first"].attrs


def test_numbers_with_a_scale_are_decoded_from_what_zarr_reads(coded: Made) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    store, row = Store.open(coded.path), 5
    start = int(store.rows.columns.slot[row] * 128 + store.rows.columns.offset[row])
    place = slice(start, start + len(coded.rows[row].input_ids))
    for name, view in (
        ("hidden.0", "int8"),
        ("query.1", "int8"),
        ("hidden.1", ml_dtypes.float8_e4m3fn),
        ("key.1", ml_dtypes.float8_e4m3fn),
    ):
        group = zarr.open_group(str(coded.path), mode="r")[f"bert/{name}/all"]
        numbers = group["values"][place].view(view).astype(np.float32) * group["scale"][place]
        key = FeatureKey.parse(f"bert/{name}@all")
        np.testing.assert_array_equal(decode(store.spec(key), store.read(key, np.array([row])))[""], numbers)
        assert np.isnan(group["values"][130:256].view(view).astype(np.float32) * group["scale"][130:256]).any()


@pytest.mark.parametrize("read", [with_zarr, with_zarrs, with_tensorstore])
def test_a_shard_that_is_not_there_reads_as_nan(tmp_path: Path, read: Read) -> None:
    made = make_rows(tmp_path / "store", GROUPS)
    with StoreWriter.open(made.path) as writer:
        writer.add_pass("bert", pass_info(), {})
        writer.commit("bert", 1, answers(made, 1, SPECS, writer.rows.columns.slot))
    final = read(made.path / "bert" / "final" / "first")
    assert not np.isnan(final[128]).any()
    assert np.isnan(np.delete(final, 128, axis=0)).all()
    bits = read(made.path / "bert" / "hidden.1" / "all")
    assert (bits[:128] == 0x7FC0).all()


def test_the_whole_store_opens_as_a_zarr_group(made: Made) -> None:
    group = zarr.open_group(str(made.path), mode="r")
    arrays = {path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    rows, tokens = ("numbers", "label"), ("input_ids", "segments", "token_labels")
    statics = {"static/bert/1.query.weight", "static/bert/1.query.bias"}
    assert arrays == statics | {f"bert/{name}" for name in NAMES} | {f"rows/{name}" for name in rows} | {
        f"tokens/{name}" for name in tokens
    }
    hidden = group["bert/hidden.1/all"]
    assert hidden.attrs["true_dtype"] == "bfloat16"
    assert hidden.attrs["key"] == "bert/hidden.1@all"
    assert sorted(zarr.open_group(str(made.path / "bert"), mode="r").group_keys()) == ["final", "hidden.1", "lm_logits"]


def test_the_example_in_the_format_page_runs(made: Made) -> None:
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.S)[0]
    assert code.count("\n") <= 12
    script = code.replace("/data/store", str(made.path)) + "\nprint(hidden.dtype, hidden.shape, hidden.tobytes().hex())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=made.path.parent, check=False)
    assert run.returncode == 0, run.stderr
    stored = made.values["hidden.1@all", ""][3].astype(np.uint32)
    floats = (stored << 16).view(np.float32)
    assert run.stdout.split("\n")[-2] == f"float32 {floats.shape} {floats.tobytes().hex()}"
