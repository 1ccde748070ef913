"""`student-train methods`: what is said of every method, and what a dump for it costs."""

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import get_args

import pytest
from transformers import AutoConfig, BertConfig, LlamaConfig

from student_train.method_options import in_words, option_lines
from student_train.method_reads import Pair, pair_of, reads
from student_train.methods import METHODS
from student_train.methods.base import Kind, Knowledge

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a classifier with the sizes of BERT-base; no weights."""
    folder = tmp_path_factory.mktemp("base")
    BertConfig(architectures=["BertForSequenceClassification"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentiment_pair(base: Path) -> Pair:
    return pair_of(base)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_says_where_it_comes_from_and_whom_it_takes(name: str) -> None:
    cls = METHODS[name]
    assert cls.paper.strip()
    assert cls.accepts.strip()
    assert (cls.__doc__ or "").strip()
    assert cls.stages
    assert all(stage and learns and set(learns) <= set(get_args(Knowledge)) for stage, learns in cls.stages.items())
    assert cls.kinds <= set(get_args(Kind))
    assert cls.several == ("learns from several teachers" in cls.kinds)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_page_of_a_method_names_every_option_with_its_default(name: str, program: Run) -> None:
    code, out, _ = program("methods", name)
    assert code == 0
    own = [option for option in signature(METHODS[name]).parameters.values() if option.kind is option.KEYWORD_ONLY]
    shown = [line.split()[:2] for line in out.partition("\noptions:")[2].splitlines() if line[:3].strip() and line.startswith("  ")]
    plain_defaults = {option.name: option.default for option in own if isinstance(option.default, bool | int | float | str)}
    assert [option for option, _ in shown] == [option.name for option in own]
    for option, default in shown:
        if option in plain_defaults:
            value = plain_defaults[option]
            assert default == (value if isinstance(value, str) else json.dumps(value))


def test_the_list_has_every_method_in_the_order_of_the_table_and_fits_a_terminal(program: Run, base: Path) -> None:
    for arguments in ((), ("--teacher", base)):
        code, out, _ = program("methods", *arguments)
        lines = out.splitlines()
        assert code == 0
        assert max(map(len, lines)) <= 140
        assert [line.split()[0] for line in lines[1:] if line[:1].strip() and line.split()[0] in METHODS] == list(METHODS)
    assert max(len(line) for line in program("methods", *METHODS)[1].splitlines()) <= 140


def test_rows_of_the_list(program: Run, base: Path) -> None:
    out = program("methods", "--teacher", base)[1].splitlines()
    expected = """\
