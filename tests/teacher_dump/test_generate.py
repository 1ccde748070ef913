"""`teacher-dump generate`: what a causal teacher writes to prompts is its own, the same each time and however often it is stopped."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from online.rows import iter_groups
from online.rows_spec import RowsSpec
from store.errors import FingerprintMismatch, StoreBusy
from store.strict import parse
from teacher_dump import generate as module
from teacher_dump.augmented_file import whole
from teacher_dump.generate import GenerateRecipe, generate

sys.path.insert(0, str(Path(__file__).parents[1] / "student_train"))
from tiny_answers import llama, write_model

NEW, SEED = 7, 5
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w2 w2", "w10 w11 w12 w13 w14 w15 w16 w17 w18", "w0 w20"]
"""All but the fifth have up to six tokens."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "teacher", llama(), 4)
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    return folder


def recipe(world: Path, output: Path, **changes: Any) -> GenerateRecipe:  # noqa: ANN401
    made = {
        "output": str(output), "sources": [{"files": str(world / "prompts.jsonl")}], "device": "cpu", "max_prompt": 6, "batch_rows": 2,
        "teacher": {"model": str(world / "teacher"), "head": "causal_lm"}, "max_new_tokens": NEW, "seed": SEED,
    }  # fmt: skip
    return parse(GenerateRecipe, made | changes, "recipe")


def by_hand(world: Path, prompt: str, temperature: float, top_p: float, drawn: list[float]) -> tuple[str, bool]:
    """A response word by word, alone, without a cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world / "teacher").eval(), AutoTokenizer.from_pretrained(world / "teacher")
    tokens: list[int] = tokenizer(prompt)["input_ids"]
    start = len(tokens)
    for number in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1].double()
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            probs = (logits / temperature).softmax(-1).tolist()
            kept, mass = set[int](), 0.0
            for word in sorted(range(len(probs)), key=lambda one: -probs[one]):
                if mass < top_p:
                    kept.add(word)
                    mass += probs[word]
            left, word = drawn[number] * mass, -1
            for candidate in sorted(kept):
                word = candidate
                left -= probs[candidate]
                if left < 0:
                    break
            tokens.append(word)
        if tokens[-1] == 2:
            return tokenizer.decode(tokens[start:-1], skip_special_tokens=True), True
    return tokenizer.decode(tokens[start:], skip_special_tokens=True), False


@pytest.mark.parametrize(("temperature", "top_p", "samples"), [(0.0, 1.0, 1), (0.8, 1.0, 2), (1.2, 0.6, 2)])
def test_responses_are_the_teachers_own(temperature: float, top_p: float, samples: int, world: Path, tmp_path: Path) -> None:
    made = recipe(world, tmp_path / "out.parquet", temperature=temperature, top_p=top_p, samples=samples)
    said = generate(made)
    assert f"{5 * samples} responses to 5 prompts; 1 prompts of more than 6 tokens" in said
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    asked = [(number, sample) for number in range(6) if number != 4 for sample in range(samples)]
    assert [(row["original"], row["sample"]) for row in found] == asked
    for row, (number, sample) in zip(found, asked, strict=True):
        drawn = np.random.default_rng([SEED, number, sample]).random(NEW).tolist()
        expected = by_hand(world, PROMPTS[number], temperature, top_p, drawn)
        assert (row["prompt"], row["response"], row["ended"]) == (PROMPTS[number], *expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet"]


def test_a_run_that_was_stopped_goes_on_to_the_same_file(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 1)
    made, again = (recipe(world, tmp_path / name / "out.parquet", temperature=1.0) for name in ("one", "other"))
    generate(made)
    written, write = [], module.write_part

    def stopped(path: Path, rows: Any, of: Any) -> None:  # noqa: ANN401
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, rows, of)

    monkeypatch.setattr(module, "write_part", stopped)
    with pytest.raises(KeyboardInterrupt):
        generate(again)
    assert not again.output.exists()
    assert written == ["000000.parquet"]
    written.append("stands for the other")
    assert len(list(again.output.parent.iterdir())) == 1, "the parts, and nothing else"
    generate(again)
    assert written[2:] == ["000001.parquet", "000002.parquet"], "the first part was made once"
    assert again.output.read_bytes() == made.output.read_bytes()
    assert [path.name for path in again.output.parent.iterdir()] == ["out.parquet"]


def test_a_finished_file_is_left_alone_and_one_of_another_recipe_is_refused(world: Path, tmp_path: Path) -> None:
    made = recipe(world, tmp_path / "out.parquet")
    generate(made)
    before = made.output.read_bytes()
    assert "5 responses, nothing was left to do" in generate(made)
    with pytest.raises(FingerprintMismatch, match="was made with another max_new_tokens: expected 7"):
        generate(recipe(world, tmp_path / "out.parquet", max_new_tokens=8))
    assert made.output.read_bytes() == before


def test_one_process_at_a_time_writes_a_file(world: Path, tmp_path: Path) -> None:
    with whole(tmp_path / "out.parquet"), pytest.raises(StoreBusy, match="another process is writing"):
        generate(recipe(world, tmp_path / "out.parquet"))


def test_rows_of_the_students_own_tokenizer_are_made_of_the_text(world: Path, tmp_path: Path) -> None:
    generate(recipe(world, tmp_path / "out.parquet", temperature=1.0))
    spec = {"sources": [{"files": str(tmp_path / "out.parquet")}], "text": "{prompt} {response}", "response": "response",
            "objective": "causal", "max_length": 32}  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(world / "teacher")
    rows = [row for group in iter_groups(parse(RowsSpec, spec, "rows"), tokenizer) for row in group]
    texts = [f"{row['prompt']} {row['response']}".split() for row in pq.read_table(tmp_path / "out.parquet").to_pylist()]
    assert [tokenizer.convert_ids_to_tokens(row.input_ids.tolist()) for row in rows] == [[*text, "<eos>"] for text in texts]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 2}, "samples and top_p are of words that are drawn: give a temperature above 0"),
        ({"output": "out.jsonl"}, r"ends in \.parquet"),
        ({"prompt": "none"}, "prompt: expected a column name between braces"),
        ({"teacher": {"model": "teacher", "head": "masked_lm"}}, "teacher.head: expected causal_lm, found masked_lm"),
    ],
)
def test_what_no_file_can_be_made_of_is_refused(changes: dict[str, Any], message: str, world: Path, tmp_path: Path) -> None:
    made = recipe(world, tmp_path / "out.parquet").model_dump(mode="json")
    with pytest.raises(ValueError, match=message):
        parse(GenerateRecipe, made | changes, "recipe")


def test_prompts_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes rows of up to 64 tokens"):
        generate(recipe(world, tmp_path / "out.parquet", max_new_tokens=60))
    with pytest.raises(ValueError, match="no chat template"):
        generate(recipe(world, tmp_path / "out.parquet", chat=True))
