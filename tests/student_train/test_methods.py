"""The table of methods, what each reads, and what it says to bad options."""

import ast
import datetime
import importlib
import inspect
from pathlib import Path

import pytest

import student_train.methods
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods import METHODS, parse_method
from student_train.methods.base import Method, layer_pairs

FOLDER = Path(student_train.methods.__file__).parent
DOCS = FOLDER.parents[1] / "docs" / "methods.md"


def shape(head: str = "base", **sizes: object) -> ModelShape:
    layers = sizes.get("layers", 6)
    assert isinstance(layers, int)
    base = dict(family="bert", layers=6, width=384, heads=12, kv_heads=12, head_width=32, vocab=100, causal=False, pre_norm=False)
    return ModelShape.model_validate(base | {"head": head, "windows": (None,) * layers} | sizes)


STUDENT, TEACHER = shape(), shape(layers=12, width=768, head_width=64)


def keys(text: str) -> set[FeatureKey]:
    return {FeatureKey.parse(word) for word in text.split()}


def test_a_method_is_one_file_and_one_line() -> None:
    shared = {"__init__", "base", "losses", "decisions", "angles", "structure", "domain_graph", "divergences", "writing", "sampled_words"}
    assert {file.stem for file in FOLDER.glob("*.py")} == set(METHODS) | shared
    for name, cls in METHODS.items():
        module = importlib.import_module(f"student_train.methods.{name}")
        assert [
            thing for thing in vars(module).values() if inspect.isclass(thing) and issubclass(thing, Method) and thing is not Method
        ] == [cls]
        assert cls.__mro__[1] is Method
    source = (FOLDER / "__init__.py").read_text(encoding="utf-8")
    tables = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "METHODS"]
    assert isinstance(tables[0].value, ast.Dict)


def test_every_method_and_option_is_in_the_documentation() -> None:
    sections = dict(part.split("\n", 1) for part in DOCS.read_text(encoding="utf-8").split("\n### ")[1:])
    assert set(sections) == {f"`{name}`" for name in METHODS}
    for name, cls in METHODS.items():
        options = [p for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
        rows = [line.split("|")[1:3] for line in sections[f"`{name}`"].splitlines() if line.startswith("| `")]
        assert [row[0].strip(" `") for row in rows] == [option.name for option in options]
        for option, row in zip(options, rows, strict=True):
            expected = "required" if option.default is option.empty else "unset" if option.default is None else str(option.default)
            assert row[1].strip(" `") == expected


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_paper_and_hides_no_options(name: str) -> None:
    doc = inspect.getdoc(METHODS[name]) or ""
    assert "Term" in doc
    assert "arXiv" in doc or name == "task_loss"
    assert all(p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) for p in inspect.signature(METHODS[name]).parameters.values())


@pytest.mark.parametrize(
    ("name", "options", "heads", "student", "teacher"),
    [
        ("task_loss", {}, "classification", "task_logits@row", ""),
        ("task_loss", {}, "token_classification", "task_logits@labels", ""),
        ("lm_loss", {}, "masked_lm", "lm_logits@labels", ""),
        ("kd", {}, "classification", "task_logits@row", "task_logits@row"),
        ("kd", {"alpha": 0}, "classification", "task_logits@row", ""),
        ("lm_kd", {"top": 64}, "masked_lm", "lm_logits@labels", "lm_logits@labels:top64"),
        ("lm_kd", {"positions": "all"}, "causal_lm", "lm_logits@all", "lm_logits@all"),
        ("hid_cls", {"layers": "last"}, "base", "hidden.6@first", "hidden.12@first"),
        ("hid_seq", {"layers": [[0, 0], [3, 12]]}, "base", "hidden.0 hidden.3", "hidden.0 hidden.12"),
        ("att_mse", {"layers": [[1, 2]]}, "base", "attention_scores.1", "attention_scores.2"),
        ("minilm", {}, "base", "attention_scores.6 value.6", "attention_scores.12 value.12"),
        ("minilm", {"attention": 0}, "base", "value.6", "value.12"),
        ("minilmv2", {"layers": [[6, 10]]}, "base", "query.6 key.6 value.6", "query.10 key.10 value.10"),
        ("tinybert", {"layers": [[1, 4]], "hidden": 0}, "base", "hidden.0 attention_scores.1", "hidden.0 attention_scores.4"),
        ("distilbert", {}, "masked_lm", "lm_logits@all lm_logits@labels", "lm_logits@all"),
        ("sentence", {"teacher_layer": 9}, "base", "final@mean", "hidden.9@mean"),
        ("match", {"site": "value", "layers": "last", "projection": "linear"}, "base", "value.6", "value.12"),
    ],
)
def test_a_method_reads_only_what_its_terms_need(name: str, options: dict[str, object], heads: str, student: str, teacher: str) -> None:
    same = {"cosine": 0} if name == "distilbert" else {}
    method = parse_method(name, options | same, shape(heads, labels=3), shape(heads, labels=3, layers=12, width=768, head_width=64))
    assert method.student_keys == keys(student)
    assert method.teacher_keys == keys(teacher)


