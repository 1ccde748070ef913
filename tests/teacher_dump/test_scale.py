"""The formulas of docs/scale.md: against what is measured at tiny size, against derivations by hand, and at sizes that are not here."""

import json
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_dump import Outcome, Tree, World
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, PreTrainedConfig

from online.batch import IGNORED, Batch
from online.machines import gpu_reserve, parse_machine
from online.models import HEADS, LoadedModel, load_config, model_shape
from online.planner import Units
from online.sharding import Sharding
from online.sizes import GATHERED, held
from store import Store
from store.provenance import provenance
from teacher_dump.amount import Amount
from teacher_dump.choices import advised, batch_bytes, choices, shardings
from teacher_dump.recipe import DumpRecipe
from teacher_dump.scale import memory, operations, seconds, store_bytes
from teacher_dump.selection import resolve
from teacher_dump.sketch import Sketch, sketch
from teacher_dump.teacher import pass_of

Run = Callable[..., Outcome]

UNITS = Units(64, 63)
SIZES = {
    "vocab_size": 500,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 176,
    "pad_token_id": 0,
}
FAMILIES = {
    "bert": ("masked_lm", SIZES),
    "distilbert": ("masked_lm", {"vocab_size": 500, "dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 176}),
    "mobilebert": ("masked_lm", {**SIZES, "embedding_size": 24, "intra_bottleneck_size": 96, "num_feedforward_networks": 1}),
    "gpt2": ("causal_lm", {"vocab_size": 500, "n_embd": 64, "n_layer": 3, "n_head": 4}),
    "llama": ("causal_lm", {**SIZES, "num_key_value_heads": 2}),
    "qwen3": ("causal_lm", {**SIZES, "num_key_value_heads": 2, "head_dim": 16}),
    "gemma2": ("causal_lm", {**SIZES, "num_key_value_heads": 2, "head_dim": 16}),
}


def recipe_for(folder: Path, config: PreTrainedConfig, head: str, features: Sequence[object], **fields: object) -> DumpRecipe:
    """A dump of a teacher of whom there is config.json alone, over texts that are not there."""
    config.save_pretrained(folder / "model")
    rows = {"sources": [{"files": "absent.jsonl"}], "objective": "mlm" if head == "masked_lm" else "causal", "max_length": 64}
    teacher = {"model": folder / "model", "head": head, "dtype": fields.pop("compute", "float32")}
    tree = {"store": folder / "store", "pass_name": "paper", "teacher": teacher, "rows": rows, "features": list(features)}
    return DumpRecipe.model_validate({**tree, **fields})


def on_paper(recipe: DumpRecipe) -> Sketch:
    shape = model_shape(load_config(recipe.teacher.model), recipe.teacher.head)
    return sketch(recipe, resolve(recipe, shape, None), UNITS, 64, provenance(["test"]))


def llama(layers: int = 2, width: int = 64, inner: int = 176, heads: int = 4, kv_heads: int = 2, words: int = 500) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "llama", vocab_size=words, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=inner, max_position_embeddings=8192,
    )  # fmt: skip


def measured_peak(work: Callable[[], object]) -> int:
    """Bytes that torch's allocator gave and did not yet take back, at most."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", [["hidden.*@all"], ["lm_logits@labels:top8", "hidden.1@first"]])
def test_memory_of_weights_and_of_a_batch_is_what_a_real_teacher_takes(family: str, features: list[str], tmp_path: Path) -> None:
    head, sizes = FAMILIES[family]
    config = AutoConfig.for_model(family, **sizes)
    recipe = recipe_for(tmp_path, config, head, features, dtype="float16")
    plain = on_paper(recipe)
    real = HEADS[recipe.teacher.head].from_config(config).eval()  # type: ignore[attr-defined]
    assert plain.elements == sum(weight.numel() for weight in real.parameters())
    assert plain.weights == 4 * plain.elements
    assert plain.outside + 3 * plain.block == plain.weights
    teacher = pass_of(
        recipe, plain.teacher.requests, LoadedModel.of(real, recipe.teacher.head), "", torch.device("cpu"), UNITS, provenance([])
    )
    assert teacher.specs == plain.teacher.specs
    ids = torch.randint(1, 500, (16, 64))
    labels = torch.full_like(ids, IGNORED)
    labels[:, :20] = 1

    def answer() -> None:
        teacher.start(
            Batch(torch.arange(16), ids, torch.ones_like(ids, dtype=torch.bool), None, None, None, labels, None, torch.arange(16))
        )

    assert plain.batch_bytes(16, 64, 320) == pytest.approx(measured_peak(answer), rel=0.05)


def test_activations_of_a_llama_are_those_of_the_formula(tmp_path: Path) -> None:
    """At the end of a gated MLP there are: embeddings, the block's input, its sum with attention and that normed (4 D), gate, its
    activation and up (3 F), cosine and sine (2 C)."""
    width, inner, heads, tokens = 64, 176, 4, 64
    plain = on_paper(recipe_for(tmp_path, llama(), "causal_lm", ["hidden.-1@first"]))
    by_hand = 4 * (4 * width + 3 * inner + 2 * width // heads)
    assert plain.batch_bytes(32, tokens, 0) / (32 * tokens) == pytest.approx(by_hand, rel=0.02)


def test_sharded_weights_add_up_to_the_model_and_tensor_parallelism_leaves_norms_whole(tmp_path: Path) -> None:
    plain = on_paper(recipe_for(tmp_path, llama(), "causal_lm", ["hidden.-1@all"], compute="bfloat16"))
    norms = 2 * (2 * 2 * 64 + 64)  # two norms a block and the final one, in two bytes
    assert held(plain, Sharding(kind="none")) == plain.weights
    for kind in ("zero3", "fsdp"):
        assert 4 * held(plain, Sharding(kind=kind, size=4)) == plain.weights
    assert held(plain, Sharding(kind="tp", size=2)) == (plain.weights - norms) / 2 + norms
    block, words = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 176 + 2 * 64), 2 * 500 * 64
    assert GATHERED["zero3"](plain, 1) == words + 2 * (block / 2 + 2 * 64 * 176)
    assert GATHERED["fsdp"](plain, 1) == block + 2 * max(block, words) + 2 * 2 * 64
    assert GATHERED["none"](plain, 1) == 0


def test_tensor_parallelism_is_offered_where_heads_can_be_dealt_out(tmp_path: Path) -> None:
    def sizes(config: PreTrainedConfig, head: str, name: str) -> list[int]:
        folder = tmp_path / name
        folder.mkdir()
        plain = on_paper(recipe_for(folder, config, head, ["hidden.-1@all"]))
        return [one.size for one in shardings(plain, 8, offload=False) if one.kind == "tp"]

    assert sizes(llama(heads=8, kv_heads=4, width=128), "causal_lm", "llama") == [2, 4]
    assert sizes(AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=8), "causal_lm", "gpt2") == []
    assert sizes(AutoConfig.for_model("bert", **{**SIZES, "num_attention_heads": 8}), "masked_lm", "bert") == [2, 4, 8]


def test_time_follows_from_operations_bytes_and_rates(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, llama(), "causal_lm", ["hidden.-1@all"], dtype="float32")
    plain = on_paper(recipe)
    machine = parse_machine(
        "4xA100-40GB", "float32", {"flops": 1e9, "link": 1e9, "host": 1e9, "disk": 1e6, "bandwidth": 1e15}, utilisation=0.5
    )
    amount = Amount.imagined(64 * 4096, 64, recipe.rows)
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 176) * 2
    attention = 4 * 64 * 64 * 2
    assert operations(plain, amount) == 64 * 4096 * (linear + attention)
    assert amount.shards == 8
    alone = seconds(plain, Sharding(), machine, amount, 1024)
    assert alone.computing == pytest.approx(operations(plain, amount) / (4 * 0.5e9))
    assert (alone.exchanging, alone.loading) == (0, 0)
    assert alone.writing == pytest.approx(store_bytes(plain, amount) / 1e6)
    assert alone.total == max(alone.computing, alone.writing)
    forwards = 64 * 4096 / 1024 / 4  # of each rank
    gathered = seconds(plain, Sharding(kind="zero3", size=4), machine, amount, 1024)
    assert gathered.exchanging == pytest.approx(forwards * plain.weights * 3 / 4 / 0.7e9)
    offloaded = seconds(plain, Sharding(kind="zero3", size=4, offload="cpu"), machine, amount, 1024)
    assert offloaded.loading == pytest.approx(forwards * plain.weights / 4 / 0.7e9)
    split = seconds(plain, Sharding(kind="tp", size=2), machine, amount, 1024)
    assert split.computing == pytest.approx(alone.computing)
    assert split.exchanging == pytest.approx(2 * forwards * 2 * 5 * 1024 * 64 * 4 * (1 / 2) / 0.7e9)


def test_shards_that_are_fewer_than_ranks_leave_ranks_idle(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, llama(), "causal_lm", ["hidden.-1@first"])
    plain, amount = on_paper(recipe), Amount.imagined(3 * 32768, 64, recipe.rows)
    assert amount.shards == 3
    two, four, eight = (seconds(plain, Sharding(), parse_machine(f"{n}x40GB", "float32", {}), amount, 1024).computing for n in (2, 4, 8))
    assert two == pytest.approx(2 * four)
    assert four == eight


def test_imagined_text_counts_like_the_rows_that_it_would_become(
    masked_recipe: Tree, teacher_dump: Run, write: Callable[[Tree], Path]
) -> None:
    assert teacher_dump("run", write({**masked_recipe, "dtype": "bfloat16"})).code == 0
    store = Store.open(Path(masked_recipe["store"]))
    amount = Amount.of(store.rows)
    assert (amount.rows, amount.tokens, amount.shards) == (store.manifest.rows.rows, store.manifest.rows.tokens, store.manifest.rows.slots)
    commits = store.committed("bert").values()
    written = sum(seal.size for commit in commits for seal in commit.files.values())
    assert sum(amount.file_bytes(spec) for spec in store.manifest.passes["bert"].features) == written
    imagined = Amount.imagined(1000, 32, DumpRecipe.model_validate(masked_recipe).rows)
    assert (imagined.rows, imagined.tokens, imagined.shards, imagined.padded) == (32, 1024, 8, 1024)


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("8x", {}, "expected ranks x memory"),
        ("0x40GB", {}, "expected ranks x memory"),
        ("8xZ100", {}, "a GPU of V100-16GB"),
        ("8x40", {}, "expected ranks x memory such as 8x40GB"),
        ("8xV100", {}, "V100-32GB does not compute in bfloat16"),
        ("8x40GB", {"nodes": 3}, "expected a number that divides the 8 ranks, found 3"),
    ],
)
def test_a_machine_that_cannot_be_read_is_refused(text: str, options: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_machine(text, "bfloat16", {}, **options)


def test_machines_are_read_with_the_vendors_figures_and_ones_own_before_them() -> None:
    machine = parse_machine("2xh100", "bfloat16", {})
    assert (machine.ranks, machine.nodes, machine.memory, machine.flops) == (2, 1, 80e9, 989e12 * 0.4)
    other = parse_machine("16x40 GB", "bfloat16", {"flops": 1e15, "network": 1e9}, nodes=2, utilisation=0.5)
    assert (other.like, other.node_ranks, other.flops) == ("A100-40GB", 8, 5e14)
    assert other.between(8) == pytest.approx(300e9 * 0.7)
    assert other.between(16) == pytest.approx(0.7e9)


@pytest.fixture(scope="module")
def giant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a Llama of 100 billion weights, in a folder that holds nothing else, and a recipe for it."""
    folder = tmp_path_factory.mktemp("giant")
    llama(layers=88, width=10240, inner=28672, heads=80, kv_heads=8, words=128256).save_pretrained(folder)
    tree = {
        "store": str(folder / "store"),
        "pass_name": "giant",
        "teacher": {"model": str(folder), "head": "causal_lm", "dtype": "bfloat16"},
        "rows": {"sources": [{"files": "absent.jsonl"}], "objective": "causal", "max_length": 512},
        "features": ["hidden.-1@all", {"key": "lm_logits@labels:select", "words": ["yes", "no"]}],
        "dtype": "bfloat16",
        "batch_tokens": 2048,
    }
    (folder / "recipe.yaml").write_text(json.dumps(tree))
    return folder / "recipe.yaml"


@pytest.mark.timeout(120)
def test_a_teacher_of_100_billion_weights_is_planned_for_eight_gpus_of_40_gb(giant: Path, teacher_dump: Run) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = teacher_dump("plan", giant, "--on", "8x40GB", "--tokens", "10e9", "--length", "512")
    assert plan.code == 0, plan.err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000, "kilobytes; the weights have 201 GB"
    lines = {" ".join(line.split()[:3]): line for line in plan.out.splitlines() if line.startswith("  ") and " × " in line}
    assert "100,439,664,640 weights, 201 GB in bfloat16" in plan.out
    assert "SHORT" in lines["none × 1"]
    assert "SHORT" in lines["zero3 × 4"]
    assert "SHORT" not in lines["zero3 × 8"]
    assert lines["zero3 × 8"].split()[3:5] == ["25.1", "GB"], "an eighth of 201 GB"
    assert "advice: zero3 × 8" in plan.out
    assert "sharding: {kind: zero3, size: 8}" in plan.out
    assert not (giant.parent / "store").exists()


@pytest.mark.timeout(120)
def test_offload_is_advised_where_gpus_together_are_too_small_and_nothing_where_none_suffices(giant: Path, teacher_dump: Run) -> None:
    plan = teacher_dump("plan", giant, "--on", "8x24GB", "--tokens", "1e9")
    assert "advice: zero3 + cpu × 8" in plan.out, plan.err
    refused = teacher_dump("plan", giant, "--on", "8x4GB", "--tokens", "1e9")
    assert refused.code == 2
    assert "does not fit on 8x4GB in any way" in refused.err
    least = refused.err.partition("The smallest that does: 8 devices of ")[2].split(" GB")[0]
    enough = teacher_dump("plan", giant, "--on", f"8x{float(least) * 1.1:.1f}GB", "--tokens", "1e9")
    assert "advice: zero3 + " in enough.out, enough.err


def test_batches_grow_until_memory_is_full_where_the_recipe_leaves_them_open(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, llama(), "causal_lm", ["hidden.*@all"])
    plain, amount = on_paper(recipe), Amount.imagined(1e6, 64, recipe.rows)
    machine = parse_machine("2x1.6GB", "float32", {})
    found = choices(plain, machine, amount, None, gpu_reserve(machine))
    for one in found:
        taken = batch_bytes(plain, amount, 2 * one.batch_tokens)
        twice = memory(plain, one.sharding, taken, 2 * one.batch_tokens, amount, gpu_reserve(machine))
        assert one.memory.device <= machine.memory
        assert twice.device > machine.memory or 2 * one.batch_tokens > recipe.rows.slot_tokens
        assert one.batch_tokens > 64
    assert advised(found).sharding == Sharding(kind="none")


def test_a_plan_on_a_machine_counts_the_texts_that_are_there(
    world: World, masked_recipe: Tree, write: Callable[[Tree], Path], teacher_dump: Run
) -> None:
    plan = teacher_dump("plan", write(masked_recipe), "--on", "2xA100")
    assert plan.code == 0, plan.err
    assert "in 90 rows of up to 32" in plan.out
    assert not Path(masked_recipe["store"]).exists()
    absent = teacher_dump("plan", write(masked_recipe), "rows.sources.0.files=[absent.jsonl]", "--on", "2xA100")
    assert absent.code == 2
    assert "say how much there is, as in --tokens 10e9 --length 512" in absent.err


def test_options_of_a_machine_need_a_machine(masked_recipe: Tree, write: Callable[[Tree], Path], teacher_dump: Run) -> None:
    recipe = write(masked_recipe)
    assert "go with --on MACHINE" in teacher_dump("plan", recipe, "--tokens", "1e9").err
    assert "leave one of them out" in teacher_dump("plan", recipe, "--measure", "--on", "8x40GB").err
    if not torch.cuda.is_available():
        assert "say which one to plan for" in teacher_dump("plan", recipe, "--no-measure").err
    assert "expected at least 1" not in teacher_dump("plan", recipe, "--on", "8x40GB", "--tokens", "1e9", "--length", "9999").err
