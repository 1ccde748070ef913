"""Time of a training step's words at a vocabulary of 30,522: in chunks and all at once, and of two methods that read the same words.

    python benchmarks/word_step.py [--save benchmarks/results]

A student of two blocks and width 128 with its head reads 16 rows of 125 tokens and learns from a teacher's head of width 256 (``lm_kd``,
forward KL), from the text (``lm_loss``), or from both; forward and backward. Random weights, one thread. Seconds are CPU seconds of this
process, the least of several rounds in which all cases take turns, so that other work on the machine moves them little. "shared" is what
both would take if one pass over the chunks served them; no such thing is in the code.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import machine, save
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from online import words
from online.words import Words, each
from student_train.methods.losses import kl

VOCAB, WIDTH, TEACHER_WIDTH, ROWS, LENGTH = 30_522, 128, 256, 16, 125
WHOLE = 1 << 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=4 * WIDTH)
    body, head = BertModel(config, add_pooling_layer=False), torch.nn.Linear(WIDTH, VOCAB)
    teacher_head = torch.nn.Linear(TEACHER_WIDTH, VOCAB).requires_grad_(False)
    ids = torch.randint(VOCAB, (ROWS, LENGTH))
    labels, taken_in = ids.flatten(), torch.randn(ROWS * LENGTH, TEACHER_WIDTH)

    def soft(student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        return kl(student_MV, teacher_MV, 1.0)

    def hard(student_MV: Tensor, labels_M: Tensor) -> Tensor:
        return F.cross_entropy(student_MV, labels_M, reduction="none")

    def lm_kd(student: Words, teacher: Words) -> Tensor:
        return each(soft, student, teacher).sum()

    def lm_loss(student: Words, teacher: Words) -> Tensor:
        return each(hard, student, labels).sum()

    def both(student: Words, teacher: Words) -> Tensor:
        return lm_kd(student, teacher) + lm_loss(student, teacher)

    def shared(student: Words, teacher: Words) -> Tensor:
        return each(lambda s_MV, t_MV, l_M: soft(s_MV, t_MV) + hard(s_MV, l_M), student, teacher, labels).sum()

    def body_alone(student: Words, teacher: Words) -> Tensor:
        return student.input.sum()

    def step(loss: Callable[[Words, Words], Tensor]) -> float:
        start = time.process_time()
        student = Words(body(input_ids=ids).last_hidden_state.flatten(0, 1), head, VOCAB)
        loss(student, Words(taken_in, teacher_head, VOCAB)).backward()
        for module in (body, head):
            module.zero_grad()
        return time.process_time() - start

    usual = words.AT_ONCE
    cases = {"body alone": (usual, body_alone)}
    for name, at_once in (("chunks", usual), ("whole", WHOLE)):
        cases |= {f"{loss.__name__}, {name}": (at_once, loss) for loss in (lm_kd, lm_loss, both)}
    cases["both, shared chunks"] = usual, shared
    seconds = dict.fromkeys(cases, float("inf"))
    for _ in range(arguments.rounds):
        for name, (words.AT_ONCE, loss) in cases.items():
            seconds[name] = min(seconds[name], step(loss))
            print(name, round(seconds[name], 2), flush=True)
    about = {"vocabulary": VOCAB, "tokens": ROWS * LENGTH, "width": WIDTH, "teacher's width": TEACHER_WIDTH, "rounds": arguments.rounds}
    save(
        arguments.save,
        "word_step",
        {"machine": machine(), **about, "CPU seconds": {name: round(value, 2) for name, value in seconds.items()}},
    )


if __name__ == "__main__":
    main()
