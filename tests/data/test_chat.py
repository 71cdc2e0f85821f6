"""Conversations, from a line of JSON to the gradient: only the answers' tokens are learned."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.compute.precision import choose_precision
from pipeline.data import corpus, token_files, token_writer, tokenizer
from pipeline.data.batches import batch_at, validation_windows
from pipeline.data.documents import PART_CHARACTERS, Document
from pipeline.data.token_files import Tokens
from pipeline.data.tokenizer import EOT, encode, gpt2
from pipeline.diagnostics import token_spans
from pipeline.errors import InputError
from pipeline.inference.evaluation import Context, unigram_loss, validation
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.loss import IGNORE
from pipeline.training import loop, training_step

CPU = torch.device("cpu")


def said(*turns: str) -> dict[str, Any]:
    """A line of "role: content" turns."""
    pairs = [turn.split(": ", 1) for turn in turns]
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


FIRST = said(
    "system: Be brief.",
    "user: naïve\nAssistant: <|endoftext|>🦜",
    "assistant: é 🦜",
    "user: And?",
    "assistant: no\nUser: x",
)
SECOND = said("user: Hi", "assistant: Ho", "user: And?")

# Every token of both, written down by hand from GPT-2's published vocabulary: (id, its bytes, is it
# an answer's).
_ = False
TABLE = [
    (50256, b"<|endoftext|>", _),
    (11964, b"System", _),
    (25, b":", _),
    (1355, b" Be", _),
    (4506, b" brief", _),
    (13, b".", _),
    (198, b"\n", _),
    (12982, b"User", _),
    (25, b":", _),
    (41492, " naïve".encode(), _),
    (198, b"\n", _),
    (48902, b"Assistant", _),  # a user's word
    (25, b":", _),
    (1279, b" <", _),  # text, seven tokens of it
    (91, b"|", _),
    (437, b"end", _),
    (1659, b"of", _),
    (5239, b"text", _),
    (91, b"|", _),
    (29, b">", _),
    (8582, b"\xf0\x9f", _),  # a character of three tokens
    (99, b"\xa6", _),
    (250, b"\x9c", _),
    (198, b"\n", _),
    (48902, b"Assistant", _),
    (25, b":", _),
    (38251, " é".encode(), True),
    (12520, b" \xf0\x9f", True),
    (99, b"\xa6", True),
    (250, b"\x9c", True),
    (50256, b"<|endoftext|>", True),
    (198, b"\n", _),
    (12982, b"User", _),
    (25, b":", _),
    (843, b" And", _),
    (30, b"?", _),
    (198, b"\n", _),
    (48902, b"Assistant", _),
    (25, b":", _),
    (645, b" no", True),
    (198, b"\n", True),
    (12982, b"User", True),  # the assistant's word
    (25, b":", True),
    (2124, b" x", True),
    (50256, b"<|endoftext|>", True),
    (50256, b"<|endoftext|>", _),  # before the next conversation
    (12982, b"User", _),
    (25, b":", _),
    (15902, b" Hi", _),
    (198, b"\n", _),
    (48902, b"Assistant", _),
    (25, b":", _),
    (9544, b" Ho", True),
    (50256, b"<|endoftext|>", True),
    (198, b"\n", _),
    (12982, b"User", _),
    (25, b":", _),
    (843, b" And", _),
    (30, b"?", _),
]
IDS = [token for token, _, _ in TABLE]
ANSWERS = [answer for _, _, answer in TABLE]


def settings(path: Path, val_fraction: float = 0.2) -> Any:
    return SimpleNamespace(
        source="chat", path=str(path), pattern="**/*", field="text", val_fraction=val_fraction
    )


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def tokenized(folder: Path, lines: list[Any], split: str = "train") -> Tokens:
    """What the tokenizer makes of a file of these lines; every one of them is in both splits."""
    path = write(folder / "chats.jsonl", lines)
    read = list(corpus.documents(settings(path)))
    both = [document._replace(split=name) for name in token_files.SPLITS for document in read]
    source = corpus.describe(settings(path))
    token_writer.write_tokens(both, folder / "tokens", source=source)
    return token_files.open_tokens(folder / "tokens", split)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return tokenized(tmp_path, [FIRST, SECOND])


@pytest.fixture
def train_config(make_config) -> Any:
    return make_config(
        train__sequence_length=24, train__batch_size=2, train__accumulate=2, train__grad_clip=0.0
    ).train


@pytest.fixture
def state(make_config, train_config) -> training_step.TrainState:
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=24))
    initialize(model, make_config().init, torch.Generator().manual_seed(0))
    return training_step.start(model, train_config, choose_precision("fp32", CPU), narrowing=1.0)


# --- tokens, and which of them are learned


def test_the_table_is_gpt2s_own() -> None:
    assert [gpt2().decode_single_token_bytes(token) for token in IDS] == [
        text for _, text, _ in TABLE
    ]


def test_two_conversations_token_by_token(tokens: Tokens) -> None:
    assert tokens.ids.tolist() == IDS
    assert tokens.answers is not None and (tokens.answers != 0).tolist() == ANSWERS
    assert (tokens.documents, tokens.targets) == (2, sum(ANSWERS)) == (2, 13)


@pytest.mark.parametrize("length", [8, 24, 28])  # cut in a character, in an answer, at a border
def test_a_batch_holds_the_answers_as_targets_and_nothing_else(tokens: Tokens, length: int) -> None:
    wanted = [token if answer else IGNORE for token, answer in zip(IDS, ANSWERS, strict=True)]
    windows = (len(IDS) - 1) // length
    for step in range(3 * windows):
        x, y = batch_at(tokens, step, 0, batch_size=1, sequence_length=length, accumulate=1, seed=1)
        places = [
            start
            for start in range(len(IDS) - length)
            if IDS[start : start + length] == x[0].tolist()
            and wanted[start + 1 : start + length + 1] == y[0].tolist()
        ]
        assert len(places) >= 1
    found = validation_windows(tokens, batch_size=2, sequence_length=length)
    targets = [token for _, y in found for token in y.flatten().tolist()]
    assert targets == wanted[1:]


def test_a_prompt_in_the_template_has_the_tokens_of_training(tokens: Tokens) -> None:
    prompt = encode("User: Hi\nAssistant:").tolist()
    assert IDS[46:52] == prompt and ANSWERS[52]


# --- from the file to the gradient


def by_hand(model: GPT, lines: list[Any], batches: list[training_step.Batch]) -> torch.Tensor:
    """Mean loss over answers by torch's own formulas, the answers found in the text itself."""
    ids, answers = [], []
    for line in lines:
        ids.append(EOT)
        answers.append(False)
        for number, message in enumerate(line["messages"]):
            own = encode("\n" * (number > 0) + message["role"].capitalize() + ":").tolist()
            words = encode(f" {message['content']}").tolist()
            learned = message["role"] == "assistant"
            words += [EOT] * learned
            ids += own + words
            answers += [False] * len(own) + [learned] * len(words)
    total, count = torch.zeros(()), 0
    for x, _ in batches:
        for row in x:
            width = len(row)
            starts = [i for i in range(len(ids) - width) if ids[i : i + width] == row.tolist()]
            losses = F.log_softmax(model(row[None])[0].float(), dim=-1)
            for place in range(width):
                if answers[starts[0] + place + 1]:
                    total = total - losses[place, ids[starts[0] + place + 1]]
                    count += 1
    return total / count


