import argparse
import gzip
import inspect
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.compute.precision import choose_precision
from pipeline.data.token_files import Tokens
from pipeline.data.tokenizer import EOT, VOCAB_SIZE, encode, gpt2
from pipeline.errors import InputError
from pipeline.inference import evaluation
from pipeline.inference import multiple_choice as choices
from pipeline.inference.evaluation import TASKS, Context, evaluate, unigram_loss, validation
from pipeline.inference.multiple_choice import (
    CONTEXT_TOKENS,
    ENDING_TOKENS,
    Choice,
    choice_items,
    ending_nats,
    hellaswag_items,
    write_hellaswag,
)
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.loss import IGNORE, mean_loss
from pipeline.model.model_dir import save_model
from tests.helpers.ranks import needs_fork, together

VOCABULARY = 61
BLOCK = 16
CPU = torch.device("cpu")


def tiny(*, dropout: float = 0.0) -> GPT:
    model = GPT(GPTConfig(2, 4, 32, BLOCK, VOCABULARY, VOCABULARY + 3, dropout=dropout))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def unigram_model(probabilities: list[float]) -> GPT:
    """A GPT that gives each token its probability whatever came before."""
    model = GPT(GPTConfig(1, 1, 4, BLOCK, len(probabilities), len(probabilities) + 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.bias[0] = 1.0  # so the hidden state is (1, 0, 0, 0)
        model.transformer.wte.weight[:-1, 0] = torch.tensor(probabilities).log()
    return model


def split_of(ids: list[int] | np.ndarray) -> Tokens:
    return Tokens(np.array(ids, dtype=np.uint16), 0, "", 0, Path("val.bin"))


def few_tokens(count: int = 100) -> Tokens:
    return split_of(np.random.default_rng(1).integers(VOCABULARY, size=count))


def at(batch_size: int = 4, sequence_length: int = BLOCK, precision: str = "fp32") -> Context:
    return Context(choose_precision(precision, CPU), batch_size, sequence_length)


# --- validation


def test_validation_loss_is_the_mean_over_every_token_but_the_first():
    model, tokens = tiny(), few_tokens()
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    nats = []
    for first in range(0, len(ids) - 1, BLOCK):
        window = ids[first : first + BLOCK + 1]
        nats += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none").tolist()
    assert len(nats) == 99
    assert dict(validation(model, tokens, at()))["loss"] == pytest.approx(np.mean(nats), rel=1e-6)


def test_validation_loss_does_not_depend_on_the_batch_size():
    losses = [dict(validation(tiny(), few_tokens(), at(size)))["loss"] for size in (1, 3, 100)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_perplexity_and_bits_per_byte_follow_from_the_total_loss():
    model = GPT(GPTConfig(1, 1, 4, BLOCK))
    torch.nn.init.zeros_(model.transformer.wte.weight)  # every token equally likely
    text = "Naïve 東京, tokens of many lengths, antidisestablishmentarianism."
    tokens = split_of([EOT, *encode(text), EOT, *encode("two")])
    values = dict(validation(model, tokens, at()))
    targets, text_bytes = len(tokens) - 2, len(text.encode()) + len("two")
    assert targets != text_bytes
    assert values["loss"] == pytest.approx(math.log(VOCAB_SIZE), rel=1e-6)
    assert values["perplexity"] == pytest.approx(VOCAB_SIZE, rel=1e-5)
    bits = targets * math.log2(VOCAB_SIZE)
    assert values["bits_per_byte"] == pytest.approx(bits / text_bytes, rel=1e-6)


def test_bits_per_byte_equal_transformers_over_the_targets_that_are_text(tmp_path):
    from transformers import GPT2LMHeadModel

    model = GPT(GPTConfig(2, 2, 32, BLOCK))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    texts = [f"Document {n}: naïve 東京, {'and so on ' * n}" for n in range(9)]
    ids = [token for text in texts for token in (EOT, *encode(text).tolist())]
    save_model(model, tmp_path / "model")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "model").double().eval()
    nats, borders = 0.0, 0.0
    for first in range(0, len(ids) - 1, BLOCK):
        window = torch.tensor(ids[first : first + BLOCK + 1])
        with torch.no_grad():
            losses = F.cross_entropy(
                theirs(window[None, :-1]).logits[0], window[1:], reduction="none"
            )
        nats += losses[window[1:] != EOT].sum().item()
        borders += losses[window[1:] == EOT].sum().item()
    values = dict(validation(model, split_of(ids), at()))
    assert values["loss"] == pytest.approx((nats + borders) / (len(ids) - 1), rel=1e-7)
    text_bytes = sum(len(text.encode()) for text in texts)
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-7)
    assert borders > 0.01 * nats


def test_a_loss_beyond_the_range_of_exp_has_infinite_perplexity(monkeypatch):
    monkeypatch.setattr(evaluation, "mean_loss", lambda *args: 800.0)
    assert dict(validation(tiny(), few_tokens(), at()))["perplexity"] == math.inf


def test_mean_loss_counts_valid_targets_only():
    model, generator = tiny(), torch.Generator().manual_seed(2)
    x, y = torch.randint(VOCABULARY, (2, 3, 8), generator=generator)
    y[0, :5] = IGNORE
    y[2] = IGNORE
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE).item()
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    assert mean_loss(model, batches, at().precision, CPU) == pytest.approx(expected, rel=1e-6)


