"""Chains as data: what is read, refused before anything runs, and printed for a shell."""

import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from student_train.chain import Chain, Step, check
from student_train.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def written(tiny_chain: ModuleType, stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny_chain.write_chain(tmp_path_factory.mktemp("chains") / "written", stores)
    return folder


@pytest.fixture
def folder(written: Path, tiny_chain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The chain of tiny_chain.py, in the folder that commands are started in."""
    made: Path = tiny_chain.copied(written, tmp_path / "work")
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def program(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run ``student-train chain`` in this process: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code: Any = 0
        try:
            main(["chain", *arguments])
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return int(code), out, err

    return call


def test_print_gives_a_command_for_each_step_and_nothing_else(folder: Path, program: Run) -> None:
    code, out, err = program("chain.yaml", "steps.1.nproc=2", "steps.0.nproc=4", "--print")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "teacher-dump run dump.yaml --nproc 4",
        "torchrun --standalone --nproc-per-node=2 -m student_train.cli run train.yaml --phase assistant",
        "teacher-dump run dump.yaml pass_name=assistant teacher.model=out/assistant/student 'ship_layers=[1, 3]'",
        "student-train run train.yaml --phase student",
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["chain.yaml", "dev.jsonl", "dump.yaml", "teacher", "train.jsonl", "train.yaml"]
    )


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"rows": "rows.yaml"}, ["teacher-dump", "rows", "rows.yaml"]),
        ({"augment": "a.yaml", "set": ["augment.copies=2"]}, ["teacher-dump", "augment", "a.yaml", "augment.copies=2"]),
        ({"dump": "d.yaml"}, ["teacher-dump", "run", "d.yaml"]),
        ({"add": "d.yaml", "nproc": 2}, ["teacher-dump", "add", "d.yaml", "--nproc", "2"]),
        ({"train": "my recipes/t.yaml", "set": ["seed=3"]}, ["student-train", "run", "my recipes/t.yaml", "seed=3"]),
        ({"train": "t.yaml", "phase": "kd"}, ["student-train", "run", "t.yaml", "--phase", "kd"]),
    ],
)
def test_a_step_is_a_command_line(step: dict[str, object], words: list[str]) -> None:
    made = Step.model_validate(step)
    assert made.words == words
    assert shlex.split(shlex.join(made.words)) == words


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({}, "steps.0: expected exactly one of rows, augment, generate, dump, add, train; given: none"),
        (
            {"dump": "dump.yaml", "train": "train.yaml"},
            "expected exactly one of rows, augment, generate, dump, add, train; given: dump, train",
        ),
        ({"trian": "train.yaml"}, "unknown key 'steps.0.trian'; did you mean 'train'?"),
        ({"dump": "dump.yaml", "phase": "assistant"}, "phase goes with train, not with dump"),
        ({"rows": "dump.yaml", "nproc": 2}, "nproc goes with dump, add, train, not with rows"),
        ({"augment": "dump.yaml", "nproc": 2}, "nproc goes with dump, add, train, not with augment"),
        ({"train": "train.yaml", "nproc": 2}, "several ranks train one phase: give its name"),
        ({"dump": "dump.yaml", "nproc": 0}, "steps.0.nproc"),
        ({"dump": "dump.yaml", "set": ["--nproc=2"]}, "steps.0.set.0: expected key.path=value, found '--nproc=2'"),
        ({"dump": "dump.yaml", "set": ["dtype"]}, "steps.0.set.0: expected key.path=value, found 'dtype'"),
        ({"dump": "dump.yaml", "set": "dtype=float16"}, "steps.0.set"),
        ({"dump": "absent.yaml"}, "step 1 of 1: no such recipe: absent.yaml"),
        ({"dump": "teacher"}, "step 1 of 1: expected a YAML file, found a folder: teacher"),
        ({"rows": "broken.yaml"}, "step 1 of 1: broken.yaml is not a YAML file"),
        ({"add": "list.yaml"}, "step 1 of 1: list.yaml: expected a mapping of options, found list"),
        ({"dump": "dump.yaml", "set": ["rows.sources.7.limit=1"]}, "step 1 of 1: 'rows.sources.7.limit=1': expected an item from 0 to 1"),
        ({"dump": "dump.yaml", "set": ["teacher.model=gone"]}, "step 1 of 1: teacher.model: expected a folder, or the student of an"),
        ({"train": "dump.yaml"}, "step 1 of 1: dump.yaml: output: required, not given"),
        ({"train": "train.yaml", "set": ["phases.0.stepz=1"]}, "unknown key 'phases.0.stepz'; did you mean 'steps'?"),
        ({"train": "train.yaml", "phase": "asistant"}, "step 1 of 1: the recipe has no phase 'asistant'; did you mean 'assistant'?"),
    ],
)
def test_a_bad_step_is_one_message_before_anything_runs(step: dict[str, object], message: str, folder: Path, program: Run) -> None:
    (folder / "broken.yaml").write_text("a: [")
    (folder / "list.yaml").write_text("- a\n")
    (folder / "bad.yaml").write_text(yaml.safe_dump({"steps": [step]}))
    before = sorted(folder.iterdir())
    for only_print in ([], ["--print"]):
        code, out, err = program("bad.yaml", *only_print)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert message in err
    assert sorted(folder.iterdir()) == before


def test_what_is_no_chain_is_refused(folder: Path, program: Run) -> None:
    for text, message in (
        ("", "expected a mapping of options"),
        ("steps: []", "steps"),
        ("step: [{dump: dump.yaml}]", "unknown key 'step'; did you mean 'steps'?"),
        ("steps: {dump: dump.yaml}", "steps"),
    ):
        (folder / "bad.yaml").write_text(text)
        code, _, err = program("bad.yaml")
        assert code == 2
        assert message in err
    assert program("absent.yaml")[0] == 2
    assert program("chain.yaml", "steps.9.nproc=2")[0] == 2


def test_a_teacher_may_be_what_an_earlier_step_trains_and_no_later_one(folder: Path) -> None:
    chain = Chain.model_validate(yaml.safe_load((folder / "chain.yaml").read_text()))
    check(chain)
    early = chain.model_copy(update={"steps": (chain.steps[2], chain.steps[1])})
    with pytest.raises(ValueError, match=r"step 1 of 2: teacher.model: .* \(none\); found nothing at out/assistant/student"):
        check(early)
    all_phases = Step.model_validate({"train": "train.yaml"})
    check(chain.model_copy(update={"steps": (all_phases, chain.steps[2])}))
    misspelt = Step.model_validate({"dump": "dump.yaml", "set": ["teacher.model=out/asistant/student"]})
    with pytest.raises(ValueError, match=r"\(out/assistant/student\); found nothing at out/asistant/student"):
        check(chain.model_copy(update={"steps": (chain.steps[1], misspelt)}))
    elsewhere = Step.model_validate({"train": "train.yaml", "phase": "assistant", "set": ["output=elsewhere"]})
    with pytest.raises(ValueError, match=r"\(elsewhere/assistant/student\); found nothing at out/assistant/student"):
        check(chain.model_copy(update={"steps": (elsewhere, chain.steps[2])}))


def test_a_rank_of_a_launch_starts_no_chain(folder: Path, program: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    code, _, err = program("chain.yaml")
    assert (code, "start it once, without a launcher" in err) == (2, True)
    assert not (folder / "features").exists()