def test_the_loss_and_every_gradient_are_those_of_the_answers(
    tmp_path: Path, state, train_config
) -> None:
    """From the file of conversations to the gradient: a mask lost anywhere between them shows."""
    lines = [FIRST, SECOND, said("user: Five", "assistant: and six"), FIRST | {"id": 3}]
    tokens = tokenized(tmp_path, lines)
    batches = loop.micro_batches(tokens, train_config, 0)
    expected = by_hand(state.model, lines, batches)
    wanted = torch.autograd.grad(expected, list(state.model.parameters()))
    mean = training_step.gradients(state, batches)
    assert mean.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, parameter), gradient in zip(state.model.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_what_a_user_says_last_is_in_no_gradient(tmp_path: Path, state, train_config) -> None:
    """Other words after the last answer, which no answer depends on, change nothing."""
    config = replace(train_config, batch_size=1, accumulate=1)
    found = []
    for name, last in (("a", "user: yes yes yes yes"), ("b", "user: no no no no")):
        (tmp_path / name).mkdir()
        tokens = tokenized(tmp_path / name, [said("user: Hi", "assistant: Ho ho ho", last)])
        width = len(tokens) - 1
        config = replace(config, sequence_length=width)
        training_step.gradients(state, loop.micro_batches(tokens, config, 0))
        # Inputs of the last words reach no target; the head and all before it see the answers.
        found.append(state.model.transformer.h[0].mlp.c_fc.weight.grad.clone())
        state.optimizer.zero_grad(set_to_none=True)
    assert torch.equal(*found) and found[0].abs().max() > 0


def test_training_lowers_the_answers_loss_and_not_the_prompts(
    tmp_path: Path, state, train_config
) -> None:
    draw = np.random.default_rng(0)

    def line() -> dict[str, Any]:
        asked = " ".join(draw.choice(["red", "blue", "green"], 6))
        return said(f"user: {asked}", "assistant: one two three four")

    tokens = tokenized(tmp_path, [line() for _ in range(60)])
    # Words of prompts that stand in no answer; what is moved of them comes by the tied embedding.
    prompts = replace(
        tokens, answers=np.isin(tokens.ids, tokens.ids[tokens.answers != 0], invert=True)
    )
    context, losses = Context(choose_precision("fp32", CPU), 4, 24), []
    for steps in (0, 40):
        config = replace(train_config, steps=steps, lr=0.01, warmup_steps=0)
        list(loop.fit(state, config, lambda step: loop.micro_batches(tokens, train_config, step)))
        losses.append(
            [dict(validation(state.model, t, context))["loss"] for t in (tokens, prompts)]
        )
    (answers, asked), (answers_after, asked_after) = losses
    assert answers_after < 0.3 * answers and asked_after > 0.6 * asked


def test_a_sequence_without_an_answer_is_never_computed(tmp_path: Path) -> None:
    long = "user: " + " word" * 200
    tokens = tokenized(tmp_path, [said(long, "assistant: yes") for _ in range(6)])
    windows = (len(tokens) - 1) // 16
    held = set()
    for step in range(windows):
        _, y = batch_at(tokens, step, 0, batch_size=1, sequence_length=16, accumulate=1, seed=3)
        assert (y != IGNORE).any()
        held |= {tuple(y[0].tolist())}
    assert len(held) >= 2  # some windows hold an answer, some the half of one
    assert windows > 60 > 2 * 6


@pytest.mark.parametrize("answers", [[1, 2], [40, 41], [7, 30, 55]])
def test_an_epoch_visits_every_sequence_with_an_answer(answers: list[int]) -> None:
    mask = np.zeros(65, np.uint8)
    mask[answers] = 1
    tokens = Tokens(np.arange(65, dtype=np.uint16), 0, "", 1, Path("made.bin"), mask)
    seen: set[int] = set()
    for step in range(8):
        _, y = batch_at(tokens, step, 0, batch_size=1, sequence_length=8, accumulate=1, seed=3)
        seen |= set(y.flatten().tolist()) - {IGNORE}
    assert seen == set(answers)


# --- validation and evaluation


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("limit", "count"), [(None, 13), (1, 1), (25, 1), (28, 3), (40, 7), (99, 13)]
)
def test_validation_has_the_answers_of_its_tokens_and_at_least_one(
    tokens: Tokens, limit: int | None, count: int, batch_size: int
) -> None:
    found = [
        token
        for _, y in validation_windows(
            tokens, batch_size=batch_size, sequence_length=8, limit=limit
        )
        for token in y.flatten().tolist()
        if token != IGNORE
    ]
    assert found == [token for token, _, answer in TABLE if answer][:count]