def test_mean_loss_of_no_target_is_not_a_number():
    assert math.isnan(mean_loss(tiny(), [], at().precision, CPU))


def test_evaluation_uses_no_chance_and_leaves_the_model_in_training():
    model = tiny(dropout=0.5).train()
    material = {"validation": few_tokens(), "choice": toy_items()}
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    values = evaluate(model, material, at())
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert values == evaluate(tiny(), material, at()), "dropout is off meanwhile"


def test_an_interrupted_evaluation_leaves_the_model_in_training():
    model = tiny().train()
    too_large = split_of([VOCABULARY + 50] * 40)
    with pytest.raises(IndexError):
        evaluate(model, {"validation": too_large}, at())
    assert model.training and torch.is_grad_enabled()


def test_evaluation_computes_at_the_precision_asked_for():
    material = {"validation": few_tokens(), "choice": toy_items()}
    nats = {p: ending_nats(tiny(), toy_items(), at(precision=p)) for p in ("fp32", "bf16", "tf32")}
    losses = {p: evaluate(tiny(), material, at(precision=p))["validation/loss"] for p in nats}
    for low in ("bf16", "tf32"):
        assert losses[low] != losses["fp32"] and (nats[low] != nats["fp32"]).any()
        assert losses[low] == pytest.approx(losses["fp32"], rel=0.01)
        assert nats[low] == pytest.approx(nats["fp32"], rel=0.05)
    fp8 = evaluate(tiny(), material, at(precision="fp8"))["validation/loss"]
    assert fp8 != losses["bf16"] and fp8 == pytest.approx(losses["fp32"], rel=0.05)


# --- unigram


def test_unigram_loss_is_the_cross_entropy_of_smoothed_training_counts():
    train, val = split_of([7, 7, 7, 9]), split_of([5, 7, 9, 5])  # the first is no target
    all_counts = 4 + VOCAB_SIZE
    nats = [math.log(all_counts / (count + 1)) for count in (3, 1, 0)]
    assert unigram_loss(train, val) == pytest.approx(sum(nats) / 3, rel=1e-12)


def test_unigram_loss_counts_the_first_training_tokens_of_a_large_split(monkeypatch):
    monkeypatch.setattr(evaluation, "COUNTED", 3)
    val = split_of([5, 7, 9, 5])
    assert unigram_loss(split_of([7, 7, 7, 9]), val) == unigram_loss(split_of([7, 7, 7]), val)


def test_figures_over_a_split_do_not_depend_on_the_piece_looked_at(monkeypatch):
    train, val = few_tokens(50), few_tokens(31)
    whole = unigram_loss(train, val), evaluation.target_bytes(val)
    monkeypatch.setattr(evaluation, "_CHUNK", 7)
    assert (unigram_loss(train, val), evaluation.target_bytes(val)) == whole


# --- multiple choice


def toy_items() -> list[Choice]:
    """For probabilities 1/2, 1/4, 1/8, 1/8: endings in bits, and in bits a token.

    [0, 0, 0] 3 and 1; [1] 2 and 2; [2, 3] 6 and 3; [3] 3 and 3.
    """
    mean_only = Choice((1, 2), ((1,), (0, 0, 0), (2, 3), (3,)), 1)
    sum_only = Choice((3,), ((2, 3), (3,), (0, 0, 0), (1,)), 3)
    both = Choice((0, 1, 2), ((0,), (1,), (2, 3), (3,)), 0)
    return [mean_only, sum_only, both, mean_only, mean_only]


