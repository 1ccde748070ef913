"""Responses that a model writes: its own words in its own distribution, on the prompt's row, and labels on nothing else."""

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from online.batch import IGNORED, Batch, dense
from online.capture import Capture
from online.models import LoadedModel, ModelSpec, forward, load_model
from online.rollout import Writing, end_tokens, has_prompt, prompt_lengths, roll_out
from store.features import FeatureKey

LOGITS = FeatureKey("lm_logits", positions="labels")
PROMPTS = [5, 1, 7, 3]
"""Tokens of each prompt."""
NEW = 9


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    path = Path(__file__).parents[1] / "student_train" / "tiny_answers.py"
    spec = importlib.util.spec_from_file_location("tiny_answers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def writer(tiny: ModuleType, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tiny.write_model(tmp_path_factory.mktemp(request.param) / "model", getattr(tiny, request.param)(), 4)
    return load_model(ModelSpec(model=folder, head="causal_lm"))


@pytest.fixture(scope="module")
def other(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tiny.write_model(tmp_path_factory.mktemp("other") / "model", tiny.llama(hidden_size=24), 6)
    return load_model(ModelSpec(model=folder, head="causal_lm"))


def prompts(seed: int = 0, answer: int = 4) -> Batch:
    """Random prompts, each with a random response."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 24, (len(PROMPTS), 16), generator=generator)
    mask, labels = torch.zeros_like(ids, dtype=torch.bool), torch.full_like(ids, IGNORED)
    for row, prompt in enumerate(PROMPTS):
        mask[row, : prompt + answer] = True
        labels[row, prompt - 1 : prompt + answer - 1] = ids[row, prompt : prompt + answer]
    return Batch(torch.arange(len(PROMPTS)) + 40, ids * mask, mask, None, None, None, labels, None, torch.arange(len(PROMPTS)) + 7)


def chances(seed: int = 1) -> Tensor:
    return torch.rand(len(PROMPTS), NEW, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_row(batch: Batch, row: int) -> Batch:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return Batch(**{name: value if value is None else value[row : row + 1] for name, value in values.items()})


def distribution(loaded: LoadedModel, tokens: list[int]) -> Tensor:
    """[V] float64: of the word that follows ``tokens``, by a plain pass of the model."""
    with torch.no_grad():
        logits: Tensor = loaded.model(input_ids=torch.tensor([tokens])).logits[0, -1]
    return logits.double().softmax(-1)


def by_hand(writer: LoadedModel, batch: Batch, drawn: Tensor | None, temperature: float = 1.0) -> list[list[int]]:
    """The responses, word by word, each row alone and without padding or cache."""
    found = []
    for row, prompt in enumerate(PROMPTS):
        tokens = batch.input_ids[row, :prompt].tolist()
        for number in range(NEW):
            probs = (distribution(writer, tokens).log() / temperature).softmax(-1).tolist()
            if drawn is None:
                word = max(range(len(probs)), key=probs.__getitem__)
            else:
                total, word = probs[0], 0
                while total <= float(drawn[row, number]):
                    word += 1
                    total += probs[word]
            tokens.append(word)
            if word == 2:
                break
        found.append(tokens[prompt:])
    return found


@pytest.mark.parametrize(("drawn", "temperature"), [(None, 1.0), (chances(), 1.0), (chances(2), 0.6)])
def test_responses_are_those_of_each_prompt_alone(writer: LoadedModel, drawn: Tensor | None, temperature: float) -> None:
    batch, writing = prompts(), Writing(NEW, temperature)
    rolled = roll_out(writer, batch, writing, drawn, end_tokens(writer))
    expected = by_hand(writer, batch, drawn, temperature)
    for row, (prompt, response) in enumerate(zip(PROMPTS, expected, strict=True)):
        tokens = batch.input_ids[row, :prompt].tolist() + response
        labels = [IGNORED] * (prompt - 1) + response
        assert rolled.input_ids[row, : len(tokens)].tolist() == tokens
        assert not rolled.input_ids[row, len(tokens) :].any()
        assert rolled.mask[row].tolist() == [place < len(tokens) for place in range(rolled.mask.shape[1])]
        assert rolled.token_labels is not None
        assert rolled.token_labels[row].tolist() == labels + [IGNORED] * (rolled.mask.shape[1] - len(labels))
    assert rolled.mask.shape[1] % 16 == 0
    assert torch.equal(rolled.rows, batch.rows)
    assert torch.equal(rolled.groups, batch.groups)
    assert rolled.written is not None
    assert rolled.written.all()
    for row in range(len(PROMPTS)):
        alone = roll_out(writer, one_row(batch, row), writing, None if drawn is None else drawn[row : row + 1], end_tokens(writer))
        length = int(alone.lengths)
        assert torch.equal(alone.input_ids[0, :length], rolled.input_ids[row, :length])
        assert length == int(rolled.lengths[row])


def test_a_response_ends_with_the_first_end_or_without_one(writer: LoadedModel) -> None:
    batch = prompts()
    endless = roll_out(writer, batch, Writing(NEW), chances(), frozenset())
    assert (endless.lengths - torch.tensor(PROMPTS) == NEW).all()
    responses = [endless.input_ids[row, prompt : prompt + NEW].tolist() for row, prompt in enumerate(PROMPTS)]
    ends = frozenset({responses[0][3], responses[2][0]})
    found = roll_out(writer, batch, Writing(NEW), chances(), ends)
    for row, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
        length = next((place for place, word in enumerate(response, 1) if word in ends), NEW)
        assert int(found.lengths[row]) == prompt + length
        assert found.input_ids[row, prompt : prompt + length].tolist() == response[:length]
        assert int(found.labelled[row].sum()) == length


def test_log_probabilities_of_the_training_pass_are_those_at_writing(writer: LoadedModel) -> None:
    rolled = roll_out(writer, prompts(), Writing(NEW), chances(), end_tokens(writer))
    with torch.no_grad(), Capture(writer, [LOGITS]) as capture:
        forward(writer, rolled)
        log_probs = dense(capture.features(rolled), LOGITS).double().log_softmax(-1)
    assert rolled.token_labels is not None
    words = rolled.token_labels[rolled.labelled]
    found = log_probs.gather(-1, words[:, None])[:, 0]
    expected = []
    for row, prompt in enumerate(PROMPTS):
        tokens = rolled.input_ids[row, : int(rolled.lengths[row])].tolist()
        expected += [float(distribution(writer, tokens[:place]).log()[tokens[place]]) for place in range(prompt, len(tokens))]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_words_come_in_the_shares_of_the_mixed_distribution(writer: LoadedModel, other: LoadedModel) -> None:
    batch, rows = one_row(prompts(), 2), 4000
    many = Batch(*(None if value is None else value.expand(rows, *value.shape[1:]) for value in (
        batch.rows, batch.input_ids, batch.mask, None, None, None, batch.token_labels, None, batch.groups)))  # fmt: skip
    even = (torch.arange(rows, dtype=torch.float64)[:, None] + 0.5) / rows
    rolled = roll_out(writer, many, Writing(1, mixed=0.3, other=other), even, frozenset())
    prompt = batch.input_ids[0, : PROMPTS[2]].tolist()
    expected = 0.3 * distribution(other, prompt) + 0.7 * distribution(writer, prompt)
    shares = rolled.input_ids[:, PROMPTS[2]].bincount(minlength=24).double() / rows
    torch.testing.assert_close(shares, expected, rtol=0, atol=2 / rows)


def test_the_model_that_reads_along_sees_what_was_written(writer: LoadedModel, other: LoadedModel) -> None:
    batch, drawn = prompts(), chances(3)
    rolled = roll_out(writer, batch, Writing(NEW, mixed=0.5, other=other), drawn, frozenset())
    for row, prompt in enumerate(PROMPTS):
        tokens = rolled.input_ids[row].tolist()
        for number in range(NEW):
            seen = tokens[: prompt + number]
            sums = (0.5 * distribution(other, seen) + 0.5 * distribution(writer, seen)).cumsum(-1)
            assert tokens[prompt + number] == int((sums <= drawn[row, number]).sum())


def test_only_shared_words_are_written_and_settings_of_a_folder_do_not_matter(writer: LoadedModel) -> None:
    batch = prompts()
    few = roll_out(writer, batch, Writing(NEW, words=6), chances(), frozenset())
    assert int(few.input_ids[few.labelled.roll(1, 1)].max()) < 6
    plain = roll_out(writer, batch, Writing(NEW), chances(), frozenset())
    settings = writer.model.generation_config
    writer.model.train()
    try:
        settings.repetition_penalty, settings.top_k, settings.do_sample, settings.min_new_tokens = 5.0, 1, True, 3
        state = torch.get_rng_state()
        changed = roll_out(writer, batch, Writing(NEW), chances(), frozenset())
        assert torch.equal(torch.get_rng_state(), state)
        assert writer.model.training
        assert writer.model.generation_config is settings
    finally:
        writer.model.eval()
        settings.repetition_penalty, settings.top_k, settings.do_sample, settings.min_new_tokens = None, None, None, None
    assert torch.equal(changed.input_ids, plain.input_ids)


def test_what_a_prompt_is() -> None:
    batch = prompts()
    assert has_prompt(batch).tolist() == [True, False, True, True]  # with one token in front, all that can be scored is
    assert prompt_lengths(batch).tolist() == PROMPTS
    assert batch.token_labels is not None
    bare = dataclasses.replace(batch, token_labels=torch.full_like(batch.token_labels, IGNORED))
    assert has_prompt(bare).all()
    assert torch.equal(prompt_lengths(bare), bare.lengths)
    words = batch.input_ids.roll(-1, 1).masked_fill(~batch.mask.roll(-1, 1), IGNORED)
    words[:, -1] = IGNORED
    assert not has_prompt(dataclasses.replace(batch, token_labels=words)).any()
    assert not has_prompt(dataclasses.replace(batch, documents=torch.zeros_like(batch.input_ids))).any()
    left = dataclasses.replace(
        one_row(batch, 0),
        mask=batch.mask[:1].roll(3, 1),
        token_labels=batch.token_labels[:1].roll(3, 1),
        input_ids=batch.input_ids[:1].roll(3, 1),
    )
    assert prompt_lengths(left).tolist() == PROMPTS[:1]


def test_ends_are_those_of_tokenizer_and_settings(writer: LoadedModel) -> None:
    assert end_tokens(writer) == {2}
    settings = writer.model.generation_config
    try:
        settings.eos_token_id = [5, 6]
        assert end_tokens(writer) == {2, 5, 6}
        assert end_tokens(dataclasses.replace(writer, tokenizer=None)) == {5, 6}
        settings.eos_token_id = None
        assert end_tokens(dataclasses.replace(writer, tokenizer=None)) == frozenset()
    finally:
        settings.eos_token_id = 2


def test_what_cannot_be_written_is_refused(writer: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"rows of up to 64 tokens, found 67; build shorter rows, or give a smaller max_new_tokens"):
        roll_out(writer, prompts(), Writing(60), None, frozenset())
    packed = dataclasses.replace(prompts(), documents=torch.zeros(4, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="found packed rows"):
        roll_out(writer, packed, Writing(4), None, frozenset())
