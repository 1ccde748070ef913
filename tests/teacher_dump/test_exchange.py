"""The verbs ``export`` and ``import``: what a user types, and what is said."""

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_dump import VOCAB, Outcome, Tree, make_tokenizer
from transformers import LlamaConfig

from online.fingerprints import tokenizer_fingerprint
from store import FeatureKey, Store
from teacher_dump.imports import token_texts

Program = Callable[..., Outcome]


def responses(path: Path, named: bool = False) -> list[list[int]]:
    """A file of scored prompts; their tokens. Words are given as text where ``named``."""
    rng, texts = np.random.default_rng(0), []
    names = make_tokenizer().convert_ids_to_tokens(range(VOCAB))
    with path.open("w") as file:
        for _ in range(6):
            ids = rng.integers(5, VOCAB, 12).tolist()
            texts.append(ids)
            words = [{int(w): math.log(p) for w, p in zip(rng.permutation(VOCAB)[:3], (0.5, 0.25, 0.125), strict=True)} for _ in ids[1:]]
            record: dict[str, Any] = {
                "prompt_token_ids": ids,
                "prompt_logprobs": [None, *({str(w): x for w, x in some.items()} for some in words)],
            }
            if named:
                echoed = [None, *({names[w]: x for w, x in some.items()} for some in words)]
                record = {"choices": [{"logprobs": {"tokens": [names[w] for w in ids], "top_logprobs": echoed}}]}
            file.write(json.dumps(record) + "\n")
    return texts


def test_responses_become_a_store_that_is_shown_as_text(teacher_dump: Program, tmp_path: Path) -> None:
    texts = responses(tmp_path / "a.jsonl")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    command = ["import", "logprobs", tmp_path / "a.jsonl", "--store", tmp_path / "store", "--top", 3, "--model", "Big-70B"]
    done = teacher_dump(*command, "--tokenizer", tmp_path / "tokenizer", "--pass", "big")
    assert done.code == 0, done.err
    assert "6 rows of 72 tokens in 1 shards, pass big, 1 committed now" in done.out
    store = Store.open(tmp_path / "store")
    assert store.manifest.rows.tokenizer == tokenizer_fingerprint(make_tokenizer())
    info = store.manifest.passes["big"]
    assert (info.model, info.shape.vocab, info.made.command[:3]) == ("Big-70B", VOCAB, ("teacher-dump", "import", "logprobs"))
    assert store.tokens("input_ids", np.array([2])).tolist() == texts[2]
    shown = teacher_dump("show", tmp_path / "store").out
    assert make_tokenizer().convert_ids_to_tokens(texts[0][0]) in shown
    assert "50.0%" in shown
    assert "Big-70B" in teacher_dump("status", tmp_path / "store").out
    assert teacher_dump("verify", tmp_path / "store").code == 0
    again = teacher_dump(*command, "--tokenizer", tmp_path / "tokenizer", "--pass", "big")
    assert (again.code, "nothing was left to do" in again.out) == (0, True)
    other = teacher_dump(*command, "--tokenizer", tmp_path / "tokenizer", "--split", "dev")
    assert other.code == 2
    assert "another split" in other.err


def test_text_of_words_is_looked_up_and_the_same_is_stored(teacher_dump: Program, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name, named in (("ids", False), ("text", True)):
        responses(tmp_path / f"{name}.jsonl", named)
        options = ["--store", tmp_path / name, "--top", 3, "--tokenizer", tmp_path / "tokenizer"]
        done = teacher_dump("import", "logprobs", tmp_path / f"{name}.jsonl", *options)
        assert done.code == 0, done.err
    key, rows = FeatureKey("lm_logits", None, "labels", "top3", "teacher"), np.arange(6)
    first, second = (Store.open(tmp_path / name).read(key, rows) for name in ("ids", "text"))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_texts_that_several_tokens_share_are_no_names() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["river "])
    texts = token_texts(tokenizer)
    assert texts["city"] == tokenizer.convert_tokens_to_ids("city")
    assert texts["##s"] == tokenizer.convert_tokens_to_ids("##s")