def test_acc_and_acc_norm_of_a_hand_computed_model():
    model = unigram_model([1 / 2, 1 / 4, 1 / 8, 1 / 8])
    values = dict(TASKS["choice"](model, toy_items(), at()))
    assert values == {
        "count": 5,
        "acc": pytest.approx(2 / 5),
        "acc_stderr": pytest.approx(math.sqrt(2 / 5 * 3 / 5 / 5)),
        "acc_norm": pytest.approx(4 / 5),
        "acc_norm_stderr": pytest.approx(math.sqrt(4 / 5 * 1 / 5 / 5)),
        "acc_per_token": pytest.approx(4 / 5),  # every token of the toy is one character
        "acc_per_token_stderr": pytest.approx(math.sqrt(4 / 5 * 1 / 5 / 5)),
    }


@pytest.mark.parametrize(("metric", "chosen"), [("acc", 0), ("acc_norm", 2), ("acc_per_token", 1)])
def test_acc_norm_counts_characters_without_the_first_space_and_acc_per_token_tokens(
    metric, chosen
):
    # Bits, characters, tokens: ! 2.2, 1, 1; "" 3.2, 2, 2; hein 4.8, 4, 2; " the" 4, 3, 1. With
    # the space counted, " the" would cost a bit a character and be taken.
    endings, bits = ((0,), (1, 1), (258, 259), (262,)), {0: 2.2, 1: 1.6, 258: 2.4, 259: 2.4, 262: 4}
    assert [gpt2().decode(ending) for ending in endings] == ["!", '""', "hein", " the"]
    rest = (1 - sum(2**-b for b in bits.values())) / (263 - len(bits))
    model = unigram_model([2 ** -bits[token] if token in bits else rest for token in range(263)])
    shares = []
    for label in range(4):
        values = dict(TASKS["choice"](model, [Choice((5,), endings, label)], at()))
        shares.append(values[metric])
    assert shares == [float(label == chosen) for label in range(4)]


def test_ending_nats_of_a_hand_computed_model():
    nats = ending_nats(unigram_model([1 / 2, 1 / 4, 1 / 8, 1 / 8]), toy_items()[:2], at())
    assert nats / math.log(2) == pytest.approx(np.array([[2, 3, 6, 3], [6, 3, 3, 2]]))


def some_items(longest_context: int = 9) -> list[Choice]:
    draw = np.random.default_rng(4)

    def text(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.integers(VOCABULARY, size=draw.integers(low, high + 1)).tolist())

    return [
        Choice(text(1, longest_context), tuple(text(1, 7) for _ in range(4)), int(draw.integers(4)))
        for _ in range(5)
    ]


def one_by_one(model: GPT, context: tuple[int, ...], ending: tuple[int, ...]) -> float:
    """The formula without batches or padding: each ending token behind all before it."""
    total = 0.0
    for place, token in enumerate(ending):
        seen = torch.tensor([[*context, *ending[:place]]])
        total -= model(seen)[0, -1].log_softmax(-1)[token].item()
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_ending_nats_equal_the_formula_whatever_the_batch_and_its_padding(batch_size):
    model, items = tiny(), some_items()
    expected = [[one_by_one(model, item.context, e) for e in item.endings] for item in items]
    assert ending_nats(model, items, at(batch_size)) == pytest.approx(np.array(expected), rel=1e-4)


def test_a_context_that_does_not_fit_is_cropped_from_the_left():
    model, window = tiny(), 10
    items = some_items(longest_context=30)
    assert max(len(item.context) for item in items) > BLOCK
    expected = [
        # The last ending token is a target only, so one more token fits.
        [one_by_one(model, item.context[-(window + 1 - len(e)) :], e) for e in item.endings]
        for item in items
    ]
    nats = ending_nats(model, items, at(sequence_length=window))
    assert nats == pytest.approx(np.array(expected), rel=1e-4)


def test_an_ending_that_does_not_fit_is_refused():
    item = Choice((1,), ((1,), (2,), (3,), (4,) * 17), 0)
    with pytest.raises(InputError, match="17 tokens, expected at most sequence_length=16"):
        dict(TASKS["choice"](tiny(), [item], at()))


