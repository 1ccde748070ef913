"""Memory and time of each rank while a student learns from a teacher in the same job, sharded and replicated, beside what `plan` says.

    python benchmarks/online_memory.py [--save benchmarks/results]

A random BERT-base (110 million weights) teaches a random one of six blocks (67 million) hidden states, on the CPU; every
combination in fresh processes, which run `student_train` itself: three optimiser steps, of which the first is not counted (it makes the
optimiser's moments). Figures are anonymous resident memory (RssAnon), in megabytes, seen every 3 ms: what is mapped from files shows in
no such figure. So the teacher's files are in bfloat16 and it runs in float32: its weights are then the process's own, as on a GPU, and
not pages that all ranks of a machine share. "base" is the process before anything is loaded, DeepSpeed imported. glibc is told to
give freed memory back at once, which costs time. Seconds are means of two steps on a machine that does other things too.
A run that was stopped goes on where it was.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import machine, save
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from online.sharding import Sharding
from store.strict import parse
from student_train.colocation import Way, memory
from student_train.outline import outline
from student_train.paper import on_paper
from student_train.plan import rows_of
from student_train.recipe import TrainRecipe
from student_train.run import run
from student_train.trainer import DistillationTrainer
from student_train.zero import Zero
from teacher_dump.dump import build_rows
from teacher_dump.recipe import DumpRecipe

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS, BLOCKS, TOKENS, ROWS, STEPS = 30_522, 6, 16, 4, 3
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
CASES: tuple[tuple[str, int, int], ...] = (  # teacher's kind, ZeRO stage of the student (0: none), ranks
    ("none", 0, 1), ("none", 0, 2), ("zero3", 0, 2), ("fsdp", 0, 2), ("none", 2, 1), ("none", 2, 2), ("none", 3, 1), ("none", 3, 2),
    ("zero3", 2, 2), ("none", 1, 2), ("zero3", 3, 2), ("zero3", 0, 1),
)  # fmt: skip


def name(kind: str, stage: int, ranks: int) -> str:
    """What a case is called."""
    return f"teacher {kind}, student {f'zero-{stage}' if stage else 'ddp'}, {ranks} rank{'s' if ranks > 1 else ''}"


def write(folder: Path) -> None:
    """Teacher, tokenizer and rows of ``TOKENS`` tokens each."""
    torch.manual_seed(0)
    names = [*SPECIAL, *(f"w{number}" for number in range(WORDS - len(SPECIAL)))]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    given = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, **given).save_pretrained(folder / "teacher")
    BertForSequenceClassification(BertConfig(vocab_size=WORDS)).to(torch.bfloat16).save_pretrained(folder / "teacher")
    drawn = torch.randint(0, WORDS - len(SPECIAL), (64, TOKENS - 2)).tolist()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(f"w{word}" for word in row)}) + "\n" for row in drawn))
    recipe = {
        "store": str(folder / "store"),
        "pass_name": "unused",
        "teacher": {"model": str(folder / "teacher"), "head": "classification"},
        "rows": {"sources": [{"files": str(folder / "text.jsonl"), "split": "train"}], "max_length": TOKENS},
        "features": ["hidden.6@all"],
    }
    build_rows(parse(DumpRecipe, recipe, "recipe"), sys.argv)


def recipe_of(folder: Path, kind: str, stage: int, ranks: int) -> TrainRecipe:
    """The run of a case."""
    teacher = {"model": str(folder / "teacher"), "head": "classification", "dtype": "float32"}
    phase: dict[str, Any] = {
        "name": "only",
        "student": {"random": {"num_hidden_layers": BLOCKS}},
        "methods": [{"name": "hid_seq"}],
        "data": [{"store": str(folder / "store")}],
        "teacher": {"online": {**teacher, "sharding": {"kind": kind, "size": ranks if kind != "none" else 1}}},
        "steps": STEPS,
        "batch_rows": ROWS,
        "trainer": {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1},
    }
    if stage:
        phase["zero"] = {"stage": stage}
    return parse(TrainRecipe, {"output": str(folder / "out" / f"{kind}-{stage}-{ranks}"), "phases": [phase]}, "recipe")


class Watch:
    """Anonymous resident memory of this process as time goes by."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.003):
            self.seen.append((time.perf_counter(), anonymous()))

    def end(self) -> None:
        self._done.set()
        self._thread.join()

    def peak(self, start: float, end: float) -> int:
        """The most that was seen between two moments."""
        return round(max(taken for when, taken in self.seen if start <= when <= end))