def test_label_methods_work_without_a_teacher_and_others_say_so() -> None:
    assert not parse_method("task_loss", {}, shape("classification", labels=2), None).teacher_keys
    assert not parse_method("lm_loss", {}, shape("causal_lm"), None).teacher_keys
    for name, cls in METHODS.items():
        if cls.needs_teacher:
            with pytest.raises(ValueError, match=f"method {name} learns from a teacher.*task_loss, lm_loss"):
                parse_method(name, {}, STUDENT, None)


def test_relation_heads_are_the_papers_by_default() -> None:
    assert parse_method("minilmv2", {}, STUDENT, TEACHER).relation_heads == 48
    large = shape(layers=24, width=1024, heads=16, kv_heads=16, head_width=64)
    assert parse_method("minilmv2", {}, shape(width=768, head_width=64), large).relation_heads == 64
    grouped = shape(heads=16, kv_heads=2, head_width=20)
    assert parse_method("minilmv2", {}, grouped, grouped).relation_heads == 40
    assert parse_method("minilmv2", {"key": 0, "value": 0}, grouped, grouped).relation_heads == 64


def test_layer_maps() -> None:
    assert layer_pairs("uniform", shape(layers=4), TEACHER) == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert layer_pairs("uniform", shape(layers=5), TEACHER) == [(1, 2), (2, 4), (3, 7), (4, 9), (5, 12)]
    assert layer_pairs("last", STUDENT, TEACHER) == [(6, 12)]
    assert layer_pairs([(6, 1)], STUDENT, TEACHER) == [(6, 1)]
    with pytest.raises(ValueError, match="the teacher has blocks 1 to 3, found 0"):
        layer_pairs("uniform", STUDENT, shape(layers=3))


WORDS, CLASSES = shape("masked_lm"), shape("classification", labels=3)
OTHER_HEADS = shape(heads=6, kv_heads=6, head_width=64)
GROUPED = shape(kv_heads=2)
CUSTOM = shape(family="custom", attends=False)