def test_no_items_have_a_count_and_no_accuracy():
    assert dict(TASKS["choice"](tiny(), [], at())) == {"count": 0}


def test_results_are_named_after_task_and_metric():
    tasks = {"validation": few_tokens(), "hellaswag_nanogpt": toy_items(), "choice": toy_items()}
    names = evaluate(tiny(), tasks, at())
    accuracies = ["count", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr"]
    assert list(names) == [
        "validation/loss",
        "validation/perplexity",
        "validation/bits_per_byte",
        *(f"hellaswag_nanogpt/{name}" for name in accuracies),
        *(f"choice/{name}" for name in accuracies),
        "choice/acc_per_token",
        "choice/acc_per_token_stderr",
    ]
    assert set(TASKS) == {"validation", "choice", "hellaswag_nanogpt", "hellaswag_harness"}


def test_hellaswags_acc_norm_is_by_tokens_as_build_nanogpt_and_by_characters_as_the_harness():
    """The toy of a hand-computed model: each ending has tokens of one character, but the last."""
    model = unigram_model([1 / 2, 1 / 4, 1 / 8, 1 / 8])
    items, by_two = toy_items(), [replace(item, moved=1) for item in toy_items()]
    nanogpt, harness = TASKS["hellaswag_nanogpt"], TASKS["hellaswag_harness"]
    assert dict(nanogpt(model, items, at())) == dict(harness(model, items, at()))
    # One character less of each ending: those of a single token have none, and are never chosen.
    assert dict(nanogpt(model, by_two, at())) == dict(nanogpt(model, items, at()))
    assert dict(harness(model, by_two, at()))["acc_norm"] == pytest.approx(3 / 5)


def alike_and_not() -> list[Choice]:
    """Items of many lengths, some that have to be cropped, some there twice."""
    return [*some_items(), *some_items(longest_context=30), *some_items()[:2]]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_order_of_the_items_changes_no_bit(batch_size):
    items = alike_and_not()
    nats = ending_nats(tiny(), items, at(batch_size))
    order = np.random.default_rng(0).permutation(len(items))
    again = ending_nats(tiny(), [items[place] for place in order], at(batch_size))
    assert (again == nats[order]).all()


def test_padding_is_behind_endings_alone_and_a_batch_holds_no_more_tokens_than_asked():
    parts = [*choices._parts(alike_and_not(), BLOCK)]
    batches = [*choices._batches(parts, 4 * BLOCK)]
    assert sorted(row for batch in batches for part in batch for row in part.rows) == list(
        range(4 * len(alike_and_not()))
    )
    for batch in batches:
        assert len({(len(part.start), len(part.endings)) for part in batch}) == 1
        width = len(batch[0].start) + max(len(e) for part in batch for e in part.endings)
        rows = sum(len(part.endings) for part in batch)
        assert width <= BLOCK + 1 and (len(batch) == 1 or rows * width <= 4 * BLOCK)
    assert len(batches) < len(parts)


def test_the_share_that_is_done_grows_to_the_whole():
    heard: list[tuple[str, float]] = []
    watched = replace(at(), progress=lambda *said: heard.append(said))
    evaluate(tiny(), {"validation": few_tokens(), "choice": alike_and_not()}, watched)
    for task in ("validation", "choice"):
        shares = [share for name, share in heard if name == task]
        assert shares == sorted(shares) and 0 < shares[0] < shares[-1] == 1


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_have_the_bits_of_one_and_share_the_work(world):
    tasks = {"validation": few_tokens(200), "choice": alike_and_not()}

    def work(ranks):
        counted: list[float] = []
        its = replace(at(2), ranks=ranks, progress=lambda _, share: counted.append(share))
        return [evaluate(tiny(), tasks, its), len(counted)]

    alone: list[float] = []
    one = evaluate(tiny(), tasks, replace(at(2), progress=lambda _, share: alone.append(share)))
    found = together(world, work)
    assert [results for results, _ in found] == [one] * world
    assert sum(count for _, count in found) == len(alone)
    assert max(count for _, count in found) <= len(alone) / world + 2


# --- items made offline


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """Some 60,000 tokens of words at random with code and blanks among them.

    Not this Python's documentation: each version repeats other passages of its own.
    """
    draw = random.Random(7)
    vocabulary = [gpt2().decode([token]) for token in range(EOT)]
    words = [word for word in vocabulary if re.fullmatch(" [a-z]{2,}", word)]

    def prose() -> str:
        sentences = ["".join(draw.choices(words, k=draw.randint(4, 20))) for _ in range(6)]
        return "".join(f" {text.strip().capitalize()}." for text in sentences).strip()

    def code() -> str:
        a, b, c = (word.strip() for word in draw.sample(words, 3))
        return f"    for {a} in {b}:\n        {c}({a}, {draw.random():.3f})\n\n    return {b}"

    lengths = [draw.randint(2, 20) for _ in range(60)]
    return [
        encode("\n\n".join(f"{prose()}\n\n{code()}" for _ in range(length))).tolist()
        for length in lengths
    ]


@pytest.fixture(scope="module")
def docs_split(documents) -> Tokens:
    return split_of([token for text in documents for token in (EOT, *text)])


def places(documents: list[list[int]], part: tuple[int, ...]) -> list[tuple[int, int]]:
    """(document, first token) of every occurrence."""
    found = []
    for document, text in enumerate(documents):
        starts = (i for i, token in enumerate(text) if token == part[0])
        found += [(document, i) for i in starts if tuple(text[i : i + len(part)]) == part]
    return found


def test_sixty_thousand_tokens_make_more_than_200_items(docs_split):
    items = choice_items(docs_split, 200, seed=7)
    assert len(items) == 200
    assert len(choice_items(docs_split, 10_000, seed=7)) > 400


def test_the_labelled_ending_continues_its_context_and_the_others_come_from_elsewhere(
    docs_split, documents
):
    for item in choice_items(docs_split, 40, seed=7):
        homes = {document for document, _ in places(documents, item.context)}
        for number, ending in enumerate(item.endings):
            follows = bool(places(documents, item.context + ending))
            assert follows == (number == item.label)
            assert len(ending) == ENDING_TOKENS and len(set(item.endings)) == 4
            if number != item.label:
                assert {document for document, _ in places(documents, ending)} - homes
        assert len(item.context) == CONTEXT_TOKENS
        assert EOT not in item.context and all(EOT not in ending for ending in item.endings)


def odd_blanks() -> list[str]:
    """Words between blanks of every kind, some of them after line ends and in runs."""
    draw = random.Random(5)
    blanks = [" ", " ", " ", "\n", "\n ", "  ", "\t ", "\u3000", "\u3000 ", "\xa0", "\xa0 "]
    return ["".join(f"word{n}" + draw.choice(blanks) for n in range(900)) for _ in range(4)]


@pytest.mark.parametrize(
    "texts",
    [
        lambda: list(topics.values()),
        lambda: [inspect.getsource(module) for module in (argparse, json, random, inspect)],
        odd_blanks,
    ],
    ids=["documentation", "source", "blanks"],
)
def test_no_part_of_an_item_ends_in_white_space(texts):
    split = split_of([token for text in texts() for token in (EOT, *encode(text).tolist())])
    items = choice_items(split, 200, seed=7)
    assert len(items) > 20
    for item in items:
        for part in (item.context, *item.endings):
            assert not gpt2().decode(part)[-1].isspace(), repr(gpt2().decode(part))


def test_items_do_not_overlap(docs_split, documents):
    taken: set[tuple[int, int]] = set()
    for item in choice_items(docs_split, 100, seed=7):
        spots = places(documents, item.context + item.endings[item.label])
        if len(spots) == 1:  # a passage that the text repeats could be either
            document, first = spots[0]
            span = {(document, first + i) for i in range(CONTEXT_TOKENS + ENDING_TOKENS)}
            assert not span & taken
            taken |= span
    assert len(taken) > 80 * (CONTEXT_TOKENS + ENDING_TOKENS)


def test_the_true_ending_stands_anywhere(docs_split):
    labels = [item.label for item in choice_items(docs_split, 200, seed=7)]
    assert min(np.bincount(labels, minlength=4)) > 30


def test_items_follow_from_the_seed(docs_split):
    items = choice_items(docs_split, 20, seed=7)
    np.random.seed(0)
    assert items == choice_items(docs_split, 20, seed=7)
    assert items != choice_items(docs_split, 20, seed=8)


def test_a_single_document_gives_its_own_other_passages(documents):
    longest = max(documents, key=len)
    items = choice_items(split_of([EOT, *longest]), 5, seed=7)
    assert len(items) == 5 and all(len(set(item.endings)) == 4 for item in items)


def test_repeated_documents_give_no_item_the_same_ending_twice(documents):
    longest = max(documents, key=len)[:600]
    items = choice_items(split_of([EOT, *longest] * 6), 40, seed=7)
    assert items and all(len(set(item.endings)) == 4 for item in items)


def test_a_split_too_short_gives_fewer_items_or_none(documents):
    longest = max(documents, key=len)
    assert choice_items(split_of([EOT]), 5, seed=7) == []
    assert choice_items(split_of([EOT, *longest[:63]]), 5, seed=7) == []
    assert 0 < len(choice_items(split_of([EOT, *longest[:600]]), 50, seed=7)) < 10


def test_made_items_read_the_same_through_hellaswags_format(docs_split, tmp_path):
    # Its characters take several tokens, so that a cut may fall inside one.
    odd = [EOT, *encode(" ".join("語🦊ŋ"[: 1 + i % 3] + str(i) for i in range(700)))]
    items = choice_items(split_of([*docs_split.ids, *odd]), 10_000, seed=7)
    write_hellaswag(items, tmp_path / "made.jsonl")
    assert hellaswag_items(tmp_path / "made.jsonl") == items


# --- HellaSwag's file format


def row(**changes: object) -> dict[str, object]:
    plain = {"ind": 24, "ctx": "A man stands. He", "endings": ["a b", "c", "d", "e"], "label": 2}
    return {key: value for key, value in (plain | changes).items() if value is not None}


def file_of(tmp_path: Path, *rows: dict[str, object]) -> Path:
    path = tmp_path / "hellaswag.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_an_ending_is_encoded_with_the_space_before_it(tmp_path):
    (item,) = hellaswag_items(file_of(tmp_path, row()))
    assert gpt2().decode(item.context) == "A man stands. He"
    assert item.endings[0] == tuple(gpt2().encode_ordinary(" a b"))
    assert item.label == 2


def test_a_missing_ctx_is_ctx_a_and_ctx_b(tmp_path):
    parts = row(ctx=None, ctx_a="A man stands.", ctx_b="He")
    alone = row(ctx=None, ctx_a="A man stands.", ctx_b="")
    both, first = hellaswag_items(file_of(tmp_path, parts, alone))
    assert gpt2().decode(both.context) == "A man stands. He"
    assert gpt2().decode(first.context) == "A man stands."


@pytest.mark.fault(66)
def test_an_empty_ctx_is_ctx_a_and_ctx_b(tmp_path):
    parts = {"ctx_a": "A man stands.", "ctx_b": "He"}
    (item,) = hellaswag_items(file_of(tmp_path, row(ctx="", **parts)))
    assert gpt2().decode(item.context) == "A man stands. He"


@pytest.mark.parametrize("parts", [{"ctx_a": 5, "ctx_b": "He"}, {"ctx_a": ""}, {"ctx_b": ["a"]}])
def test_parts_of_a_context_that_are_no_text_are_refused(tmp_path, parts):
    with pytest.raises(InputError, match="line 1: ctx=''"):
        hellaswag_items(file_of(tmp_path, row(ctx="", **parts)))


@pytest.mark.fault(66)
def test_a_byte_order_mark_and_a_packed_file_are_read(tmp_path):
    plain = file_of(tmp_path, row(), row(label=1))
    items = hellaswag_items(plain)
    content = b"\xef\xbb\xbf" + plain.read_bytes()
    plain.write_bytes(content)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(content))
    assert hellaswag_items(plain) == hellaswag_items(tmp_path / "packed.jsonl.gz") == items