def test_what_is_missing_or_wrong_is_said_in_one_line(teacher_dump: Program, tmp_path: Path) -> None:
    responses(tmp_path / "a.jsonl")
    no_words = teacher_dump("import", "logprobs", tmp_path / "a.jsonl", "--store", tmp_path / "s", "--top", 3)
    assert (no_words.code, "expected --tokenizer FOLDER" in no_words.err) == (2, True)
    too_many = teacher_dump("import", "logprobs", tmp_path / "a.jsonl", "--store", tmp_path / "s", "--top", 4, "--vocab", VOCAB)
    assert (too_many.code, "a.jsonl, record 0: token 1: expected at least 4 words, found 3" in too_many.err) == (2, True)
    nothing = teacher_dump("import", "distillkit", tmp_path, "--store", tmp_path / "s", "--vocab", VOCAB)
    assert (nothing.code, "expected files that end in .parquet" in nothing.err) == (2, True)
    absent = teacher_dump("import", "distillkit", tmp_path / "x", "--store", tmp_path / "s", "--vocab", VOCAB)
    assert (absent.code, "no such file or folder" in absent.err) == (2, True)
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump" / "data_0.ckpt.gz").write_bytes(b"\x1f\x8b")
    pickled = teacher_dump("import", "hidden-states", tmp_path / "dump", "--store", tmp_path / "s", "--vocab", 9, "--features", "final")
    assert (pickled.code, "is a pickle" in pickled.err, "'*.ckpt.gz'" in pickled.err) == (2, True, True)
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_the_command_that_converts_pickles_does_so(teacher_dump: Program, tmp_path: Path) -> None:
    folder = tmp_path / "dump" / "rows_0-2000"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    record = {
        "input_ids": torch.arange(5), "loss_mask": torch.tensor([0, 0, 1, 1, 1]), "hidden_state": torch.randn(1, 5, 8).bfloat16(),
        "aux_hidden_state": torch.randn(1, 5, 16).bfloat16(),
    }  # fmt: skip
    with gzip.open(folder / "data_7.ckpt.gz", "wb") as file:
        torch.save(record, file)
    options = ["--store", tmp_path / "store", "--vocab", 9, "--features", "hidden.1", "--features", "hidden.2", "--features", "final"]
    refused = teacher_dump("import", "hidden-states", folder, *options)
    command = refused.err[refused.err.index("  python -c") :].replace("  python", sys.executable, 1).replace("NEW-FOLDER", "new")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, timeout=200)
    done = teacher_dump("import", "hidden-states", tmp_path / "new", *options)
    assert done.code == 0, done.err
    store, one = Store.open(tmp_path / "store"), np.array([0])
    for place, name in enumerate(("hidden.1", "hidden.2")):
        expected = record["aux_hidden_state"][0, :, 8 * place : 8 * place + 8].contiguous().view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(store.read(FeatureKey.parse(f"teacher/{name}"), one)[""], expected)
    assert store.tokens("token_labels", one).tolist() == [-100, 2, 3, 4, -100]


