"""Students learn from what another program kept as from a dump: checked against the teacher itself, with the loss written out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import mse_loss
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from online.capture import Capture
from online.collate import collate
from online.models import LoadedModel, ModelSpec, forward, load_model
from store.features import FeatureKey
from store.reader import Store
from store.strict import parse
from student_train.methods import parse_method
from student_train.recipe import TrainRecipe
from student_train.run import run
from student_train.teacher import StoredTeacher
from teacher_dump.cli import main

VOCAB, WIDTH, TOP = 32, 16, 6
QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1, "learning_rate": 3e-3}


def make_model(folder: Path, seed: int, layers: int) -> Path:
    """A random Llama with noise on every weight, saved with a tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher"), 0, layers=3)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("student"), 1, layers=2)


@torch.no_grad()
def serve(teacher: Path, file: Path) -> list[tuple[list[int], list[int]]]:
    """Answers of a server that runs ``teacher`` as transformers does; every other record scores its prompt too."""
    model, rng, texts = LlamaForCausalLM.from_pretrained(teacher).eval(), np.random.default_rng(0), []
    with file.open("w") as lines:
        for number in range(24):
            prompt, answer = (rng.integers(3, VOCAB, rng.integers(2, 12)).tolist() for _ in range(2))
            texts.append((prompt, answer))
            log_probs = model(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
            of = {
                j: dict(zip(*(part.tolist() for part in log_probs[j - 1].topk(TOP)[::-1]), strict=True)) for j in range(1, len(log_probs))
            }
            content = [
                {"token": f"w{token}", "top_logprobs": [{"token": f"w{word}", "logprob": x} for word, x in of[len(prompt) + j].items()]}
                for j, token in enumerate(answer)
            ]
            record: dict[str, Any] = {"prompt_token_ids": prompt, "choices": [{"logprobs": {"content": content}}]}
            if number % 2:
                record["prompt_logprobs"] = [None, *({str(w): {"logprob": x} for w, x in of[j].items()} for j in range(1, len(prompt)))]
            lines.write(json.dumps(record) + "\n")
    return texts


def test_top_words_of_a_server_teach_as_the_teacher_itself(teacher: Path, student: Path, tmp_path: Path) -> None:
    texts = serve(teacher, tmp_path / "a.jsonl")
    options = ["--store", str(tmp_path / "store"), "--tokenizer", str(teacher), "--top", str(TOP), "--pass", "big"]
    main(["import", "logprobs", str(tmp_path / "a.jsonl"), *options])
    store, loaded = Store.open(tmp_path / "store"), load_model(ModelSpec(model=student, head="causal_lm"))
    method = parse_method("lm_kd", {"top": TOP}, loaded.shape, store.manifest.passes["big"].shape)
    rows = np.arange(len(store.rows))
    batch = collate(store, rows)
    stored = StoredTeacher(store, "big", method.teacher_keys)
    with Capture(loaded, method.student_keys, grad=True) as capture:
        forward(loaded, batch)
    terms = method(capture.features(batch), stored.features(batch, stored.fetch(rows)), batch)

    total, count = torch.zeros(()), 0
    large, small = (LlamaForCausalLM.from_pretrained(folder).eval() for folder in (teacher, student))
    for number, (prompt, answer) in enumerate(texts):
        ids = torch.tensor([prompt + answer])
        p, q = (model(ids).logits[0].float().softmax(-1) for model in (large, small))
        for place in range(0 if number % 2 else len(prompt) - 1, len(prompt + answer) - 1):  # the answer at a token is of the next one
            words = p[place].topk(TOP).indices
            head = (p[place, words] * (p[place, words] / q[place, words]).log()).sum()
            p_rest, q_rest = 1 - p[place, words].sum(), 1 - q[place, words].sum()
            total, count = total + head + p_rest * (p_rest / q_rest).log(), count + 1
    assert float(method.counts(batch)["words"]) == count
    torch.testing.assert_close(terms["words"], total, rtol=2e-5, atol=1e-4)
    gradient = torch.autograd.grad(terms["words"], list(loaded.model.parameters()), allow_unused=True)
    expected = torch.autograd.grad(total, list(small.parameters()), allow_unused=True)
    for ours, theirs in zip(gradient, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def states_of(teacher: Path, folder: Path) -> Path:
    """Files as speculators has them, of the outputs of blocks 1 and 3, from the model's own list of hidden states."""
    loaded = LoadedModel.of(LlamaForCausalLM.from_pretrained(teacher).eval(), "causal_lm")
    rng = np.random.default_rng(1)
    outputs: list[torch.Tensor] = []
    folder.mkdir()
    for number in range(16):
        ids = torch.from_numpy(rng.integers(3, VOCAB, rng.integers(4, 20)))
        outputs.clear()
        hooks = [loaded.block(layer).register_forward_hook(lambda block, inputs, output: outputs.append(output)) for layer in (1, 3)]
        loaded.model(ids[None])
        for hook in hooks:
            hook.remove()
        states = torch.stack([output.reshape(len(ids), WIDTH) for output in outputs], dim=1)
        save_file({"token_ids": ids, "hidden_states": states}, folder / f"hs_{number}.safetensors")
    return folder


def test_a_student_is_trained_from_imported_states_and_words(teacher: Path, student: Path, tmp_path: Path) -> None:
    states = states_of(teacher, tmp_path / "states")
    serve(teacher, tmp_path / "a.jsonl")
    common = ["--tokenizer", str(teacher), "--config", str(teacher)]
    layers = ["--features", "hidden.1", "--features", "hidden.3"]
    main(["import", "hidden-states", str(states), "--store", str(tmp_path / "hs"), *common, *layers])
    main(["import", "logprobs", str(tmp_path / "a.jsonl"), "--store", str(tmp_path / "words"), *common, "--top", str(TOP)])

    store = Store.open(tmp_path / "hs")
    key, rows = FeatureKey("hidden", 3), np.arange(4)
    stored = StoredTeacher(store, "teacher", [key])
    batch = collate(store, rows)
    live = load_model(ModelSpec(model=teacher, head="causal_lm"))
    with torch.no_grad(), Capture(live, [key]) as capture:
        forward(live, batch)
    found, expected = stored.features(batch, stored.fetch(rows))[key], capture.features(batch)[key]
    assert float(mse_loss(found[batch.mask], expected[batch.mask])) < 1e-9

    def phase(name: str, folder: str, method: dict[str, Any]) -> dict[str, Any]:
        data = {"store": str(tmp_path / folder), "pass_name": "teacher"}
        start = {"model": {"model": str(student), "head": "causal_lm"}}
        loop = {"steps": 6, "batch_rows": 8, "trainer": QUIET}
        return {"name": name, "student": start, "data": [data], "evaluate": [data], "methods": [method], **loop}

    match = {"name": "match", "options": {"site": "hidden", "layers": [[1, 1], [2, 3]]}}
    for name, folder, method in (("a", "hs", match), ("b", "words", {"name": "lm_kd", "options": {"top": TOP}})):
        made = parse(TrainRecipe, {"output": str(tmp_path / name), "phases": [phase(name, folder, method)]}, "recipe")
        run(made, ["tests"])
        result = json.loads((made.output / name / "result.json").read_text())
        assert result["after"]["loss"] < result["before"]["loss"]