def anonymous() -> float:
    """Anonymous resident memory of this process in megabytes of 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / 1e6


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank."""
    import deepspeed  # noqa: F401  (in the base of every case)

    torch.set_num_threads(1)
    if arguments["alone"]:  # without a launch, or transformers puts DDP around the student of a single rank
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
            os.environ.pop(variable, None)
    begun, ended = marked("get_batch_samples"), marked("_maybe_log_save_evaluate", after=True)
    made = parse(TrainRecipe, arguments["recipe"], "recipe")
    base, start, watch = round(anonymous()), time.perf_counter(), Watch()
    try:
        run(made, ["benchmark"])
    finally:
        watch.end()
    steps = [end - begin for begin, end in zip(begun, ended, strict=False)]  # a run ends with one more log
    return {
        "base": base,
        "before_steps": watch.peak(start, begun[0]),
        "peak": watch.peak(begun[1], ended[len(begun) - 1]),
        "seconds_a_step": round(statistics.mean(steps[1:]), 2),
    }


def marked(method: str, after: bool = False) -> list[float]:
    """The moments at which a method of the trainer begins, or ends, from now on."""
    moments: list[float] = []
    inner: Callable[..., Any] = getattr(DistillationTrainer, method)

    def outer(*given: object, **named: object) -> object:
        if not after:
            moments.append(time.perf_counter())
        try:
            return inner(*given, **named)
        finally:
            if after:
                moments.append(time.perf_counter())

    setattr(DistillationTrainer, method, outer)
    return moments


def predicted(made: TrainRecipe, kind: str, stage: int, ranks: int) -> dict[str, int]:
    """What `student-train plan` says of a rank, in megabytes."""
    phase = made.phases[0]
    live = next(iter(phase.live.values())).model_copy(update={"sharding": Sharding()})
    one = outline(made, phase.model_copy(update={"zero": None, "teacher": phase.teacher.model_copy(update={"online": live})}))
    sharding = Sharding(kind=kind, size=ranks if kind != "none" else 1)
    taken = memory(on_paper(one), Way(ranks, sharding, Zero(stage=stage) if stage else None), rows_of(one, None))
    return {part: round(value / 1e6) for part, value in {**vars(taken), "allocated": taken.allocated}.items() if part != "host"}


def measure(folder: Path, found: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """The cases that are not ``found`` yet, one after the other; ``keep`` is called after each."""
    for case in CASES:
        if name(*case) in found:
            continue
        made = recipe_of(folder, *case)
        started = time.perf_counter()
        asked = {"recipe": made.model_dump(mode="json"), "alone": case == ("none", 0, 1)}
        ranks = run_on_ranks(case[2], Path(__file__), asked, timeout=400, environment=MALLOC)
        says = predicted(made, *case)
        grown = max(rank["peak"] - rank["base"] for rank in ranks)
        found[name(*case)] = {
            "ranks": ranks,
            "grown": grown,
            "predicted": says,
            "error": round(says["allocated"] / grown - 1, 3),
            "seconds_a_step": max(rank["seconds_a_step"] for rank in ranks),
        }
        keep(found)
        seconds = time.perf_counter() - started
        print(f"{name(*case)}: {grown} MB beside the base, predicted {says['allocated']} ({seconds:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "online"))
    from on_ranks import run_on_ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="folder of online_memory.json; cases that are in it stay as they are")
    options = parser.parse_args()
    known = options.save / "online_memory.json" if options.save else None
    cases = json.loads(known.read_text())["cases"] if known is not None and known.exists() else {}
    shapes = {"rows_a_step": ROWS, "tokens": TOKENS, "blocks": {"teacher": 12, "student": BLOCKS}, "steps": STEPS}

    def keep(found: dict[str, Any]) -> None:
        save(options.save, "online_memory", {"machine": machine(), **shapes, "gpu": "not measured", "cases": found})

    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch))
        measure(Path(scratch), cases, keep)