@pytest.mark.fault(66)
def test_a_packed_file_that_is_cut_short_is_one_error(tmp_path):
    content = gzip.compress(file_of(tmp_path, *[row(ind=i) for i in range(99)]).read_bytes())
    (tmp_path / "packed.jsonl.gz").write_bytes(content[:-20])
    with pytest.raises(InputError, match="packed.jsonl.gz: not a whole gzip file") as caught:
        hellaswag_items(tmp_path / "packed.jsonl.gz")
    assert "\n" not in str(caught.value)


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(ctx="a\0b"), "line 2: ctx: NUL character at 1"),
        (row(endings=["a", "b\ud800", "c", "d"]), r"line 2: endings: lone surrogate U\+D800"),
    ],
)
def test_an_item_that_is_no_text_is_refused_as_a_corpus_is(tmp_path, bad, message):
    with pytest.raises(InputError, match=message):
        hellaswag_items(file_of(tmp_path, row(), bad))


def test_a_file_larger_than_hellaswag_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "HELLASWAG_BYTES", 300)
    with pytest.raises(InputError, match="expected at most 300 bytes"):
        hellaswag_items(file_of(tmp_path, *[row()] * 5))


def published(**changes: object) -> dict[str, object]:
    """An item with marks of WikiHow and all that the harness makes a context of."""
    parts = {
        "ctx": "unused",
        "ctx_a": "[header] How to sit [title] Find a chair.  Now",
        "ctx_b": "a Man",
    }
    endings = ["[step] sits.", " stands [substeps] up. ", "is  tall", "[step] "]
    return row(activity_label="Sitting", endings=endings, **parts) | changes