def test_evaluation_is_over_the_answers(tokens: Tokens) -> None:
    """Loss, bits per byte and the unigram baseline, against the numbers of a uniform model."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    got = dict(validation(model, tokens, Context(choose_precision("fp32", CPU), 2, 8)))
    guess = math.log(tokenizer.VOCAB_SIZE)
    text = len(" é 🦜".encode() + b" no\nUser: x" + b" Ho")
    assert got["loss"] == pytest.approx(guess, rel=1e-6)
    assert got["bits_per_byte"] == pytest.approx(10 * guess / math.log(2) / text, rel=1e-5)
    answers = [token for token, _, answer in TABLE if answer]
    seen = {token: answers.count(token) + 1 for token in answers}
    total = tokenizer.VOCAB_SIZE + len(answers)
    nats = [math.log(total / seen[token]) for token in answers]
    assert unigram_loss(tokens, tokens) == pytest.approx(sum(nats) / 13, rel=1e-12)


def test_sequences_and_documents_are_named_as_they_are_read(tokens: Tokens, train_config) -> None:
    config = replace(train_config, sequence_length=8, accumulate=1)
    x, _ = loop.micro_batches(tokens, config, 0)[0]
    text = token_spans.of_step(tokens, config, 0)
    for row in x.tolist():
        start = next(i for i in range(51) if IDS[i : i + 8] == row)
        document = 1 + (start >= 45), 1 + (start + 8 >= 45)
        where = f"document {document[0]}" if len({*document}) == 1 else "documents 1-2"
        assert f"{start}-{start + 8} ({where} of 2)" in text


# --- files


def test_the_answers_file_is_part_of_what_is_verified(tmp_path: Path) -> None:
    tokens = tokenized(tmp_path, [FIRST, SECOND])
    path = tmp_path / "tokens" / "train.answers"
    whole = path.read_bytes()
    assert whole == bytes(map(int, ANSWERS))
    path.write_bytes(whole[:5] + b"\1" + whole[6:])
    with pytest.raises(InputError, match=r"train\.bin: SHA-256 is"):
        token_files.open_tokens(tmp_path / "tokens", "train")
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"train\.answers: 58 bytes, meta\.json says 59 bytes"):
        token_files.open_tokens(tmp_path / "tokens", "train", verify=False)
    path.unlink()
    with pytest.raises(InputError, match=r"train\.answers: no such file"):
        token_files.open_tokens(tmp_path / "tokens", "train", verify=False)
    other = said(
        *(f"{m['role']}: {m['content']}" for m in FIRST["messages"][:-1]), "user: no\nUser: x"
    )
    assert tokenized(tmp_path, [other, SECOND]).sha256 != tokens.sha256


def test_counts_that_the_answers_do_not_bear_out_are_refused(tmp_path: Path) -> None:
    tokenized(tmp_path, [FIRST, SECOND])
    path = tmp_path / "tokens" / "meta.json"
    meta = json.loads(path.read_text())
    meta["splits"]["train"]["answers"] += 1
    path.write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"hold .*'answers': 13.* meta\.json says .*14"):
        token_files.open_tokens(tmp_path / "tokens", "train")


def test_conversations_without_the_answers_file_are_refused(tmp_path: Path) -> None:
    """As if a tokenizer had forgotten it: they would be learned as a whole."""
    tokenized(tmp_path, [FIRST, SECOND])
    path = tmp_path / "tokens" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["splits"]["train"]["answers"]
    path.write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"meta\.json: train: incomplete \('answers'\)"):
        token_files.open_tokens(tmp_path / "tokens", "train", verify=False)


def test_text_leaves_no_answers_file_and_takes_an_old_one_away(tmp_path: Path) -> None:
    tokenized(tmp_path, [FIRST])
    text = [Document("a", "train", "Some text."), Document("b", "val", "And more.")]
    token_writer.write_tokens(text, tmp_path / "tokens")
    names = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    assert names == ["meta.json", "train.bin", "val.bin"]
    assert token_files.open_tokens(tmp_path / "tokens", "train").answers is None


def test_files_do_not_depend_on_the_number_of_workers(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "x.jsonl", [FIRST, SECOND] * 20)
    metas = []
    for size, workers in ((1 << 18, 1), (50, 2)):  # in one batch, or each part in its own
        monkeypatch.setattr(token_writer, "BATCH_BYTES", size)
        read = corpus.documents(settings(path))
        metas.append(token_writer.write_tokens(read, tmp_path / str(workers), workers=workers))
    assert metas[0] == metas[1]
    for name in ("train.bin", "train.answers", "val.answers"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


# --- what is refused


MESSAGE = {"role": "assistant", "content": "x"}
BAD = [
    ("{", "line 2: not JSON"),
    ("[]", "line 2: an object is expected, got list"),
    ({"text": "x"}, "line 2: messages: a list of them is expected, got NoneType"),
    ({"messages": "x"}, "line 2: messages: a list of them is expected, got str"),
    ({"messages": []}, "line 2: no answer"),
    (said("user: x"), "line 2: no answer"),
    ({"messages": ["x"]}, "line 2: message 1: an object is expected, got str"),
    (
        {"messages": [MESSAGE, {"role": "tool", "content": "x"}]},
        "line 2: message 2: role='tool': expected one of system, user, assistant",
    ),
    ({"messages": [{"content": "x"}]}, "line 2: message 1: role=None: expected"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, r"message 1: role=\['user'\]: expected"),
    ({"messages": [MESSAGE | {"content": None}]}, "message 1: content: text is expected, got None"),
    ({"messages": [MESSAGE | {"content": []}]}, "message 1: content: text is expected, got list"),
    ({"messages": [MESSAGE | {"content": " \n"}]}, "message 1: an answer without words"),
    ({"messages": [MESSAGE | {"content": "a\0"}]}, "message 1: NUL character at 1"),
    ({"messages": [MESSAGE | {"weight": 0}]}, "message 1: weight=0: only words"),
    ({"messages": [MESSAGE | {"tool_calls": [1]}]}, r"message 1: tool_calls=\[1\]: only words"),
    (
        '{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}',
        "line 2: message 1: role stands more than once",
    ),
    (said(f"user: {'x' * PART_CHARACTERS}", "assistant: y"), "line 2: over 262,144 characters"),
]


@pytest.mark.parametrize(("line", "said_of_it"), BAD, ids=lambda value: str(value)[:40])
def test_a_line_that_is_no_conversation_is_refused_by_its_place(
    tmp_path: Path, line: Any, said_of_it: str
) -> None:
    path = tmp_path / "x.jsonl"
    bad = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{json.dumps(FIRST)}\n{bad}\n")
    for read in (corpus.check, lambda config: list(corpus.documents(config))):
        with pytest.raises(InputError, match=f"x.jsonl: {said_of_it}|{said_of_it}"):
            read(settings(path))


def test_all_that_is_wrong_is_one_error_and_an_empty_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [FIRST, said("user: x"), said("tool: x"), SECOND])
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(InputError) as caught:
        corpus.check(settings(tmp_path))
    first, second, third = str(caught.value).split("\n  ")
    assert "a.jsonl: line 2: no answer" in first and "a.jsonl: line 3: message 1" in second
    assert third.endswith("b.jsonl: no conversation in it")


def test_what_only_describes_a_conversation_is_passed_over(tmp_path: Path) -> None:
    message = MESSAGE | {"weight": 1, "name": "bot", "tool_calls": None}
    path = write(tmp_path / "x.jsonl", [{"id": 7, "messages": [message]}])
    assert [document.text for document in corpus.documents(settings(path))] == ["Assistant:", " x"]
