"""What is no store, or not this one, is refused with a sentence, and left as it was."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_store import GROUPS, SPECS, Made, answers, make_rows, pass_info, spec

from store import FeatureKey, FingerprintMismatch, RowWriter, Store, StoreError, StoreWriter
from store.publish import crc32c


def snapshot(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("file", "said"), [("notes.txt", "something else"), ("__init__.py", "a Python package")])
def test_a_folder_that_holds_something_else_is_never_touched(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "part-00000.parquet").write_text("mine")
    (tmp_path / file).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(StoreError, match=f"holds {said}; nothing was touched"):
        RowWriter(tmp_path, 128)
    with pytest.raises(StoreError, match=r"expected a store at .*, found something else"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match=r"expected a store at .*, found something else"):
        StoreWriter.open(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_file_or_nothing_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="found a file"):
        RowWriter(tmp_path / "file", 128)
    with pytest.raises(StoreError, match="found something else"):
        Store.open(tmp_path / "file")
    with pytest.raises(StoreError, match="found nothing; make one with teacher-dump"):
        Store.open(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_finished_store_is_not_built_over(made: Made) -> None:
    before = snapshot(made.path)
    with pytest.raises(StoreError, match="already holds a finished store"):
        RowWriter(made.path, 128)
    assert snapshot(made.path) == before


def test_an_unfinished_build_clears_only_its_own_files(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with RowWriter(path, 128) as writer:
        for row in make_rows(tmp_path / "other", GROUPS).rows:
            writer.append_group([row])
    with pytest.raises(StoreError, match=r"the rows of .* are unfinished; start its dump again"):
        Store.open(path)
    assert (path / "tokens" / "input_ids" / "c.0").exists()
    (path / "tokens" / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"mine.txt, which is not part of it; move that away"):
        RowWriter(path, 128)
    assert (path / "tokens" / "mine.txt").read_text() == "mine"
    (path / "tokens" / "mine.txt").unlink()
    make_rows(path, GROUPS[:2])
    assert len(Store.open(path).rows) == 3


def edit(made: Made, change: Callable[[dict], None]) -> None:
    """Change the manifest and give it a right checksum, as one who means harm would."""
    file = made.path / "manifest.json"
    tree = json.loads(file.read_text())
    del tree["crc32c"]
    change(tree)
    body = json.dumps(tree, indent=1).encode().removesuffix(b"\n}") + b",\n"
    file.write_bytes(body + b' "crc32c": %d\n}\n' % crc32c(body))


def set_key(key: str) -> Callable[[dict], None]:
    return lambda tree: tree["passes"]["bert"]["features"][0].update(key=key)


def rename_pass(name: str) -> Callable[[dict], None]:
    return lambda tree: tree["passes"].update({name: tree["passes"].pop("bert")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_pass("../../etc"), "expected a pass name"),
        (rename_pass(".."), "expected a pass name"),
        (rename_pass("tokens"), "expected a pass name"),
        (rename_pass(""), "expected a pass name"),
        (set_key("../hidden.1@all"), "expected a feature"),
        (set_key("/etc/passwd"), "expected a feature"),
        (set_key("nonsense@all"), "unknown feature"),
        (set_key("other/hidden.1@all"), "expected a key without a pass"),
        (set_key("final@first"), "twice"),
        (lambda tree: tree["passes"]["bert"]["features"][0]["arrays"][0].update(name="../up"), "has no arrays"),
        (lambda tree: tree["passes"]["bert"]["features"][0]["arrays"][0].update(width=0), "greater than or equal to 1"),
        (lambda tree: tree["passes"]["bert"]["features"][0]["arrays"][0].update(dtype="object"), "dtype"),
        (lambda tree: tree["passes"]["bert"]["features"][0].update(codec="pickle"), "codec"),
        (lambda tree: tree["passes"]["bert"]["statics"][0].update(name="../../x"), "expected a name"),
        (lambda tree: tree["passes"]["bert"]["statics"][0].update(shape=[-8]), "shape"),
        (lambda tree: tree["rows"]["token_arrays"][0].update(name="/etc/passwd"), "expected a name"),
        (lambda tree: tree["rows"].update(slots=-1), "greater than or equal to 1"),
        (lambda tree: tree["rows"].update(slots=10**9), "contradict"),
        (lambda tree: tree["rows"].update(slot_tokens=100), "slot_tokens"),
        (lambda tree: tree["rows"].update(rows=10**6), "contradict"),
        (lambda tree: tree["rows"].pop("tokenizer"), "tokenizer: required"),
        (lambda tree: tree.update(extra=1), "unknown key 'extra'"),
    ],
)
def test_a_hostile_manifest_is_refused_when_the_store_is_opened(made: Made, change: Callable[[dict], None], message: str) -> None:
    edit(made, change)
    for opening in (Store.open, StoreWriter.open):
        with pytest.raises(StoreError, match=re.escape(message)):
            opening(made.path)


def test_larger_numbers_than_the_files_hold_are_noticed(made: Made) -> None:
    edit(made, lambda tree: tree["passes"]["bert"]["features"][0]["arrays"][0].update(width=9))
    with pytest.raises(StoreError, match=r"expected .* bytes, found"):
        Store.open(made.path).read(SPECS[0].feature.of("bert"), np.array([0]))
    edit(made, lambda tree: tree["rows"].update(slot_tokens=256))
    with pytest.raises(StoreError, match=r"expected .* bytes, found"):
        Store.open(made.path).tokens("input_ids", np.array([0]))


def test_another_schema_is_refused(made: Made) -> None:
    edit(made, lambda tree: tree.update(schema_version=7))
    with pytest.raises(StoreError, match="expected schema version 1 to 6, found 7"):
        Store.open(made.path)
    (made.path / "manifest.json").write_text("[]")
    with pytest.raises(StoreError, match="expected schema version 1 to 6, found none"):
        Store.open(made.path)
    (made.path / "manifest.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(StoreError, match="damaged"):
        Store.open(made.path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "tokens", "static", "rows", "a b", "-x"])
def test_a_pass_cannot_have_a_name_that_is_not_one_folder_of_its_own(made: Made, name: str) -> None:
    with StoreWriter.open(made.path) as writer, pytest.raises(ValueError, match="expected a pass name"):
        writer.add_pass(name, pass_info(), {})


def test_a_static_cannot_lie_outside_the_store(made: Made) -> None:
    with StoreWriter.open(made.path) as writer, pytest.raises(StoreError, match="expected a name"):
        writer.add_pass("other", pass_info(), {"../../weight": np.zeros(3, np.float32)})
    assert "other" not in Store.open(made.path).manifest.passes


def test_a_pass_of_another_teacher_is_refused_by_the_field_that_differs(made: Made) -> None:
    known = Store.open(made.path).manifest.passes["bert"]
    statics = {"1.query.weight": np.arange(64, dtype=np.float32).reshape(8, 8), "1.query.bias": np.arange(8, dtype=np.uint16)}
    with StoreWriter.open(made.path) as writer:
        for change, field in [({"teacher": "xyz"}, "teacher"), ({"features": SPECS[:2]}, "features"), ({"dtype": "bfloat16"}, "dtype")]:
            with pytest.raises(FingerprintMismatch, match=f"pass bert of .* has another {field}: expected"):
                writer.add_pass("bert", known.model_copy(update=change), statics)
        with pytest.raises(FingerprintMismatch, match="another statics"):
            writer.add_pass("bert", known, {**statics, "1.query.bias": np.ones(8, np.uint16)})
        writer.add_pass("bert", known.model_copy(update={"model": "moved/elsewhere"}), statics)
        assert writer.pending("bert") == []


def test_answers_that_are_not_those_of_the_pass_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = make_rows(tmp_path / "store", GROUPS)
    with StoreWriter.open(made.path) as writer:
        writer.add_pass("bert", pass_info(), {})
        before = snapshot(made.path)
        good = answers(made, 0, SPECS, writer.rows.columns.slot)
        key = SPECS[0].feature
        for bad, message in [
            ({name: value for name, value in good.items() if name != key}, "expected features"),
            ({**good, FeatureKey.parse("hidden.0@all"): good[key]}, "expected features"),
            ({**good, key: {"x": good[key][""]}}, "expected arrays"),
            ({**good, key: {"": good[key][""][:-1]}}, r"shard 0 of hidden.1@all: expected uint16 \[107, 8\], found uint16 \[106, 8\]"),
            ({**good, key: {"": good[key][""].astype(np.float32)}}, "expected uint16"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.commit("bert", 0, bad)
        with pytest.raises(StoreError, match="shard 99 of pass bert"):
            writer.commit("bert", 99, good)
        assert snapshot(made.path) == before
        with pytest.raises(ValueError, match="expected different features"):
            writer.add_pass("twice", pass_info((SPECS[0], spec("hidden.1@all"))), {})


def test_a_full_disk_is_one_sentence_and_what_is_committed_stays(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with StoreWriter.open(made.path) as writer:
        writer.add_pass("second", pass_info(), {})
        monkeypatch.setattr("os.link", full)
        with pytest.raises(StoreError, match=r"cannot write .*: No space left on device; make room"):
            writer.commit("second", 0, answers(Made(made.path, made.rows), 0, SPECS, writer.rows.columns.slot))
        monkeypatch.undo()
        assert writer.pending("second") == [0, 1, 2, 3]
        writer.commit("second", 0, answers(Made(made.path, made.rows), 0, SPECS, writer.rows.columns.slot))
    assert not [file for file in made.path.rglob("*.tmp")]
    store = Store.open(made.path)
    assert store.complete("bert")
    assert sorted(store.committed("second")) == [0]


def test_links_do_not_lead_writers_out_of_the_store(made: Made, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "hidden.1" / "all").mkdir(parents=True)
    (made.path / "second").symlink_to(outside)
    with StoreWriter.open(made.path) as writer, pytest.raises(StoreError, match="a link leads to"):
        writer.add_pass("second", pass_info(), {})
    (outside / "part-00000.parquet").write_text("mine")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".building").touch()
    (tmp_path / "new" / "rows").symlink_to(outside)
    with pytest.raises(StoreError, match="a link leads to"):
        RowWriter(tmp_path / "new", 128)
    assert sorted(file.name for file in outside.rglob("*") if file.is_file()) == ["part-00000.parquet"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot make the store"):
        RowWriter(tmp_path / "file" / "store", 128)
