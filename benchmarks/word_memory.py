"""Peak memory of word logits at a vocabulary of 150,000 words: of what a dump keeps of them, and of a training step that learns from them.

    python benchmarks/word_memory.py [--save benchmarks/results]

A random head of width 1024 on the CPU, each case in a process of its own. Figures are anonymous resident memory
(RssAnon), in megabytes, seen every 2 ms, above what the process has when heads and inputs are there. "whole" is what one float32 copy of
all logits would take, and "bound" what docs/scale.md says: a chunk's logits times the copies that are alive at once, and of a step two
gradients of the head's weight, the sum so far and the one that is added. Seconds are those of a machine that does other things too.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path

import torch
from timing import machine, save

from online.batch import Batch
from online.encode import encode
from online.words import AT_ONCE, SMALLEST, Words
from store.codecs import feature_spec
from store.features import FeatureKey
from student_train.methods.divergences import forward_kl, of_tokens, reverse_kl

VOCAB, WIDTH = 150_000, 1024
FORMS, DUMPED = ("top64", "top6band12", "draw50", "select"), (1000, 4000)
STEPS, LEARNED = ("forward KL", "reverse KL"), (500, 1000)
COPIES = {"dump": 4, "step": 9}
"""Tensors of a chunk's size that are alive at once."""


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Highest:
    """The most anonymous memory while this context is open, above what there was before."""

    def __enter__(self) -> "Highest":
        self.before = self.most = anonymous()
        self._over = False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()
        self.taken = self.most - self.before


def dumped(form: str, tokens: int) -> tuple[int, float]:
    """Bytes and seconds of making ``form`` of the logits of so many tokens."""
    head, input_UW = torch.nn.Linear(WIDTH, VOCAB, bias=False), torch.randn(tokens, WIDTH)
    ids = torch.randint(VOCAB, (tokens // 100, 100))
    mask = torch.ones_like(ids, dtype=torch.bool)
    rows = torch.arange(len(ids))
    batch = Batch(rows, ids, mask, None, None, None, ids, None, rows)
    key = FeatureKey("lm_logits", positions="all", form=form)
    spec = feature_spec(key, "float16", VOCAB, range(100) if form == "select" else ())
    with torch.no_grad():
        words = Words(input_UW, head, VOCAB, batch.real, mask.shape)
        start = time.perf_counter()
        with Highest() as highest:
            encode(key, words, batch, spec)
    return highest.taken, time.perf_counter() - start


def learned(step: str, tokens: int) -> tuple[int, float]:
    """Bytes and seconds of a forward and a backward pass through head and loss, with a teacher's head of the same size."""
    heads = [torch.nn.Linear(WIDTH, VOCAB, bias=False) for _ in range(2)]
    heads[1].requires_grad_(False)
    student, teacher = (Words(torch.randn(tokens, WIDTH), head, VOCAB) for head in heads)
    student.input.requires_grad_()
    divergence = forward_kl if step == "forward KL" else reverse_kl
    start = time.perf_counter()
    with Highest() as highest:
        of_tokens(divergence, student, teacher).sum().backward()
    return highest.taken, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path)
    parser.add_argument("--case", nargs=2, metavar=("NAME", "TOKENS"), help="one case, in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        name, tokens = arguments.case[0], int(arguments.case[1])
        torch.manual_seed(0)
        taken, seconds = learned(name, tokens) if name in STEPS else dumped(name, tokens)
        print(json.dumps({"megabytes": round(taken / 1e6), "seconds": round(seconds, 1)}))
        return
    chunk, weight = 4 * max(AT_ONCE, SMALLEST * VOCAB) / 1e6, 4 * VOCAB * WIDTH / 1e6
    result: dict[str, object] = {
        "machine": machine(), "vocabulary": VOCAB, "width": WIDTH, "chunk, MB": round(chunk), "weight, MB": round(weight),
        "bound, MB": {"dump": round(COPIES["dump"] * chunk), "step": round(COPIES["step"] * chunk + 2 * weight)},
        "whole, MB": {str(tokens): round(4 * VOCAB * tokens / 1e6) for tokens in sorted({*DUMPED, *LEARNED})},
    }  # fmt: skip
    for name, tokens in (*product(FORMS, DUMPED), *product(STEPS, LEARNED)):
        done = subprocess.run([sys.executable, __file__, "--case", name, str(tokens)], env=os.environ, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}, {tokens} tokens: {done.stderr}")
        result[f"{name}, {tokens} tokens"] = json.loads(done.stdout)
        print(name, tokens, done.stdout.strip(), flush=True)
        save(arguments.save, "word_memory", result)


if __name__ == "__main__":
    main()
