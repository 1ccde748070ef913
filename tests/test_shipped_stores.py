"""The shipped dumps hold all that the shipped training recipes read of them, and the blocks that their students start from."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig

from online.models import load_config
from online.planner import plan, uncovered
from online.skeleton import of_config
from store.features import FeatureKey
from store.strict import load_yaml
from student_train.needs import needs
from student_train.recipe import TrainRecipe
from student_train.sweep import Sweep, trials
from teacher_dump.recipe import DumpRecipe
from teacher_dump.selection import resolve
from teacher_dump.ship import shipped_blocks

RECIPES = Path(__file__).parents[1] / "recipes"
FOLDERS = ("methods", "sst2", "wikipedia", "domains")
"""Their recipes share the stores that they name; the recipes of other folders have stores of their own."""
BLOCKS = {Path("out/sst2/second/teacher/student"): 4, Path("teachers/mnli"): 12}
"""Of teachers that have not 6."""
HEADS = {"classification": "BertForSequenceClassification", "masked_lm": "BertForMaskedLM"}


def recipes(key: str) -> list[Path]:
    """The shipped recipes that have this key."""
    found = sorted(path for folder in FOLDERS for path in (RECIPES / folder).glob("*.yaml"))
    return [path for path in found if f"\n{key}:" in f"\n{path.read_text(encoding='utf-8')}"]


@pytest.fixture
def dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, DumpRecipe]:
    """The shipped dumps by their pass, and a folder with configurations of their teachers: as many blocks and heads as these have."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for path in recipes("features"):
        recipe = load_yaml(DumpRecipe, path)
        blocks = BLOCKS.get(recipe.teacher.model, 6)
        sizes = {"num_hidden_layers": blocks, "num_attention_heads": 12, "hidden_size": 384, "vocab_size": 500}
        BertConfig(architectures=[HEADS[recipe.teacher.head]], **sizes).save_pretrained(recipe.teacher.model)
        found[recipe.pass_name] = recipe
    return found


def test_shipped_dumps_hold_what_shipped_recipes_read(dumps: dict[str, DumpRecipe]) -> None:
    folders = {name: recipe.teacher.model for name, recipe in dumps.items()}
    shared = [f"recipe={RECIPES / 'sweeps' / 'train.yaml'}", "seeds=[0]"]
    tried = [trial for name in ("sst2", "search") for trial in trials(load_yaml(Sweep, RECIPES / "sweeps" / f"{name}.yaml", shared))]
    assert len(tried) == 16 + 15
    lines = needs([*(load_yaml(TrainRecipe, path) for path in recipes("phases")), *(trial.recipe for trial in tried)], folders)
    wanted = {document["pass_name"]: document for document in yaml.safe_load_all(lines)}
    assert {"sst2", "second", "mlm", "words", "factual", "counterfactual"} <= wanted.keys()
    for name, document in wanted.items():
        recipe = dumps[name]
        with torch.device("meta"):
            described = of_config(recipe.teacher, load_config(recipe.teacher.model))
        requests = resolve(recipe, described.shape, None)
        kept = plan({request.key: request.dtype for request in requests}, described.shape, described.wiring)
        keys = [FeatureKey.parse(text) for text in document["features"]]
        assert not uncovered(keys, kept.stored, kept.statics, described.shape, described.wiring), f"{name}: add them to its dump"
        assert document["store"] == str(recipe.store)
        assert document.get("intervention") == (recipe.intervention and recipe.intervention.model_dump(mode="json"))
        assert set(document.get("ship_layers", ())) <= set(shipped_blocks(recipe.ship_layers, described.shape.layers))


def test_no_feature_of_the_two_stores_for_all_methods_is_left_to_spare(dumps: dict[str, DumpRecipe]) -> None:
    """One array for each state and one for the logits: what else the recipes name costs nothing."""
    for name, logits in (("sst2", "task_logits@row"), ("mlm", "lm_logits@labels:select")):
        recipe = dumps[name]
        with torch.device("meta"):
            described = of_config(recipe.teacher, load_config(recipe.teacher.model))
        requests = {request.key: request.dtype for request in resolve(recipe, described.shape, None)}
        stored = set(map(str, plan(requests, described.shape, described.wiring).stored))
        last = {"final@all", "hidden.6@all"} & stored  # two words for it
        assert len(last) == 1
        assert stored == {*(f"hidden.{block}@all" for block in range(6)), *last, logits}