kd                                    task               .   .   .   x   x    ........  any with the teacher's     4 B a row
  Hinton, Vinyals, Dean 2015, arXiv                                                     task head
  1503.02531""".splitlines()
    start = next(place for place, line in enumerate(out) if line.startswith("kd "))
    assert squeezed(out[start : start + len(expected)]) == squeezed(expected)
    tinybert = next(place for place, line in enumerate(out) if line.startswith("tinybert "))
    stages = [line[36:].split() for line in out[tinybert : tinybert + 3]]
    assert stages[0][:7] == ["general", "x", "x", "x", ".", ".", "1..4...8"]
    assert stages[1][:7] == ["task", "intermediate", "x", "x", "x", ".", "."]
    assert stages[2][:7] == ["task", "prediction", ".", ".", ".", "x", "."]
    assert "kinds: 1 reads intermediate features, 2 reads other features as it goes" in " ".join(out)


def squeezed(lines: list[str]) -> list[str]:
    """Without the widths of columns, which the longest stage of all methods decides."""
    return [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize(
    ("name", "bytes_of"),
    [
        ("task_loss", {}),
        ("kd", {"row": 2 * 2}),  # two classes
        ("dgkd", {"row": 2 * 2}),  # of each teacher
        ("pkd", {"row": 5 * 768 * 2}),  # [CLS] of blocks 2, 4, 6, 8, 10
        ("alp_kd", {"row": 12 * 768 * 2}),  # of all blocks
        ("universal_kd", {"row": 11 * 768 * 2}),  # of all but the last, in either stage
        ("sentence", {"row": 768 * 2}),
        ("marginal_utility", {"row": 10 * 77 * 2}),  # 10 tokens, a tenth of the width
        ("minilmv2", {"token": 768 * 2}),  # q, k, v of block 12 from what enters it
        ("hid_seq", {"token": 6 * 768 * 2}),  # hidden 2, 4, 6, 8, 10, 12
        ("tinybert", {"token": (7 + 6) * 768 * 2}),  # hidden 0, 2, ... 12, and attention of 2, 4, ... 12 from hidden 1, 3, ... 11
    ],
)
def test_bytes_are_those_of_the_smallest_store(name: str, bytes_of: dict[str, int], sentiment_pair: Pair) -> None:
    assert reads(name, sentiment_pair).bytes == bytes_of


def test_bytes_follow_the_head_the_family_and_the_student(tmp_path: Path) -> None:
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "words")
    words = pair_of(tmp_path / "words")
    assert reads("lm_kd", words).bytes == {"labelled token": 768 * 2}  # what the head multiplies, not 30,522 logits
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2
    ).save_pretrained(tmp_path / "llama")
    grouped = pair_of(tmp_path / "llama")
    assert reads("val_kl", grouped).bytes == {"token": 2 * 16 * 2}  # values of blocks 2 and 4: two heads of width 8 each
    assert reads("minilmv2", grouped).bytes == {"token": 64 * 2}
    assert reads("hid_cls", pair_of(tmp_path / "llama", ["num_hidden_layers=1"])).bytes == {"row": 64 * 2}


def test_who_refuses_the_pair_says_why(program: Run, base: Path, sentiment_pair: Pair) -> None:
    with pytest.raises(ValueError, match="refuses: lm_logits needs a student with a head of masked_lm"):
        reads("lm_kd", sentiment_pair)
    with pytest.raises(ValueError, match="what it reads depends on site"):
        reads("match", sentiment_pair)
    code, out, _ = program("methods", "att_mse", "--teacher", base, "--student", "num_attention_heads=6")
    assert code == 0
    assert "refuses: expected equal numbers of attention heads of student and teacher, found 6 and 12" in " ".join(out.split())
    assert "reads  " not in out


def test_json_is_what_is_printed(program: Run, base: Path) -> None:
    code, out, _ = program("methods", "--json", "--teacher", base)
    found = {one["name"]: one for one in json.loads(out)}
    assert code == 0
    assert list(found) == list(METHODS)
    pkd = found["pkd"]
    assert pkd["bytes"] == {"row": 7680}
    assert pkd["reads"] == [f"hidden.{block}@first" for block in (2, 4, 6, 8, 10)]
    assert pkd["stages"] == {"task": ["hidden", "soft", "hard"]}
    assert pkd["kinds"] == ["reads intermediate features", "has parameters of its own"]
    assert pkd["options"]["properties"]["normalise"] == {"default": True, "title": "Normalise", "type": "boolean"}
    assert found["lm_kd"]["refused"].startswith("refuses: ")
    assert "bytes" not in found["lm_kd"]
    assert [one["name"] for one in json.loads(program("methods", "kd", "pkd", "--json")[1])] == ["kd", "pkd"]
    assert "bytes" not in json.loads(program("methods", "kd", "--json")[1])[0]


def test_what_cannot_be_listed_is_one_message(program: Run, base: Path, tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path / "t5")
    for arguments, message in (
        (("pdk",), "unknown method 'pdk'; did you mean 'pkd'?"),
        (("pdk", "--json"), "did you mean 'pkd'?"),
        (("--teacher", tmp_path / "absent"), "expected a Hugging Face model folder, found nothing"),
        (("--teacher", tmp_path / "t5"), "is an encoder-decoder"),
        (("--student", "hidden_size=8"), "--student goes with --teacher"),
        (("--teacher", base, "--student", "hidden_sice=8"), "did you mean 'hidden_size'?"),
        (("--teacher", base, "--student", "hidden_size=7"), "not a multiple of the number of attention heads"),
        (("--teacher", base, "--student", "hidden_size"), "expected key.path=value, found 'hidden_size'"),
        (("--teacher", base, "--student", "num_hidden_layers=0"), "--student: layers: Input should be greater than or equal to 1, found 0"),
    ):
        code, _, err = program("methods", *arguments)
        assert (code, message in err, "Traceback" in err) == (2, True, False), err


def test_options_are_put_in_words() -> None:
    lines = {name: {option: (default, words) for option, default, words in option_lines(METHODS[name])} for name in ("kd", "contrast")}
    assert lines["kd"] == {"alpha": ("0.5", "number >= 0, <= 1"), "temperature": ("2.0", "number > 0 or schedule")}
    assert lines["contrast"]["layers"] == ("uniform", "uniform, last or list of [whole number, whole number] or all")
    assert lines["contrast"]["momentum"] == ("0.5", "number >= 0, < 1")
    assert lines["contrast"]["pooling"] == ("unset", "first, last, mean or unset")
    assert option_lines(METHODS["match"])[0] == ("site", "required", "text")
    assert option_lines(METHODS["task_loss"]) == []
    assert in_words({}) == "anything"
