"""The chains of recipes/how_to_distill: what each step asks for, and that one store of a tiny teacher serves all of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from store.strict import load_yaml
from student_train.chain import Chain, Step, check
from student_train.recipe import PhaseSpec, TrainRecipe
from student_train.run import check as check_phases

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "how_to_distill"
OBJECTIVES = {
    "hid_cls": ["hid_cls"],
    "hid_seq": ["hid_seq"],
    "hid_cls_contrast": ["contrast"],
    "att_mse": ["att_mse"],
    "att_kl": ["att_kl"],
    "val_kl": ["val_kl"],
    "att_mse_hid_seq": ["att_mse", "hid_seq"],
    "att_kl_hid_seq": ["att_kl", "hid_seq"],
    "att_kl_val_kl": ["att_kl", "val_kl"],
}
STARTS = {
    "chain.yaml": {"4_8_12": (4, 8, 12), "1_8_12": (1, 8, 12), "1_2_3": (1, 2, 3), "random": None},
    "chain6.yaml": {"2_4_6": (2, 4, 6), "1_4_6": (1, 4, 6), "1_2_3": (1, 2, 3), "random": None},
}
PAIRS = {"chain.yaml": [[1, 4], [2, 8], [3, 12]], "chain6.yaml": [[1, 2], [2, 4], [3, 6]]}


def steps(chain: str) -> list[Step]:
    return list(load_yaml(Chain, FOLDER / chain).steps)


def trainings(chain: str, recipe: str) -> dict[str, TrainRecipe]:
    """Name of the output -> the recipe as the chain sets it."""
    found = [load_yaml(TrainRecipe, ROOT / step.train, step.set) for step in steps(chain) if step.train and step.train.name == recipe]
    return {one.output.name: one for one in found}


def starting(recipe: TrainRecipe) -> list[PhaseSpec]:
    return [phase for phase in recipe.phases if phase.student.phase is None]


@pytest.mark.parametrize("chain", STARTS)
def test_every_start_of_the_task_has_ten_objectives_of_ten_epochs_and_then_the_prediction(chain: str) -> None:
    found = trainings(chain, "train.yaml")
    assert list(found) == list(STARTS[chain])
    for recipe in found.values():
        vanilla, *phases = recipe.phases
        assert vanilla.name == "vanilla_kd"
        prediction = vanilla.methods
        assert [(spec.name, spec.options) for spec in prediction] == [("kd", {"alpha": 0.5, "temperature": 2.0})]
        assert [phase.name for phase in phases[1::2]] == list(OBJECTIVES)
        for objective, last in zip(phases[::2], phases[1::2], strict=True):
            assert [spec.name for spec in objective.methods] == OBJECTIVES[last.name]
            assert last.student.phase == objective.name
            assert last.methods == prediction
        assert {phase.epochs for phase in recipe.phases} == {10}


@pytest.mark.parametrize("chain", STARTS)
def test_one_option_of_a_step_starts_all_students_of_it_and_maps_their_blocks(chain: str) -> None:
    for name, recipe in trainings(chain, "train.yaml").items():
        layers = STARTS[chain][name]
        assert {phase.student.layers for phase in starting(recipe)} == {layers}
        assert all((phase.student.random == {"num_hidden_layers": 3}) == (layers is None) for phase in starting(recipe))
        inner = [spec for phase in starting(recipe)[1:] for spec in phase.methods if spec.name != "contrast"]
        assert len(inner) == 11
        assert all(spec.options["layers"] == ("same_as_init" if layers else PAIRS[chain]) for spec in inner)


def test_the_steps_of_the_second_chain_read_the_store_that_its_dump_writes() -> None:
    dump, *others = steps("chain6.yaml")
    assert "store=out/how_to_distill6/features" in dump.set
    assert len({one.output for one in trainings("chain6.yaml", "train.yaml").values()}) == len(others) == 4
    for recipe in trainings("chain6.yaml", "train.yaml").values():
        read = {str(data.store) for phase in recipe.phases for data in (*phase.data, *phase.evaluate)}
        assert read == {"out/how_to_distill6/features"}


def test_general_text_is_learned_from_the_last_block_by_two_starts() -> None:
    found = trainings("chain.yaml", "agnostic.yaml")
    assert [(name, recipe.phases[0].student.layers) for name, recipe in found.items()] == [
        ("agnostic_first_6", "first 6"),
        ("agnostic_random", None),
    ]
    for recipe in found.values():
        expected = [name for name in OBJECTIVES if name != "hid_cls_contrast"]
        assert [phase.name for phase in recipe.phases[3::2]] == expected
        inner = [spec for phase in starting(recipe)[1:] for spec in phase.methods]
        assert {spec.options["layers"] for spec in inner} == {"last"}
        assert {(phase.steps, phase.batch_rows) for phase in starting(recipe)} == {(100_000, 1024)}


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
def test_one_store_serves_every_objective_and_start_and_an_objective_is_followed_by_the_prediction(
    tiny_teachers: Callable[..., Path], run_program: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_teachers(12, sst2_base="classification", bert_base="masked_lm")
    monkeypatch.chdir(folder)
    check(load_yaml(Chain, FOLDER / "chain.yaml"))
    few = ["rows.sources.0.limit=60", "rows.sources.1.limit=12", "dtype=float32"]
    for step in steps("chain.yaml"):
        if step.train is None:
            program, *words = step.words
            run_program(folder, program.replace("-", "_"), *words, *few)
    for chain, recipe in (("chain.yaml", "train.yaml"), ("chain.yaml", "agnostic.yaml")):
        for training in trainings(chain, recipe).values():
            short = [phase.model_copy(update={"steps": 3, "epochs": None, "batch_rows": 8}) for phase in training.phases]
            check_phases(training, short)
    limits = [f"phases.{number}.{option}" for number in (7, 8) for option in ("epochs=null", "steps=3")]
    for phase in ("att_mse_intermediate", "att_mse"):
        run_program(folder, "student_train", "run", str(FOLDER / "train.yaml"), *limits, "--phase", phase)
    student = folder / "out" / "how_to_distill" / "4_8_12" / "att_mse" / "student"
    assert json.loads((student / "config.json").read_text())["num_hidden_layers"] == 3
