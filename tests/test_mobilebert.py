"""An inverted-bottleneck teacher and a MobileBERT student: stored = live through a dump, and the students that can be made of either."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import MobileBertConfig, PreTrainedModel, PreTrainedTokenizerFast

from online.batch import Batch, Features, bucket, dense
from online.collate import collate
from online.models import HEADS, LoadedModel, ModelSpec, forward, load_config, load_model
from online.planner import Units
from online.teacher import LiveTeacher
from online.words import Words
from store.features import FeatureKey
from store.manifest import Task
from store.reader import Store
from store.shape import Head
from store.strict import parse
from student_train.blocks import Source
from student_train.blueprint import derived_blueprint
from student_train.bundle import Bundle
from student_train.init import build, check_start
from student_train.methods import parse_method
from student_train.recipe import MethodSpec, StudentSpec
from student_train.teacher import StoredTeacher
from teacher_dump.dump import build_rows, dump
from teacher_dump.recipe import DumpRecipe

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(f"w{number}" for number in range(45))
LAYERS = 3
COMMON = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
          "max_position_embeddings": 48, "embedding_size": 12}  # fmt: skip
TEACHER = {"intra_bottleneck_size": 64, "intermediate_size": 128, "num_feedforward_networks": 1, "normalization_type": "layer_norm",
           "hidden_act": "gelu", "hidden_dropout_prob": 0.1}  # fmt: skip
STUDENT = {"intra_bottleneck_size": 16, "intermediate_size": 32, "num_feedforward_networks": 4, "normalization_type": "no_norm",
           "hidden_act": "relu", "hidden_dropout_prob": 0.0}  # fmt: skip
NO_TASK = Task(kind="none")


def tiny(options: dict[str, Any], head: Head, seed: int) -> PreTrainedModel:
    """A random model with noise on every weight, the embedding of padding included."""
    torch.manual_seed(seed)
    model = HEADS[head].from_config(MobileBertConfig(**COMMON, **options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {f"{word.strip('[]').lower()}_token": word for word in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named)


@dataclass
class World:
    """The teacher on disk, and one store of masked rows to which dumps add passes."""

    folder: Path
    dumped: int = 0

    def recipe(self, name: str, wanted: Iterable[FeatureKey]) -> DumpRecipe:
        rows = {"sources": [{"files": str(self.folder / "text.jsonl")}], "slot_tokens": 512, "objective": "mlm", "mask_probability": 0.4}
        tree = {
            "store": str(self.folder / "store"), "pass_name": name, "batch_tokens": 192, "device": "cpu", "rows": rows,
            "teacher": {"model": str(self.folder / "teacher"), "head": "masked_lm"}, "features": sorted(map(str, wanted)),
        }  # fmt: skip
        return parse(DumpRecipe, tree, "test")

    def answers(self, wanted: frozenset[FeatureKey], padded: int | None) -> tuple[Batch, Features, Features]:
        """Nine rows of one padded length, or all rows, and what store and model answer for them."""
        self.dumped += 1
        dump(self.recipe(f"pass-{self.dumped}", wanted), ("test",))
        store = Store.open(self.folder / "store")
        stored = StoredTeacher(store, f"pass-{self.dumped}", wanted)
        live = LiveTeacher(self.loaded, wanted, Units.average(store.rows))
        mixed = np.random.default_rng(3).permutation(len(store.rows))
        rows = np.array([row for row in mixed if padded in (None, bucket(int(store.rows.columns.length[row])))][: 9 if padded else None])
        batch = collate(store, rows)
        return batch, stored.features(batch, stored.fetch(rows)), live.features(batch, live.fetch(rows))

    @property
    def loaded(self) -> LoadedModel:
        return load_model(ModelSpec(model=self.folder / "teacher", head="masked_lm"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    draw = np.random.default_rng(0)
    lengths = draw.permutation([*range(4, 15)] * 2 + [*range(17, 31)] * 2)  # of 16 and of 32 tokens too, which nothing pads
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": " ".join(draw.choice(WORDS, length))}) for length in lengths))
    tiny(TEACHER, "masked_lm", 1).save_pretrained(folder / "teacher")
    tokenizer().save_pretrained(folder / "teacher")
    world = World(folder)
    build_rows(world.recipe("none", ()), ("test",))
    return world


def keys(*names: str) -> frozenset[FeatureKey]:
    return frozenset(map(FeatureKey.parse, names))


EVERYWHERE = keys(
    *(f"{site}.{i}" for site in ("input", "query", "key", "value", "attention_scores", "attention_probs") for i in (1, 2, 3)),
    *(f"hidden.{i}" for i in range(4)), "final", "head_input@labels", "lm_logits@labels", "lm_logits@labels:top8", "hidden.2@first",
)  # fmt: skip
NARROW = [keys("attention_scores.2"), keys("value.3"), keys("attention_probs.1", "value.1", "lm_logits@labels:top8", "hidden.3@mean")]


@pytest.mark.parametrize("wanted", [EVERYWHERE, *NARROW], ids=["everywhere", "scores", "values", "several"])
def test_what_a_store_answers_is_what_the_live_teacher_answers_to_the_bit(wanted: frozenset[FeatureKey], world: World) -> None:
    _, stored, live = world.answers(wanted, 32)
    assert stored.keys() == live.keys() == wanted
    for key, value in live.items():
        values = (one.logits if isinstance(one, Words) else one for one in (stored[key], value))
        for found, expected in zip(*((one,) if isinstance(one, Tensor) else one for one in values), strict=True):
            assert torch.equal(found, expected), key


def test_the_store_holds_hidden_states_and_the_bottlenecks_that_lead_on_from_them(world: World) -> None:
    world.answers(EVERYWHERE - keys("final", "lm_logits@labels:top8", "hidden.2@first"), 32)
    info = Store.open(world.folder / "store").manifest.passes[f"pass-{world.dumped}"]
    assert {spec.feature.name for spec in info.features} == {f"hidden.{i}" for i in range(4)}
    shapes = {static.name: static.shape for static in info.statics}
    assert shapes["2.bottleneck.weight"] == (64, 32)
    assert shapes["2.bottleneck_norm.bias"] == (64,)
    assert (shapes["2.query.weight"], shapes["2.value.weight"], shapes["head.weight"]) == ((64, 64), (64, 32), (50, 32))


def test_other_padding_moves_features_by_less_than_2e_5(world: World) -> None:
    wanted = keys("hidden.0", "hidden.3", "value.2", "input.3", "head_input@labels")
    batch, stored, live = world.answers(wanted, None)
    assert {bucket(length) for length in batch.lengths.tolist()} == {16, 32}
    assert 16 in batch.lengths.tolist(), "a row that nothing pads but longer ones beside it"
    for key in wanted:
        torch.testing.assert_close(dense(stored, key), dense(live, key), atol=2e-5, rtol=0)


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("minilm", {}), ("minilmv2", {"relation_heads": 8}), ("att_kl", {}), ("hid_seq", {}), ("tinybert", {}), ("lm_kd", {})
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_a_narrow_student_learns_the_same_from_store_and_live_teacher(method: str, options: dict[str, Any], world: World) -> None:
    def learned(features: Features) -> list[Tensor]:
        student = LoadedModel.of(tiny(STUDENT, "masked_lm", 2).train(), "masked_lm")
        torch.manual_seed(2)
        bundle = Bundle(student, [(MethodSpec(name=method), parse_method(method, options, student.shape, world.loaded.shape))])
        torch.manual_seed(3)
        loss, _ = bundle(batch, features, bundle.counts(batch, True), True)
        weights = [weight for weight in bundle.parameters() if weight.requires_grad]
        return [loss.detach(), *(grad for grad in torch.autograd.grad(loss, weights, allow_unused=True) if grad is not None)]

    narrow = LoadedModel.of(tiny(STUDENT, "masked_lm", 2), "masked_lm").shape
    wanted = parse_method(method, options, narrow, world.loaded.shape).teacher_keys
    batch, stored, live = world.answers(wanted, 32)
    found, expected = learned(stored), learned(live)
    assert len(found) == len(expected) > 8
    assert float(expected[0]) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# Students


def made_of(folder: Path, **spec: object) -> LoadedModel:
    """A student of the masked-language model in ``folder``."""
    blueprint = derived_blueprint(StudentSpec.model_validate(spec), Source(folder, "masked_lm"), load_config(folder), NO_TASK)
    check_start(blueprint)
    return build(blueprint, 0).student


def test_either_of_the_pair_is_a_random_student_of_the_others_configuration(world: World, tmp_path: Path) -> None:
    student = made_of(world.folder / "teacher", random={**STUDENT, "classifier_activation": False})
    assert (student.shape.bottleneck, student.shape.head_width, student.wiring.bottleneck_norm) == (16, 4, "affine")
    student.model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert load_model(ModelSpec(model=tmp_path, head="masked_lm")).fingerprint == student.fingerprint
    teacher = made_of(tmp_path, random={**TEACHER, "classifier_activation": True})
    assert teacher.shape == world.loaded.shape
    assert teacher.wiring == world.loaded.wiring


def test_blocks_of_the_teacher_make_a_student_with_its_bottlenecks_and_both_matrices_of_its_head(world: World) -> None:
    student, teacher = made_of(world.folder / "teacher", layers=[1, 3]), world.loaded
    found, expected = student.model.state_dict(), teacher.model.state_dict()
    for name in ("cls.predictions.dense.weight", "cls.predictions.decoder.weight", "mobilebert.embeddings.embedding_transformation.bias"):
        assert torch.equal(found[name], expected[name])
    path = "mobilebert.encoder.layer.{}.bottleneck.attention.dense.weight"
    assert torch.equal(found[path.format(1)], expected[path.format(2)])


def test_a_student_that_transformers_could_not_run_is_refused_by_name(world: World) -> None:
    with pytest.raises(ValueError, match="expected key_query_shared_bottleneck: true or use_bottleneck_attention: true"):
        made_of(world.folder / "teacher", random={"key_query_shared_bottleneck": False})
    with pytest.raises(ValueError, match="unknown option 'true_hidden_size' of mobilebert"):
        made_of(world.folder / "teacher", random={"true_hidden_size": 16})


@pytest.mark.parametrize("head", ["base", "classification", "token_classification", "multiple_choice"])
def test_every_head_starts_from_the_teacher(head: Head, world: World) -> None:
    labels = {"labels": 3} if head in ("classification", "token_classification") else {}
    student = made_of(world.folder / "teacher", layers=[2], head=head, **labels)
    ids = torch.arange(5, 15).reshape(2, 5)
    batch = Batch(torch.arange(2), ids, ids > 0, torch.zeros_like(ids), None, None, None, None, torch.zeros(2, dtype=torch.int64))
    output = forward(student, batch)
    expected = {"classification": (2, 3), "token_classification": (2, 5, 3), "multiple_choice": (2, 1), "base": (2, 5, 32)}
    assert (output.last_hidden_state if head == "base" else output.logits).shape == expected[head]


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        ({}, 24.6),  # transformers' defaults are the published student
        (
            {"intra_bottleneck_size": 1024, "intermediate_size": 4096, "num_feedforward_networks": 1, "normalization_type": "layer_norm",
             "hidden_act": "gelu", "hidden_dropout_prob": 0.1},
            332.3,
        ),
    ],
)  # fmt: skip
def test_the_published_pair_has_the_weights_that_the_layers_add_up_to(options: dict[str, Any], millions: float) -> None:
    config = MobileBertConfig(**options)
    width, intra, inner, networks = 512, config.intra_bottleneck_size, config.intermediate_size, config.num_feedforward_networks
    feed_forward = 2 * intra * inner
    attention = 2 * intra * intra + width * intra + intra * intra  # query, key; value; output
    block = 2 * width * intra + attention + networks * feed_forward + intra * width
    with torch.device("meta"):
        model = HEADS["base"].from_config(config)
    linear = sum(weight.numel() for weight in model.encoder.parameters() if weight.dim() == 2)
    assert linear == 24 * block
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.5)
