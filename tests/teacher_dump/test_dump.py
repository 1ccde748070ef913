"""The dump end to end: what lies in the store afterwards is what Hugging Face's own models answer."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from tiny_dump import LAYERS, Outcome, Tree, World, files_of, make_tokenizer, stored_bytes
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from online.kept_words import KeptWords
from store.codecs import decode
from store.features import FeatureKey
from store.reader import Store

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]


def read(store: Store, key: str, row: int) -> dict[str, np.ndarray]:
    feature = FeatureKey.parse(key)
    return decode(store.spec(feature), store.read(feature, np.array([row])))


def inputs_of(store: Store) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
    """Row, its length, and the row padded to a multiple of 16 tokens as a batch of one."""
    for row in range(len(store.rows)):
        ids = torch.from_numpy(store.tokens("input_ids", np.array([row])).astype(np.int64))
        padded = -(-len(ids) // 16) * 16
        mask = (torch.arange(padded) < len(ids)).long()
        yield row, len(ids), {"input_ids": torch.nn.functional.pad(ids, (0, padded - len(ids)))[None], "attention_mask": mask[None]}


def test_a_masked_lm_dump_holds_what_the_teacher_answers(world: World, masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    done = teacher_dump("run", write(masked_recipe))
    assert done.code == 0, done.err
    assert "tokens/s" in done.out
    assert "attention_probs.1@all" in done.out
    store = Store.open(Path(masked_recipe["store"]))
    assert store.complete("bert")
    assert "bert/attention_probs.1@all" not in {str(spec.feature.of("bert")) for spec in store.manifest.passes["bert"].features}
    model = AutoModelForMaskedLM.from_pretrained(world.masked, attn_implementation="eager").eval()
    tokenizer = make_tokenizer()
    words = [7, *tokenizer.convert_tokens_to_ids(["good", "bad"])]
    for row, length, inputs in inputs_of(store):
        with torch.no_grad():
            live = model(**inputs, output_hidden_states=True)
        labels = store.tokens("token_labels", np.array([row])).astype(np.int64)
        places = np.flatnonzero(labels != -100)
        logits = live.logits[0, places].double().numpy()
        log_sum = np.log(np.exp(logits).sum(1))
        np.testing.assert_allclose(read(store, "bert/hidden.1@all", row)[""], live.hidden_states[1][0, :length], atol=2e-5)
        np.testing.assert_allclose(read(store, "bert/hidden.2@first", row)[""], live.hidden_states[2][0, :1], atol=2e-5)
        top = read(store, "bert/lm_logits@masked:top8", row)
        np.testing.assert_allclose(top["log_probs"], -np.sort(-logits, 1)[:, :8] - log_sum[:, None], atol=3e-5)
        np.testing.assert_allclose(np.take_along_axis(logits, top["ids"], 1) - log_sum[:, None], top["log_probs"], atol=3e-5)
        left = 1 - np.exp(-np.sort(-logits, 1)[:, :8] - log_sum[:, None]).sum(1)
        np.testing.assert_allclose(np.exp(top["log_tail"][:, 0]), left, atol=1e-5)
        chosen = read(store, "bert/lm_logits@labels:select", row)
        np.testing.assert_allclose(chosen["logits"], logits[:, words], atol=3e-5)
        np.testing.assert_allclose(chosen["true_logit"][:, 0], logits[np.arange(len(places)), labels[places]], atol=3e-5)
        np.testing.assert_allclose(chosen["log_sum_exp"][:, 0], log_sum, atol=3e-5)


def test_a_classifier_dump_holds_what_the_teacher_answers(world: World, class_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    assert teacher_dump("run", write(class_recipe)).code == 0
    store = Store.open(Path(class_recipe["store"]))
    model = AutoModelForSequenceClassification.from_pretrained(world.classifier).eval()
    lines = [json.loads(line) for line in world.corpus.read_text().splitlines()]
    for row, length, inputs in inputs_of(store):
        with torch.no_grad():
            live = model(**inputs, output_hidden_states=True)
        np.testing.assert_allclose(read(store, "classes/task_logits@row", row)[""], live.logits, atol=2e-5)
        for layer in range(LAYERS + 1):
            np.testing.assert_allclose(read(store, f"classes/hidden.{layer}@first", row)[""], live.hidden_states[layer][0, :1], atol=2e-5)
        np.testing.assert_allclose(read(store, "classes/final@mean", row)[""][0], live.hidden_states[-1][0, :length].mean(0), atol=2e-5)
        assert ["negative", "positive"][int(store.rows.label[row])] == lines[row]["label"]


def test_half_precision_stores_the_rounded_answers(masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    exact, rounded = tmp_path / "exact", tmp_path / "rounded"
    recipe = write(masked_recipe)
    assert teacher_dump("run", recipe, f"store={exact}").code == 0
    done = teacher_dump("run", recipe, f"store={rounded}", "dtype=bfloat16")
    assert done.code == 0
    assert "e-03" in done.out, "the error of derived attention is printed"
    key = FeatureKey.parse("bert/hidden.1@all")
    rows = np.arange(len(Store.open(exact).rows))
    full = torch.from_numpy(Store.open(exact).read(key, rows)[""])
    half = Store.open(rounded).read(key, rows)[""]
    np.testing.assert_array_equal(half, full.bfloat16().view(torch.int16).numpy().view(np.uint16))


def test_a_second_teacher_adds_a_pass_and_touches_nothing(world: World, masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    assert teacher_dump("run", write(masked_recipe)).code == 0
    store = Path(masked_recipe["store"])
    before = {path: about for path, about in files_of(store).items() if path.startswith(("bert/", "rows/", "tokens/", "static/bert/"))}
    masked_recipe |= {"pass_name": "second", "teacher": {"model": str(world.other), "head": "masked_lm"}}
    assert teacher_dump("run", write(masked_recipe)).code == 0
    after = files_of(store)
    assert {path: after[path] for path in before} == before
    both = Store.open(store)
    assert both.complete("bert")
    assert both.complete("second")
    rows = np.arange(len(both.rows))
    first, second = (both.read(FeatureKey.parse(f"{name}/hidden.1@all"), rows)[""] for name in ("bert", "second"))
    assert not np.allclose(first, second)


def test_a_finished_dump_is_left_as_it_is(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    recipe = write(masked_recipe)
    assert teacher_dump("run", recipe).code == 0
    before = files_of(Path(masked_recipe["store"]))
    again = teacher_dump("run", recipe)
    assert again.code == 0
    assert "nothing was left to do" in again.out
    assert files_of(Path(masked_recipe["store"])) == before


def test_rows_without_features_become_a_dump_later(masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    store = Path(masked_recipe["store"])
    bare = write({**masked_recipe, "features": []})
    done = teacher_dump("rows", bare)
    assert done.code == 0
    assert "81 train, 9 dev" in done.out or "train" in done.out
    assert not Store.open(store).manifest.passes
    rows = files_of(store / "rows")
    assert teacher_dump("rows", bare).code == 0, "a second time changes nothing"
    assert teacher_dump("run", write(masked_recipe)).code == 0
    assert files_of(store / "rows") == rows
    assert teacher_dump("run", write(masked_recipe), f"store={tmp_path / 'whole'}").code == 0
    assert stored_bytes(store) == stored_bytes(tmp_path / "whole")


def test_what_ships_is_a_hugging_face_folder(world: World, masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    recipe = write(masked_recipe)
    assert teacher_dump("run", recipe, "ship_layers=[2]").code == 0
    folder = Path(masked_recipe["store"]) / "model" / "bert"
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == LAYERS
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == make_tokenizer().get_vocab()
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["ship_layers"] == [2]
    shipped = load_file(folder / "model.safetensors")
    teacher = load_file(world.masked / "model.safetensors")
    assert {name for name in teacher if ".layer.0." in name} == teacher.keys() - shipped.keys()
    assert all(torch.equal(shipped[name], teacher[name]) for name in shipped)


def test_all_blocks_ship_as_a_whole_model(world: World, masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    assert teacher_dump("run", write(masked_recipe), "ship_layers=all").code == 0
    shipped = AutoModelForMaskedLM.from_pretrained(Path(masked_recipe["store"]) / "model" / "bert").eval()
    teacher = AutoModelForMaskedLM.from_pretrained(world.masked).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(shipped(input_ids=ids).logits, teacher(input_ids=ids).logits)


def test_batches_do_not_decide_what_is_stored(masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    recipe = write(masked_recipe)
    stores = []
    for tokens in (16, 4096):
        assert teacher_dump("run", recipe, f"store={tmp_path / str(tokens)}", f"batch_tokens={tokens}").code == 0
        stores.append(Store.open(tmp_path / str(tokens)))
    rows = np.arange(len(stores[0].rows))
    one, many = (store.read(FeatureKey.parse("bert/hidden.1@all"), rows)[""] for store in stores)
    np.testing.assert_allclose(one, many, atol=2e-5)


def test_rows_of_kept_words_go_on_with_the_same_map_wherever_it_lies_and_with_no_other(
    masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    words = max(AutoTokenizer.from_pretrained(masked_recipe["teacher"]["model"]).get_vocab().values()) + 1
    same = torch.arange(words)
    other = same.clone()
    other[-1] = words - 2  # the last word is read as the one before it
    for name, kept, places in (("a", same, same.clone()), ("b", same, same.clone()), ("c", same[:-1], other)):
        (tmp_path / name).mkdir()
        KeptWords(kept, places).write(tmp_path / name)
    recipes = {name: {**masked_recipe, "rows": {**masked_recipe["rows"], "vocabulary": str(tmp_path / name)}} for name in "abc"}
    assert teacher_dump("rows", write(recipes["a"])).code == 0
    moved = teacher_dump("rows", write(recipes["b"]))
    assert moved.code == 0, moved.err
    changed = teacher_dump("rows", write(recipes["c"]))
    assert changed.code == 2
    assert "row building" in changed.err
    without = teacher_dump("rows", write(masked_recipe))
    assert without.code == 2
    assert "rows.vocabulary" in without.err