def test_the_harness_puts_the_activity_first_and_takes_marks_out(tmp_path):
    (item,) = hellaswag_items(file_of(tmp_path, published()), edited=True)
    assert gpt2().decode(item.context) == "Sitting: How to sit. Find a chair. Now A man"
    texts = [gpt2().decode(ending) for ending in item.endings]
    assert texts == ["  sits.", " stands up.", " is tall", " "]
    assert item.characters() == [6, 10, 7, 0]  # an ending without words is never chosen


def test_white_space_at_the_end_of_the_harness_context_is_scored_and_not_counted(tmp_path):
    (item,) = hellaswag_items(file_of(tmp_path, published(ctx_b="he [step]")), edited=True)
    assert gpt2().decode(item.context).endswith("Now He")
    assert gpt2().decode(item.endings[2]) == "  is tall"
    assert item.moved == 1 and item.characters()[2] == 7


def test_a_file_without_what_the_harness_needs_has_no_such_items_and_a_warning(tmp_path, caplog):
    path = file_of(tmp_path, published(), row())
    assert len(hellaswag_items(path)) == 2
    assert hellaswag_items(path, edited=True) == []
    assert "line 2: expected activity_label, ctx_a, ctx_b as texts" in caplog.text


def test_labels_as_text_and_blank_lines_are_taken(tmp_path):
    path = file_of(tmp_path, row(label="3"))
    path.write_text("\n" + path.read_text("utf-8") + "\r\n\n", encoding="utf-8")
    assert [item.label for item in hellaswag_items(path)] == [3]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(ctx=None), "ctx="),
        (row(ctx=5), "ctx=5"),
        (row(ctx=""), "ctx=''"),
        (row(endings=["a", "b", "c"]), "endings="),
        (row(endings=["a", "b", "c", 4]), "endings="),
        (row(endings=["a", "b", "c", ""]), "endings="),
        (row(endings=None), "endings=None"),
        (row(label=4), "label=4"),
        (row(label=""), "label=''"),
        (row(label=True), "label=True"),
        (row(label=1.0), "label=1.0"),
        (row(label=None), "label=None"),
    ],
)
def test_a_bad_field_is_reported_with_line_and_name(tmp_path, bad, message):
    path = file_of(tmp_path, row(), bad)
    with pytest.raises(InputError) as error:
        hellaswag_items(path)
    assert "hellaswag.jsonl: line 2: " + message in str(error.value)


@pytest.mark.parametrize("line", ["{", "[1]", "null", '"text"'])
def test_a_line_that_is_no_object_is_reported(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1: "):
        hellaswag_items(path)


def test_a_file_that_cannot_be_read_is_reported(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    for path, message in (
        (tmp_path, "cannot be read: expected a regular file"),
        (tmp_path / "none.jsonl", "none.jsonl: cannot be read: No such file"),
        (tmp_path / "latin.jsonl", "latin.jsonl: line 1: invalid UTF-8 at byte 0 of the file"),
    ):
        with pytest.raises(InputError, match=message):
            hellaswag_items(path)
    with pytest.raises(InputError, match="no items"):
        hellaswag_items(tmp_path / "empty.jsonl")
