"""recipes/mobilebert on a tiny pair: a teacher from nothing, its answers, a student that learns block by block, then words, then a task."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from online.models import load_config
from store.strict import load_yaml
from student_train.journal import read_journal
from student_train.recipe import TrainRecipe
from student_train.run import run
from teacher_dump.dump import build_rows, dump
from teacher_dump.recipe import DumpRecipe

RECIPES = Path(__file__).parents[1] / "recipes" / "mobilebert"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(f"w{number}" for number in range(45))
LAYERS, STEPS = 3, 60
SMALL = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "embedding_size": 12, "intra_bottleneck_size": 64,
         "intermediate_size": 128}  # fmt: skip
"""What is set of the teacher; all else stands in its recipe."""
pytestmark = pytest.mark.slow


def learn(recipe: str, *changes: str) -> TrainRecipe:
    made = load_yaml(TrainRecipe, RECIPES / recipe, changes)
    run(made, ("test",))
    return made


def phase(number: int, steps: int, rate: float) -> list[str]:
    """A phase of few steps in small batches on a CPU."""
    at = f"phases.{number}"
    trainer = {"learning_rate": rate, "logging_steps": 1, "disable_tqdm": True, "report_to": "none", "use_cpu": True}
    loop = {"steps": steps, "batch_rows": 16, "accumulation": 1, "epochs": "null"}
    return [f"{at}.{name}={value}" for name, value in loop.items()] + [
        *(f"{at}.trainer.{name}={json.dumps(value)}" for name, value in trainer.items()),
        f"{at}.trainer.bf16=false",
        f"{at}.trainer.warmup_steps=0",
    ]


@dataclass
class Chain:
    """A folder in which all recipes of the chain have run."""

    folder: Path

    def weights(self, *path: str) -> dict[str, Tensor]:
        return load_file(self.folder.joinpath("out", "mobilebert", *path, "student", "model.safetensors"))

    def history(self, *path: str) -> list[dict[str, float]]:
        return read_journal(self.folder.joinpath("out", "mobilebert", *path, "metrics.jsonl"))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_world()
        few = ["rows.max_length=24", "rows.slot_tokens=512", "device=cpu"]
        build_rows(load_yaml(DumpRecipe, RECIPES / "rows.yaml", few), ("test",))
        sizes = [f"phases.0.student.random.{name}={value}" for name, value in SMALL.items()]
        learn("teacher.yaml", *sizes, *phase(0, 80, 3e-3))
        dump(load_yaml(DumpRecipe, RECIPES / "dump.yaml", few), ("test",))
        narrow = ["phases.0.student.random.intra_bottleneck_size=16", "phases.0.student.random.intermediate_size=32"]
        steps = [*phase(0, STEPS, 3e-3), *phase(1, 30, 1e-3), *phase(2, 10, 1e-3)]
        learn("student.yaml", *narrow, *steps)
    return Chain(folder)


def write_world() -> None:
    """Texts in which a word is often followed by the next one, sentences of two classes, and a folder with configuration and tokenizer."""
    draw = np.random.default_rng(0)

    def text() -> str:
        first, length = int(draw.integers(45)), int(draw.integers(6, 20))
        return " ".join(WORDS[(first + place) % 45] if draw.random() < 0.9 else draw.choice(WORDS) for place in range(length))

    for name, rows in (("train", 160), ("valid", 32)):
        path = Path(f"data/corpus/wikipedia_{name}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [text() for _ in range(rows)]}), path)
    base = Path("out/mobilebert/base")
    base.mkdir(parents=True)
    config = json.loads((RECIPES / "config.json").read_text()) | {"vocab_size": len(SPECIAL) + len(WORDS)}
    (base / "config.json").write_text(json.dumps(config))
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    named = {f"{word.strip('[]').lower()}_token": word for word in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=inner, **named).save_pretrained(base)
    sentences = [json.dumps({"text": text(), "label": number % 2}) for number in range(48)]
    Path("sentences.jsonl").write_text("\n".join(sentences))
    source = {"files": ["sentences.jsonl"]}
    tree = {
        "store": "out/sst2/features", "pass_name": "none", "teacher": {"model": str(base), "head": "base"},
        "rows": {"sources": [{**source, "split": "train"}, {**source, "split": "dev"}], "max_length": 24, "slot_tokens": 512,
                 "label": {"column": "label", "classes": ["negative", "positive"]}},
    }  # fmt: skip
    build_rows(DumpRecipe.model_validate(tree), ("test",))


def test_the_teacher_learned_words(chain: Chain) -> None:
    losses = [entry["loss"] for entry in chain.history("teacher", "pretraining") if "loss" in entry]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])


def test_each_block_learns_its_teachers_block_in_its_slice(chain: Chain) -> None:
    losses = [entry["loss"] for entry in chain.history("student", "transfer") if "loss" in entry]
    assert len(losses) == STEPS
    for block in range(LAYERS):
        own = losses[block * STEPS // LAYERS : (block + 1) * STEPS // LAYERS]
        assert np.mean(own[-4:]) < 0.8 * np.mean(own[:4]), block


def test_what_is_no_block_is_still_the_teachers_after_the_transfer(chain: Chain) -> None:
    teacher, student = chain.weights("teacher", "pretraining"), chain.weights("student", "transfer")
    outside = {name for name in teacher if ".encoder.layer." not in name}
    assert outside == {name for name in student if ".encoder.layer." not in name}
    norm = {name for name in outside if ".embeddings.LayerNorm." in name}
    assert len(norm) == 2
    assert all(torch.equal(student[name], teacher[name]) for name in outside - norm)
    fresh = {name: torch.ones(32) if name.endswith("weight") else torch.zeros(32) for name in norm}
    assert all(torch.equal(student[name], fresh[name]) for name in norm)


def test_distillation_brings_the_student_nearer_to_the_teachers_words(chain: Chain) -> None:
    history = chain.history("student", "distillation")
    far = [entry["eval_teacher_kl"] for entry in history if "eval_teacher_kl" in entry]
    assert far[-1] < far[0]
    assert {"lm_kd/words", "lm_loss/words"} <= history[0].keys()


def test_the_fine_tuned_student_is_a_plain_folder_with_the_published_kinds_of_layers(chain: Chain) -> None:
    folder = chain.folder / "out" / "mobilebert" / "student" / "fine_tuning" / "student"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (model.config.normalization_type, model.config.num_feedforward_networks, model.config.hidden_act) == ("no_norm", 4, "relu")
    assert model.config.trigram_input
    assert torch.isfinite(model(torch.tensor([[2, 7, 8, 3]])).logits).all()
    teacher = load_config(chain.folder / "out" / "mobilebert" / "teacher" / "pretraining" / "student")
    assert (teacher.normalization_type, teacher.num_feedforward_networks, teacher.hidden_act) == ("layer_norm", 1, "gelu")