@pytest.mark.parametrize(
    ("name", "options", "student", "teacher", "message"),
    [
        ("minilm2", {}, STUDENT, TEACHER, "unknown method 'minilm2'; did you mean 'minilm"),
        ("gan", {}, STUDENT, TEACHER, "unknown method 'gan'; known: task_loss, lm_loss, kd"),
        ("kd", {"temprature": 2}, CLASSES, CLASSES, "method kd: unknown key 'temprature'; did you mean 'temperature'"),
        ("task_loss", {"alpha": 1}, CLASSES, None, "unknown key 'alpha'"),
        ("kd", {"temperature": "2"}, CLASSES, CLASSES, "temperature: .*number, found '2'"),
        ("kd", {"temperature": True}, CLASSES, CLASSES, "temperature: .*number, found True"),
        ("kd", {"temperature": 0}, CLASSES, CLASSES, "temperature: .*greater than 0, found 0"),
        ("kd", {"temperature": float("inf")}, CLASSES, CLASSES, "temperature: "),
        ("kd", {"alpha": 1.5}, CLASSES, CLASSES, "alpha: .*less than or equal to 1, found 1.5"),
        ("kd", {"alpha": datetime.date(2026, 1, 1)}, CLASSES, CLASSES, "alpha: .*number, found '2026-01-01'"),
        ("kd", {}, STUDENT, STUDENT, "task_logits needs a student with a head of classification.*found head: base"),
        ("kd", {}, CLASSES, shape("classification", labels=2), "expected equal numbers of labels.*found 3 and 2"),
        ("kd", {}, CLASSES, shape("token_classification", labels=3), "expected equal heads"),
        ("lm_kd", {"top": 0}, WORDS, WORDS, "top: .*greater than or equal to 1"),
        ("lm_kd", {"top": 101}, WORDS, WORDS, "top: the vocabulary has 100 words, found 101"),
        ("lm_kd", {"top": 5, "temperature": 2}, WORDS, WORDS, "temperature 1 only, found 2.*tail: none"),
        ("lm_kd", {"tail": "none"}, WORDS, WORDS, "tail: .*set top"),
        ("lm_kd", {"positions": "first"}, WORDS, WORDS, "positions: .*found 'first'"),
        ("lm_kd", {}, WORDS, shape("masked_lm", vocab=94), "equal vocabularies"),
        ("lm_kd", {}, WORDS, shape("causal_lm"), "equal heads of student and teacher, found masked_lm and causal_lm"),
        ("lm_loss", {}, STUDENT, None, "lm_logits needs a student with a head of masked_lm, causal_lm"),
        ("hid_seq", {"layers": [[1, 13]]}, STUDENT, TEACHER, "method hid_seq: layers: the teacher has blocks 0 to 12, found 13"),
        ("hid_seq", {"layers": [[7, 1]]}, STUDENT, TEACHER, "layers: the student has blocks 0 to 6, found 7"),
        ("hid_seq", {"layers": []}, STUDENT, TEACHER, "at least one pair"),
        ("hid_seq", {"layers": "unifrom"}, STUDENT, TEACHER, "layers.*'uniform' or 'last', found 'unifrom'"),
        ("hid_seq", {"layers": [[1, 2, 3]]}, STUDENT, TEACHER, "layers"),
        ("att_mse", {"layers": [[0, 0]]}, STUDENT, TEACHER, "blocks 1 to 6, found 0"),
        ("att_mse", {}, STUDENT, OTHER_HEADS, "equal numbers of attention heads of student and teacher, found 12 and 6"),
        ("att_kl", {}, STUDENT, CUSTOM, "attention_scores cannot be read from the teacher: its family is custom"),
        ("val_kl", {}, STUDENT, GROUPED, "equal numbers of key-value heads.*found 12 and 2; minilmv2"),
        ("minilm", {}, STUDENT, OTHER_HEADS, "equal numbers of attention heads"),
        ("minilm", {"attention": 0, "value": 0}, STUDENT, TEACHER, "every weight is 0"),
        ("minilm", {"value": -1}, STUDENT, TEACHER, "value: .*greater than or equal to 0"),
        ("minilmv2", {"relation_heads": 36}, STUDENT, TEACHER, "divides all widths, found 36 for student query 384, .*teacher value 768"),
        ("minilmv2", {}, CUSTOM, TEACHER, "query cannot be read from the student"),
        ("tinybert", {}, STUDENT, OTHER_HEADS, "attention heads.*attention: 0 leaves this term out"),
        ("tinybert", {"attention": False}, STUDENT, TEACHER, "attention: .*number, found False"),
        ("distilbert", {}, WORDS, shape("masked_lm", width=768), "equal widths.*found 384 and 768; cosine: 0"),
        ("sentence", {"student_layer": 7}, STUDENT, TEACHER, "student_layer: the student has blocks 0 to 6, found 7"),
        ("sentence", {"cosine": 0}, STUDENT, TEACHER, "every weight is 0"),
        ("match", {}, STUDENT, TEACHER, "site: required"),
        ("match", {"site": "hiden"}, STUDENT, TEACHER, "unknown feature 'hiden'; did you mean 'hidden'"),
        ("match", {"site": "hidden"}, STUDENT, TEACHER, "equal widths of hidden.*projection: linear, or form: relation"),
        ("match", {"site": "final", "layers": "last"}, STUDENT, STUDENT, "final has no layers"),
        ("match", {"site": "value", "layers": [[0, 1]]}, STUDENT, STUDENT, "blocks 1 to 6, found 0"),
        ("match", {"site": "final", "temperature": 2}, STUDENT, STUDENT, "temperature: only the distances kl and ce"),
        ("match", {"site": "final", "positions": "row"}, STUDENT, STUDENT, "positions: expected all or first .*found row"),
        ("match", {"site": "final", "form": "relation", "positions": "first"}, STUDENT, STUDENT, "positions: expected all for final"),
        ("match", {"site": "final", "form": "relation", "projection": "linear"}, STUDENT, STUDENT, "no width to project"),
        ("match", {"site": "attention_probs", "distance": "kl"}, STUDENT, STUDENT, "expected site: attention_scores"),
        ("match", {"site": "attention_scores", "form": "relation"}, STUDENT, STUDENT, "is a relation already"),
        ("match", {"site": "attention_scores"}, STUDENT, OTHER_HEADS, "equal numbers of attention heads"),
        ("match", {"site": "task_logits", "positions": "all"}, CLASSES, CLASSES, "positions: expected row for task_logits"),
        (
            "match",
            {"site": "task_logits", "distance": "kl"},
            shape("multiple_choice", labels=1),
            shape("multiple_choice", labels=1),
            "distributions",
        ),
        ("match", {"site": "head_input"}, STUDENT, STUDENT, "head_input needs a student with a head of masked_lm"),
    ],
)
def test_bad_options_say_what_was_expected(
    name: str, options: dict[str, object], student: ModelShape, teacher: ModelShape | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(name, options, student, teacher)
