"""Advice: typical cases against the sources of the rules, bytes and operations against sums by hand."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import BertConfig, LlamaConfig

from store.reader import Store
from student_train.advice import CONDITIONS, RULES
from student_train.methods import METHODS

ROOT = Path(__file__).parents[2]
Program = Callable[..., tuple[int, str, str]]
Folder = Callable[..., Path]
Advice = Callable[..., dict[str, Any]]


@pytest.fixture
def bert(tmp_path: Path) -> Folder:
    """``bert("ForSequenceClassification", num_labels=2)``: the configuration of BERT-base with this head, and no weights."""

    def write(ending: str, num_labels: int = 2) -> Path:
        folder = tmp_path / ending
        BertConfig(architectures=[f"Bert{ending}"], num_labels=num_labels).save_pretrained(folder)
        return folder

    return write


@pytest.fixture
def advice(program: Program) -> Advice:
    """What `suggest --json` says with these options."""

    def ask(*options: str | Path) -> dict[str, Any]:
        code, out, err = program("suggest", *options, "--json")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return ask


def named(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in found["methods"] if one["name"] == name)


def test_a_classifier_of_half_the_blocks_is_told_attention_first_and_soft_labels_second(bert: Folder, advice: Advice) -> None:
    found = advice("--teacher", bert("ForSequenceClassification"), "--rows", "67349", "--length", "25", "--students", "48")
    first = found["methods"][0]
    assert first["phases"] == [["att_mse"], ["kd"]]
    assert "2305.15032" in first["source"]
    assert first["train"]["phases"][0]["student"] == {"layers": [2, 4, 6, 8, 10, 12]}
    assert set(first["stored"]) == {*(f"input.{block}@all" for block in (2, 4, 6, 8, 10, 12)), "task_logits@row"}
    assert first["unit_bytes"] == {"token": 6 * 768 * 2, "row": 2 * 2}
    assert first["bytes"] == 67349 * (25 * 6 * 768 * 2 + 4)


def test_lower_blocks_are_advised_for_soft_labels_alone(bert: Folder, advice: Advice) -> None:
    found = advice("--teacher", bert("ForSequenceClassification"), "--rows", "1000", "--student", "num_hidden_layers=3")
    soft = named(found, "soft labels")
    assert soft["train"]["phases"][0]["student"] == {"layers": "first 3"}
    assert soft["bytes"] == 1000 * 4
    assert any("66.5" in one["advice"] for one in found["advice"] if one["about"] == "start")


def test_operations_of_the_teacher_are_those_counted_by_hand(bert: Folder, advice: Advice) -> None:
    rows, length, flops = 500, 32, 1e12
    options = ("--rows", str(rows), "--length", str(length), "--flops", str(flops), "--epochs", "2", "--students", "7")
    found = advice("--teacher", bert("ForSequenceClassification"), *options)
    block = 4 * 768 * 768 + 2 * 768 * 3072
    of_row = length * 12 * 2 * block + 12 * 4 * 768 * length**2 + 2 * (768 * 768 + 768 * 2)
    seconds = rows * of_row / flops
    soft, attention = named(found, "soft labels"), named(found, "attention")
    assert soft["passes"] == 7 * 2
    assert attention["passes"] == 7 * 2 * 2  # two phases
    assert soft["teacher_seconds"]["one pass"] == pytest.approx(seconds)
    assert soft["teacher_seconds"]["live"] == pytest.approx(14 * seconds)
    assert soft["teacher_seconds"]["stored"] == pytest.approx(seconds + 14 * rows * 4 / 3e9)
    assert not soft["recompute"]
    half = length * 6 * 2 * block + 6 * 4 * 768 * length**2 + 2 * (768 * 768 + 768 * 2)
    assert soft["student_seconds"] == pytest.approx(14 * 3 * rows * half / flops)


def test_where_reading_takes_longer_than_computing_the_recipe_has_the_teacher_at_work(bert: Folder, advice: Advice) -> None:
    teacher = bert("ForSequenceClassification")
    slow = advice("--teacher", teacher, "--rows", "1000", "--flops", "1e14", "--bandwidth", "1e8")
    first = slow["methods"][0]
    assert first["recompute"]
    assert first["dump"] == ""
    assert first["passes_until_a_store_has_paid"] is None
    assert all(phase["teacher"] == {"online": {"model": str(teacher), "head": "classification"}} for phase in first["train"]["phases"])
    assert all(phase["data"] == [{"store": "STORE"}] for phase in first["train"]["phases"])
    fast = advice("--teacher", teacher, "--rows", "1000", "--flops", "1e14", "--bandwidth", "1e12")["methods"][0]
    assert not fast["recompute"]
    assert yaml.safe_load(fast["dump"])["features"][-1] == "task_logits@row"


def test_attention_is_not_advised_where_heads_differ(bert: Folder, advice: Advice) -> None:
    found = advice("--teacher", bert("ForSequenceClassification"), "--rows", "1000", "--student", "num_attention_heads=6")
    assert found["methods"][0]["phases"] == [["tinybert", "minilmv2"], ["kd"]]
    assert not any("att_mse" in names for one in found["methods"] for names in one["phases"])


def test_a_masked_language_model_is_told_words_at_every_token_as_glmd_has_them(bert: Folder, advice: Advice) -> None:
    sizes = ("hidden_size=384", "num_attention_heads=6", "intermediate_size=1536")
    students = [word for size in sizes for word in ("--student", size)]
    found = advice("--teacher", bert("ForMaskedLM"), "--tokens", "4.9e9", "--length", "512", *students)
    first = found["methods"][0]
    assert first["train"]["phases"][0]["methods"] == [{"name": "lm_kd", "options": {"positions": "all", "temperature": 15.0}}]
    assert "2306.06625" in first["source"]
    assert first["stored"] == ["head_input@all"]
    assert first["bytes"] == 4.9e9 * 768 * 2  # 7.5 TB
    assert first["train"]["phases"][0]["student"] == {
        "random": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    }
    block = 4 * 768 * 768 + 2 * 768 * 3072
    transform = 2 * 768 * 768  # of the head, in front of what multiplies words: what is stored lies behind it
    compute, read = (12 * (2 * block + 4 * 768 * 512) + transform) / (0.4 * 312e12), 1536 / 3e9
    assert first["passes_until_a_store_has_paid"] == pytest.approx(compute / (compute - read))  # 1.5
    assert not first["recompute"]  # three epochs
    once = advice("--teacher", bert("ForMaskedLM"), "--tokens", "4.9e9", "--length", "512", "--epochs", "1", *students)
    assert once["methods"][0]["recompute"]


def test_a_store_tells_how_much_text_there_is(words: Path, advice: Advice) -> None:
    teacher = words.parent / "teacher"
    width = json.loads((teacher / "config.json").read_text())["hidden_size"]
    rows = Store.open(words).manifest.rows
    found = advice("--teacher", teacher, "--store", words)
    assert (found["rows"], found["tokens"]) == (rows.rows, rows.tokens)
    assert found["methods"][0]["bytes"] == pytest.approx(rows.tokens * width * 2)


def test_a_large_decoder_and_a_small_disk_lead_to_few_words(tmp_path: Path, advice: Advice) -> None:
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
    LlamaConfig(architectures=["LlamaForCausalLM"], **sizes).save_pretrained(tmp_path / "llama")
    options = ("--teacher", tmp_path / "llama", "--tokens", "1e8", "--length", "512", "--students", "10")
    found = advice(*options, "--disk", "10GB")
    assert found["methods"][0]["name"] == "few words"
    assert found["methods"][0]["bytes"] == 1e8 * (6 * 4 + 12)
    exact = named(found, "exact words")
    assert exact["bytes"] == 1e8 * 4096 * 2
    assert not exact["fits_disk"]
    assert not exact["recompute"]
    assert advice(*options)["methods"][0]["name"] == "exact words"
    own = named(found, "own words")
    assert own["recompute"]
    assert own["stored"] == []


def test_a_pretrained_student_is_taken_as_it_is(bert: Folder, advice: Advice, tmp_path: Path) -> None:
    BertConfig(architectures=["BertModel"], num_hidden_layers=4, hidden_size=312, num_attention_heads=12).save_pretrained(
        tmp_path / "small"
    )
    found = advice("--teacher", bert("ForSequenceClassification"), "--rows", "1000", "--student", tmp_path / "small")
    first = found["methods"][0]
    assert first["phases"] == [["att_mse"], ["kd"]]  # as many heads, another width
    assert first["train"]["phases"][0]["student"] == {
        "model": {"model": str(tmp_path / "small"), "head": "classification", "new_head": True}
    }
    assert first["train"]["phases"][0]["methods"] == [{"name": "att_mse"}]  # by its own map: no block is one of the teacher's
    assert first["unit_bytes"] == {"token": 4 * 768 * 2, "row": 4}
    starts = [one["advice"] for one in found["advice"] if one["about"] == "start"]
    assert len(starts) == 1
    assert "keeps its own weights" in starts[0]


def test_scores_of_one_number_are_a_regression(bert: Folder, advice: Advice) -> None:
    found = advice("--teacher", bert("ForSequenceClassification", num_labels=1), "--rows", "5749")
    assert found["task"] == "regression"
    assert named(found, "soft labels")["unit_bytes"] == {"row": 2}
    assert not any("lrc_bert" in one["advice"] for one in found["advice"])


def test_what_does_not_fit_the_disk_stands_behind_what_does(bert: Folder, advice: Advice) -> None:
    options = ("--rows", "100000", "--bandwidth", "1e12", "--disk", "200MB")
    found = advice("--teacher", bert("ForSequenceClassification"), *options)
    assert [one["name"] for one in found["methods"]] == ["soft labels", "few numbers", "attention", "hidden states"]
    assert [one["fits_disk"] for one in found["methods"]] == [True, True, False, False]
    few = named(found, "few numbers")
    assert few["unit_bytes"] == {"row": 10 * 77 * 2 + 4}  # ten tokens, a tenth of 768 neurons, two task logits


def test_the_pasted_recipe_reads_what_the_pasted_dump_holds(bert: Folder, program: Program, tmp_path: Path) -> None:
    teacher = bert("ForSequenceClassification")
    code, out, err = program("suggest", "--teacher", teacher, "--rows", "1000", "--bandwidth", "1e12", "--hours", "1e-6")
    assert code == 0, err
    assert out.count("MORE THAN 1e-06 HOURS") == 4  # each of the methods
    dump, train = re.search(r"docs/recipes.md\):\n(.*?)# for student-train run:\n(.*)", out, re.S).groups()  # type: ignore[union-attr]
    recipe = tmp_path / "train.yaml"
    recipe.write_text(train)
    code, lines, err = program("needs", recipe, "--teacher", teacher)
    assert code == 0, err
    assert yaml.safe_load(lines) == yaml.safe_load(dump)
    assert yaml.safe_load(dump)["ship_layers"] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--rows", "10", "--task", "classification"), "tune it on the task first"),
        ((), "how much text is there?"),
        (("--rows", "10", "--disk", "much"), "expected bytes such as 500GB"),
        (("--rows", "10", "--student", "hiden_size=3"), "hidden_size"),
        (("--rows", "10", "--student", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(options: tuple[str, ...], says: str, bert: Folder, program: Program) -> None:
    code, _, err = program("suggest", "--teacher", bert("ForMaskedLM"), *options)
    assert code == 2
    assert says in err
    assert "Traceback" not in err


def test_every_rule_names_methods_recipes_and_conditions_that_exist() -> None:
    for rule in RULES:
        assert set(rule.when) <= CONDITIONS.keys()
        assert rule.source
        assert {str(method["name"]) for methods in rule.phases for method in methods} <= METHODS.keys()
        assert bool(rule.phases) == bool(rule.name) == (rule.about == "method")
        assert not rule.recipe or (ROOT / rule.recipe).is_file()


def test_the_page_has_every_method_and_source_of_the_rules_and_no_unknown_method() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    for rule in RULES:
        for number in re.findall(r"arXiv (\d{4}\.\d{5})", rule.source):
            assert number in page
        for methods in rule.phases:
            assert all(f"`{method['name']}`" in page for method in methods)
    code = set(re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)*)`", page))
    assert code - {"suggest", "int8", "width"} <= METHODS.keys()  # a command, a type, a key of recipes
