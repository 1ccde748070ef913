"""What is printed of kept words: bytes, and the error of the gradient that a student would get from them."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_dump import Outcome, Tree

sys.path.insert(0, str(Path(__file__).parents[1] / "student_train" / "golden"))

from given import CLM, LLAMA, SMALL_LLAMA, shape

from online.batch import Batch
from online.word_forms import in_form
from store import Store
from store.features import FeatureKey
from store.forms import word_form
from student_train.methods import parse_method
from teacher_dump.records import ERRORS, WORD_ERRORS, read_word_errors
from teacher_dump.word_errors import Sums

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]

OPTIONS: dict[str, dict[str, object]] = {
    "top4": {"top": 4},
    "top8p7": {"top": 8, "nucleus": 0.7},
    "top3band2": {"top": 3, "bands": 2},
    "draw9": {"draws": 9},
    "draw9tau80": {"draws": 9, "tau": 0.8},
    "top2draw5x2": {"top": 2, "draws": 5, "samples": 2},
}


@pytest.mark.parametrize("form", OPTIONS)
def test_the_error_is_that_of_the_gradient_of_lm_kd(form: str) -> None:
    """Gradients by automatic differentiation of the method's own loss, against p - t of the whole prediction."""
    logits = torch.randn(60, 11, generator=torch.Generator().manual_seed(3)) * 2
    named = word_form(form)
    assert named is not None
    kept = in_form(named, logits, torch.arange(60) * 7919)
    method = parse_method("lm_kd", OPTIONS[form], shape(SMALL_LLAMA, *CLM), shape(LLAMA, *CLM))
    labels = torch.zeros(60, 1, dtype=torch.int64)
    batch = Batch(torch.arange(60), labels, labels == 0, None, None, None, labels, None, torch.arange(60))
    leaf = (logits / 2).requires_grad_()
    (key,) = method.teacher_keys
    method({FeatureKey("lm_logits", positions="labels"): leaf}, {key: kept}, batch)["words"].backward()
    assert leaf.grad is not None
    found = leaf.grad.double().numpy()
    exact = (leaf.detach().double().softmax(-1) - logits.double().softmax(-1)).numpy()
    sums = Sums(named)
    sums.add(logits[:25], type(kept)(*(column[:25] for column in kept)))
    sums.add(logits[25:], type(kept)(*(column[25:] for column in kept)))
    error = sums.error()
    assert error.tokens == 60
    assert error.error == pytest.approx(np.linalg.norm(found - exact) / np.linalg.norm(exact), rel=1e-4)
    assert error.norm == pytest.approx(np.linalg.norm(found) / np.linalg.norm(exact), rel=1e-4)
    means = [side.mean(0) for side in (found, exact)]
    assert error.mean_error == pytest.approx(np.linalg.norm(means[0] - means[1]) / np.linalg.norm(means[1]), rel=1e-4)
    cosines = (found * exact).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1))
    assert error.angle == pytest.approx(np.degrees(np.arccos(cosines)).mean(), rel=1e-3)
    assert (error.kl is None) == ("draw" in form)


def test_the_kl_is_to_a_tail_that_is_spread_evenly() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(3)) * 2
    named = word_form("top4")
    assert named is not None
    sums = Sums(named)
    sums.add(logits, in_form(named, logits, torch.arange(5)))
    total = 0.0
    for t in logits.double().softmax(-1).numpy():
        rest = sorted(t)[:-4]
        total += sum(share * np.log(share * len(rest) / sum(rest)) for share in rest)
    assert sums.error().kl == pytest.approx(total / 5, rel=1e-6)


def table_of(text: str) -> dict[str, list[str]]:
    """Feature -> the cells of its line below the heading."""
    lines = text[text.index("words kept, against the whole prediction") :].splitlines()
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[1:]]
    return {cells[0]: cells for cells in rows if len(cells) > 4 and cells[0].startswith("lm_logits")}


@pytest.mark.parametrize(("form", "unit"), [("top2draw3", "16 B"), ("draw9", "at most 27 B"), ("top4p9", "at most 20 B")])
def test_plan_run_and_verify_say_how_near_kept_words_come(
    form: str, unit: str, masked_recipe: Tree, write: Write, teacher_dump: Run
) -> None:
    key = f"lm_logits@labels:{form}"
    recipe, store = write({**masked_recipe, "features": [key], "dtype": "float16"}), Path(masked_recipe["store"])
    printed = []
    if form == "draw9":
        planned = teacher_dump("plan", recipe)
        assert planned.code == 0, planned.err
        assert not store.exists()
        printed.append(planned.out)
    ran = teacher_dump("run", recipe)
    assert ran.code == 0, ran.err
    (spec,) = Store.open(store).manifest.passes["bert"].features
    assert spec.compressed == (form != "top2draw3")
    recorded = read_word_errors(store, "bert")
    checked = teacher_dump("verify", store)
    assert checked.code == 0, checked.err
    assert "measuring again takes head_input" in checked.out
    for text in (*printed, ran.out, checked.out):
        (line,) = table_of(text).values()
        assert line[:2] == [key, unit]
        assert float(line[2]) == pytest.approx(recorded[key].error, rel=0.06)


@pytest.mark.parametrize("form", ["top4", "top4p9", "top2band3", "draw9", "top2draw3"])
def test_what_follows_from_the_store_is_measured_again_from_it_alone(
    form: str, masked_recipe: Tree, write: Write, teacher_dump: Run
) -> None:
    key = f"lm_logits@labels:{form}"
    recipe = write({**masked_recipe, "features": ["head_input@labels", key], "dtype": "float32"})
    assert teacher_dump("run", recipe).code == 0
    store = Path(masked_recipe["store"])
    file = store / "model" / "bert" / WORD_ERRORS
    recorded = read_word_errors(store, "bert")
    assert json.loads((file.parent / ERRORS).read_text())[key] < 1e-5
    forged = {key: {**value, "error": 77.0} for key, value in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(forged))
    checked = teacher_dump("verify", store)
    assert checked.code == 0, checked.err
    (line,) = table_of(checked.out).values()
    assert line[1] == "derived"
    assert float(line[2]) == pytest.approx(recorded[key].error, rel=0.06)
    assert "measuring again" not in checked.out
