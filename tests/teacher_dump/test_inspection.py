"""`status`, `verify` and `show`: what is in a store, is it whole, and what do rows look like."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_dump import Outcome, Tree, files_of, stored_bytes

from store.reader import Store

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]


@pytest.fixture
def store(masked_recipe: Tree, write: Write, teacher_dump: Run) -> Path:
    assert teacher_dump("run", write(masked_recipe)).code == 0
    return Path(masked_recipe["store"])


def test_status_tells_rows_passes_and_progress(store: Path, masked_recipe: Tree, teacher_dump: Run) -> None:
    out = teacher_dump("status", store).out
    slots = Store.open(store).manifest.rows.slots
    assert "rows: 90 (" in out
    assert f"pass bert: {slots} of {slots} shards (complete)" in out
    assert "hidden.1@all" in out
    assert "derived when read: attention_probs.1@all" in out
    assert masked_recipe["teacher"]["model"] in out
    assert "teacher-dump run" in out


def test_a_whole_store_is_called_whole(store: Path, teacher_dump: Run) -> None:
    before = files_of(store)
    done = teacher_dump("verify", store)
    assert done.code == 0
    assert "is whole" in done.out
    assert files_of(store) == before


def test_a_damaged_shard_is_found_taken_back_and_made_again(store: Path, masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    whole = stored_bytes(store)
    flipped, lost = store / "bert/hidden.1/all/c.3.0", store / "bert/hidden.2/first/c.5.0"
    data = bytearray(flipped.read_bytes())
    data[777] ^= 1
    flipped.write_bytes(data)
    lost.unlink()
    found = teacher_dump("verify", store)
    assert found.code == 2
    assert "c.3.0" in found.out
    assert "c.5.0" in found.out
    assert "--repair" in found.out
    mended = teacher_dump("verify", store, "--repair")
    assert mended.code == 0
    assert "2 shards" in mended.out
    slots = Store.open(store).manifest.rows.slots
    assert f"{slots - 2} of {slots} shards" in teacher_dump("status", store).out
    assert teacher_dump("run", write(masked_recipe)).code == 0
    assert stored_bytes(store) == whole
    assert teacher_dump("verify", store).code == 0


def test_a_fast_look_finds_lost_files_and_leaves_flipped_bits_to_a_full_one(store: Path, teacher_dump: Run) -> None:
    flipped = store / "bert/hidden.1/all/c.3.0"
    data = bytearray(flipped.read_bytes())
    data[777] ^= 1
    flipped.write_bytes(data)
    fast = teacher_dump("verify", store, "--fast")
    assert fast.code == 0
    assert "as far as sizes and indexes tell" in fast.out
    assert teacher_dump("verify", store).code == 2
    (store / "bert/hidden.2/first/c.5.0").unlink()
    assert "c.5.0: the file is missing" in teacher_dump("verify", store, "--fast").out


def test_status_tells_what_is_not_in_use_and_a_repair_frees_it(store: Path, teacher_dump: Run) -> None:
    stray = store / "bert/hidden.1/all/c.999.0"
    stray.write_bytes(bytes(12_000))
    assert "that killed commands or dropped features have left" in teacher_dump("status", store).out
    mended = teacher_dump("verify", store, "--repair")
    assert mended.code == 0
    assert "is whole" in mended.out
    assert ": 1 files that nothing refers to" in mended.out
    assert not stray.exists()
    assert "not in use" not in teacher_dump("status", store).out


def test_a_model_folder_that_leads_elsewhere_is_opened_by_nobody(store: Path, teacher_dump: Run, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (store / "model" / "bert" / "extra.json").symlink_to(secret)
    for command in ("verify", "show"):
        outcome = teacher_dump(command, store)
        assert outcome.code == 2
        assert "expected plain files, but extra.json is none" in outcome.out + outcome.err


def test_a_lost_model_folder_is_found_and_ships_again(store: Path, masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    shutil.rmtree(store / "model" / "bert")
    found = teacher_dump("verify", store)
    assert found.code == 2
    assert "tokenizer" in found.out
    assert teacher_dump("run", write(masked_recipe)).code == 0
    assert teacher_dump("verify", store).code == 0


def test_show_prints_rows_as_text_with_predictions_as_words(store: Path, teacher_dump: Run) -> None:
    out = teacher_dump("show", store, "--rows", 2, "--from", 4).out
    assert "── row 4 ──" in out
    assert "── row 5 ──" in out
    assert "── row 6 ──" not in out
    assert "[CLS]" in out
    assert "good" in out
    assert "others" in out
    assert "%" in out
    norms = np.linalg.norm(
        Store.open(store).read(Store.open(store).manifest.passes["bert"].features[0].feature.of("bert"), np.array([4]))[""], axis=1
    )
    assert f"norm {norms.min():.4g} to {norms.max():.4g}" in out


def test_show_prints_task_logits_as_probabilities_of_classes(class_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    assert teacher_dump("run", write(class_recipe)).code == 0
    out = teacher_dump("show", class_recipe["store"]).out
    line = next(line for line in out.splitlines() if "task_logits" in line)
    shares = [float(word.removesuffix("%")) for word in line.split() if word.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert "negative" in line
    assert "positive" in line
    assert "label " in out


def test_show_does_without_a_tokenizer_where_none_has_shipped(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    assert teacher_dump("rows", write({**masked_recipe, "features": []})).code == 0
    assert "ids 2 " in teacher_dump("show", masked_recipe["store"]).out


def test_show_refuses_rows_and_passes_that_are_not_there(store: Path, teacher_dump: Run) -> None:
    for arguments, said in ((("--from", "90"), "rows 0 to 89"), (("--pass", "gpt"), "it has bert")):
        outcome = teacher_dump("show", store, *arguments)
        assert outcome.code == 2
        assert said in outcome.err


@pytest.mark.parametrize("command", ["run", "rows", "plan", "status", "verify", "show"])
def test_every_command_explains_itself(command: str, teacher_dump: Run) -> None:
    outcome = teacher_dump(command, "--help")
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) > 5


def test_help_status_and_verify_start_without_torch(store: Path) -> None:
    code = "import sys, teacher_dump.cli as cli; cli.main(sys.argv[1:]); assert not {'torch', 'transformers'} & set(sys.modules)"
    for arguments in (["status", str(store)], ["verify", str(store)], ["run", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2]
        )
        assert done.returncode == 0, done.stderr