def test_states_of_the_draft_model_tools_come_with_what_the_configuration_says(teacher_dump: Program, tmp_path: Path) -> None:
    """Written with the library that those tools use."""
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16)
    config.save_pretrained(tmp_path / "config")
    torch.manual_seed(0)
    states = [torch.randn(length, 2, 8).bfloat16() for length in (5, 3, 11)]
    (tmp_path / "states").mkdir()
    for number, some in zip((0, 2, 10), states, strict=True):  # a sample in between has failed
        save_file({"hidden_states": some, "token_ids": torch.arange(len(some))}, tmp_path / "states" / f"hs_{number}.safetensors")
    options = ["--store", tmp_path / "store", "--config", tmp_path / "config", "--features", "hidden.2", "--features", "hidden.4"]
    done = teacher_dump("import", "hidden-states", tmp_path / "states", *options)
    assert done.code == 0, done.err
    store = Store.open(tmp_path / "store")
    shape = store.manifest.passes["teacher"].shape
    assert (shape.layers, shape.width, shape.vocab, shape.family) == (4, 8, VOCAB, "custom")
    assert store.manifest.passes["teacher"].dtype == "bfloat16"
    assert [store.rows.about(row)["record"] for row in range(3)] == [0, 2, 10]
    for layer, name in enumerate(("hidden.2", "hidden.4")):
        found = store.read(FeatureKey.parse(f"teacher/{name}"), np.arange(3))[""]
        expected = torch.cat(states)[:, layer].contiguous().view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(found, expected)
    exported = teacher_dump("export", tmp_path / "store", tmp_path / "out", "--format", "hidden-states")
    assert exported.code == 0, exported.err
    assert "3 rows, 3 files written" in exported.out


def test_settings_of_distillkit_are_read_beside_its_files(teacher_dump: Program, tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "store"))
    from foreign import VOCAB as WORDS
    from foreign import check_next_words, distillkit_row, follows, sentences, write_distillkit

    (tmp_path / "capture").mkdir()
    table = follows()
    write_distillkit(tmp_path / "capture" / "data_0.parquet", [distillkit_row(ids, 6, table) for ids in sentences(9)])
    options = ["--store", tmp_path / "store", "--vocab", WORDS]
    bare = teacher_dump("import", "distillkit", tmp_path / "capture", *options)
    assert (bare.code, "compression_config.yaml" in bare.err) == (2, True)
    settings: Tree = {"d": WORDS, "k": 6, "exact_k": 6, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False}
    (tmp_path / "capture" / "compression_config.yaml").write_text(yaml.safe_dump({**settings, "error_diffusio": False}))
    misspelt = teacher_dump("import", "distillkit", tmp_path / "capture", *options)
    assert (misspelt.code, "did you mean 'error_diffusion'" in misspelt.err) == (2, True)
    (tmp_path / "capture" / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    done = teacher_dump("import", "distillkit", tmp_path / "capture", *options, "--top", 4)
    assert done.code == 0, done.err
    assert "no tokenizer was given" in done.out
    assert check_next_words(Store.open(tmp_path / "store"), 4, table)
    (tmp_path / "legacy.yaml").write_text(yaml.safe_dump({"teacher": {"legacy_logit_compression": {"k": 6}}}))
    legacy = teacher_dump("import", "distillkit", tmp_path / "capture", *options, "--codec", tmp_path / "legacy.yaml")
    assert (legacy.code, "logits less their mean" in legacy.err) == (2, True)


def test_a_store_is_exported_by_pass_feature_split_and_rows(teacher_dump: Program, tmp_path: Path) -> None:
    responses(tmp_path / "a.jsonl")
    teacher_dump("import", "logprobs", tmp_path / "a.jsonl", "--store", tmp_path / "store", "--top", 3, "--vocab", VOCAB)
    options = ["--features", "lm_logits@labels:top3", "--split", "train", "--rows", "1:4", "--pass", "teacher"]
    done = teacher_dump("export", tmp_path / "store", tmp_path / "out", "--format", "parquet", *options)
    assert done.code == 0, done.err
    assert "3 rows, 1 files written" in done.out
    assert pq.read_table(tmp_path / "out")["row"].to_pylist() == [1, 2, 3]
    again = teacher_dump("export", tmp_path / "store", tmp_path / "out", "--format", "parquet", *options)
    assert "nothing was left to do" in again.out
    wrong = teacher_dump("export", tmp_path / "store", tmp_path / "out2", "--format", "parquet", "--rows", "1-4")
    assert (wrong.code, "expected FIRST:AFTER" in wrong.err) == (2, True)
