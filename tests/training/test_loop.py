"""The step: accumulation, clipping, scaling, skipping, stopping; the loop: reports and order."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace

import pytest
import torch

from pipeline.compute import precision
from pipeline.compute.precision import choose_precision
from pipeline.errors import InputError, NumericsError
from pipeline.model import loss
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.loss import IGNORE, token_losses
from pipeline.training import loop, training_step
from pipeline.training.optimizers import parameter_groups
from tests.helpers.memory import release
from tests.helpers.steps import one_step

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=97, vocab_rows=128)
CPU = torch.device("cpu")


@pytest.fixture
def model(make_config) -> GPT:
    made = GPT(SHAPE)
    initialize(made, make_config().init, torch.Generator().manual_seed(0))
    return made


@pytest.fixture
def train_config(make_config):
    return make_config(train__steps=4, train__warmup_steps=1).train


def batch(rows: int, seed: int = 0, ignored: int = 0) -> training_step.Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(97, (rows, 16), generator=generator)
    y = torch.randint(97, (rows, 16), generator=generator)
    y.view(-1)[:ignored] = IGNORE
    return x, y


def start(model: GPT, config, name: str = "fp32") -> training_step.TrainState:
    return training_step.start(
        copy.deepcopy(model), config, choose_precision(name, CPU), narrowing=1.0
    )


def weights(state: training_step.TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def test_ragged_micro_batches_of_one_equal_one_batch(model, train_config) -> None:
    x, y = batch(4, ignored=23)
    whole, parts = start(model, train_config), start(model, train_config)
    one = one_step(whole, [(x, y)], 1e-3, 1.0)
    four = one_step(parts, [(x[i : i + 1], y[i : i + 1]) for i in range(4)], 1e-3, 1.0)
    assert four.loss == pytest.approx(one.loss, rel=1e-5)
    assert four.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    # Adam's first step is lr * sign(gradient): where that is rounding noise signs may differ.
    assert (weights(parts) - weights(whole)).abs().mean() < 1e-6


def test_the_logged_loss_covers_every_micro_batch(model, train_config) -> None:
    first, second = batch(2, seed=1), batch(2, seed=2)
    losses = [
        one_step(start(model, train_config), batches, 1e-3, 1.0).loss
        for batches in ([first], [second], [first, second])
    ]
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-6)
    assert losses[0] != losses[1]


def test_the_norm_is_reported_before_clipping_and_the_update_uses_the_clipped_one(
    model, train_config
) -> None:
    # SGD, since Adam would hide the length of a gradient.
    states = [start(model, train_config) for _ in range(2)]
    for state in states:
        state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
    before = weights(states[0])
    norm = one_step(states[0], [batch(2)], 1.0, 0.0).grad_norm
    assert (weights(states[0]) - before).norm().item() == pytest.approx(norm, rel=1e-4)
    assert one_step(states[1], [batch(2)], 1.0, norm / 4).grad_norm == pytest.approx(norm)
    assert (weights(states[1]) - before).norm().item() == pytest.approx(norm / 4, rel=1e-4)


def of_every_parameter(
    state: training_step.TrainState, batches: list[training_step.Batch]
) -> torch.Tensor:
    training_step.gradients(state, batches)
    return torch.cat([p.grad.flatten() for p in state.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_equal_the_plain_formulas_in_every_precision(
    model, train_config, monkeypatch, name: str, accumulate: int
) -> None:
    """Look-up by rows, one-buffer loss and all, with ragged masks, against autograd's own way."""
    monkeypatch.setattr(precision, "_cpu_capabilities", dict)  # the same roundings on every CPU
    batches = [batch(2, seed=seed, ignored=5 * seed) for seed in range(accumulate)]
    ours, plain = start(model, train_config, name), start(model, train_config, name)

    def formula(x, y, factor):
        return token_losses(plain.model(x), y).sum() * factor

    plain.loss_function = formula
    found, expected = of_every_parameter(ours, batches), of_every_parameter(plain, batches)
    # What fp32 leaves open in its last bits a low format rounds up or down; tf32 logits' gradients
    # are rounded before they are scaled. Half a unit of the formats: 2e-3, and twice 2.4e-4.
    bound = {"fp32": 2e-6, "tf32": 5e-4, "bf16": 2e-3, "fp16": 5e-4}[name]
    assert ((found - expected).norm() / expected.norm()).item() < bound


def test_the_look_ups_gradient_reaches_its_rows_before_and_after_the_heads(model) -> None:
    wte, (idx, _) = model.transformer.wte, batch(3)
    outer = torch.randn(*idx.shape, SHAPE.n_embd, generator=torch.Generator().manual_seed(3))
    (wte(idx) * outer).sum().backward()  # tokens occur more than once in 48
    expected, wte.weight.grad = wte.weight.grad, None
    for before in (None, torch.ones_like(wte.weight)):
        wte.weight.grad = before
        (loss.look_up(wte, idx) * outer).sum().backward()
        base = 0 if before is None else 1
        torch.testing.assert_close(wte.weight.grad, expected + base, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert loss.look_up(wte, idx) is None, "the model looks up by itself"


def test_a_frozen_embedding_gets_no_gradient_and_the_rest_the_same(model, train_config) -> None:
    free = start(model, train_config)
    model.transformer.wte.weight.requires_grad_(False)
    frozen = start(model, train_config)
    everything = of_every_parameter(free, [batch(2)])
    assert torch.equal(
        of_every_parameter(frozen, [batch(2)]), everything[SHAPE.vocab_rows * SHAPE.n_embd :]
    )
    assert frozen.model.transformer.wte.weight.grad is None


def test_the_tied_gradient_keeps_its_memory_from_step_to_step(model, train_config) -> None:
    state, places = start(model, train_config), []

    def look(state: training_step.TrainState) -> None:
        places.append(state.model.transformer.wte.weight.grad.data_ptr())

    release()
    for seed in range(3):
        one_step(state, [batch(2, seed)], 1e-3, 1.0, look)
        with torch.no_grad():  # a validation in between takes nothing away
            state.loss_function(*batch(2), torch.ones(()))
    assert len(set(places)) == 1


def test_clipping_inside_the_fused_kernel_equals_a_pass_of_its_own(model, train_config) -> None:
    fused, passes = start(model, train_config), start(model, train_config)
    for seed in range(3):
        norm = one_step(fused, [batch(2, seed)], 1e-3, 0.1).grad_norm
        training_step.gradients(passes, [batch(2, seed)])
        for group in passes.optimizer.param_groups:
            group["lr"] = 1e-3
        before = torch.nn.utils.clip_grad_norm_(passes.model.parameters(), 0.1).item()
        assert norm == pytest.approx(before, rel=1e-6) and norm > 0.1
        passes.optimizer.step()
        passes.optimizer.zero_grad()
        assert not hasattr(fused.optimizer, "grad_scale"), "the next step would be scaled, too"
    for ours, theirs in zip(
        fused.optimizer.state.values(), passes.optimizer.state.values(), strict=True
    ):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-9)
    assert (weights(fused) - weights(passes)).abs().mean() < 1e-6


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_a_gradient_within_the_limit_is_not_touched(model, train_config, limit: float) -> None:
    clipped, free = start(model, train_config), start(model, train_config)
    one_step(clipped, [batch(2)], 1e-3, limit)
    training_step.gradients(free, [batch(2)])
    for group in free.optimizer.param_groups:
        group["lr"] = 1e-3
    free.optimizer.step()
    assert torch.equal(weights(clipped), weights(free))


def test_fp16_clips_the_same_gradient_at_scales_1_and_65536(model, train_config) -> None:
    norms, moved = [], []
    for scale in (1.0, 65536.0):
        state = start(model, train_config, "fp16")
        state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        before = weights(state)
        norms.append(one_step(state, [batch(2)], 1.0, 0.1).grad_norm)
        moved.append(weights(state) - before)
    assert norms[0] == pytest.approx(norms[1], rel=5e-3)
    assert moved[0].norm().item() == pytest.approx(0.1, rel=1e-3)
    assert (moved[0] - moved[1]).norm().item() < 5e-3 * moved[0].norm().item()


def poison(state: training_step.TrainState, value: float) -> None:
    """Make one gradient `value` in every backward pass from now on."""
    state.model.transformer.ln_f.bias.register_hook(lambda g: torch.full_like(g, value))


def test_an_inf_gradient_leaves_parameters_alone_and_halves_the_scale(model, train_config) -> None:
    state = start(model, train_config, "fp16")
    poison(state, math.inf)
    before = weights(state)
    made = one_step(state, [batch(2)], 1e-3, 1.0)
    assert made.skipped and math.isinf(made.grad_norm)
    assert torch.equal(weights(state), before)
    assert state.scaler.get_scale() == made.loss_scale / 2


def test_a_skipped_step_is_reported_and_uses_up_its_place_in_the_schedule(
    model, make_config
) -> None:
    config = make_config(train__steps=3, train__warmup_steps=2, train__max_skipped=3).train
    state = start(model, config, "fp16")
    state.model.transformer.ln_f.bias.register_hook(
        lambda g: torch.full_like(g, math.inf) if state.step == 0 else g
    )
    reports = list(loop.fit(state, config, lambda step: [batch(2, seed=step)]))
    assert [r.skipped for r in reports] == [True, False, False]
    assert reports[1].learning_rate == config.lr
    assert (reports[0].loss_scale, reports[1].loss_scale) == (65536.0, 32768.0)
    assert state.skipped == 1


@pytest.mark.fault(33)
def test_a_scale_that_collapses_stops_the_run(model, make_config) -> None:
    config = make_config(train__steps=9, train__max_skipped=4, train__warmup_steps=1).train
    state = start(model, config, "fp16")
    poison(state, math.inf)
    with pytest.raises(NumericsError, match=r"step 3: 4 steps skipped in a row .*precision=bf16"):
        list(loop.fit(state, config, lambda step: [batch(2)]))
    assert NumericsError.exit_code == 4 and state.norms == [] == state.spikes


@pytest.mark.fault(35)
def test_a_step_without_any_target_is_bad_input_and_changes_nothing(model, train_config) -> None:
    state = start(model, train_config)
    before = weights(state)
    with pytest.raises(InputError, match=r"^step 0: all 32 targets .* are -100, .* at least one"):
        list(loop.fit(state, train_config, lambda step: [batch(2, ignored=32)]))
    assert InputError.exit_code == 3 and torch.equal(weights(state), before)


@pytest.mark.fault(35, control=True)
def test_the_usual_mean_over_no_target_is_nan_and_its_step_is_made(model, train_config) -> None:
    state, (x, y) = start(model, train_config), batch(2, ignored=32)
    before, logits = weights(state), state.model(x).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, y.flatten(), ignore_index=IGNORE)
    loss.backward()
    state.optimizer.step()
    assert loss.isnan() and not torch.equal(weights(state), before), "by its decay alone"


# Spikes


USUAL = 24  # quiet steps that a spike comes after


def spiking(state: training_step.TrainState, steps: set[int], factor: float = 1000.0) -> None:
    """Multiply every gradient of these steps."""
    for parameter in state.model.parameters():
        parameter.register_hook(lambda g: factor * g if state.step in steps else g)


def everything(state: training_step.TrainState) -> list[torch.Tensor]:
    """Weights, moments and the counts of AdamW."""
    values = [*state.model.parameters()]
    for parameter in state.model.parameters():
        values += state.optimizer.state.get(parameter, {}).values()
    return [torch.as_tensor(value).detach().clone() for value in values]


def unchanged(state: training_step.TrainState, before: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, everything(state), before))


def run(state: training_step.TrainState, config) -> list[tuple[loop.StepReport, bool]]:
    """Every step's report, and whether it left everything as it was."""
    found, before = [], everything(state)
    for report in loop.fit(state, config, lambda step: [batch(2, seed=step)]):
        found.append((report, unchanged(state, before)))
        before = everything(state)
    return found


@pytest.fixture
def spike_config(make_config):
    def make(**changes):
        settings = {"train__steps": USUAL + 4, "train__warmup_steps": 1} | changes
        return make_config(**{"train__skip_spikes": 10.0} | settings).train

    return make


@pytest.mark.fault(34)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "fp8"])
def test_a_spike_makes_no_step_and_is_told(
    model, spike_config, caplog, precision: str, fused: bool
) -> None:
    config, state = spike_config(), start(model, spike_config(), precision)
    if not fused:
        groups = parameter_groups(state.model, 0.1)
        state.optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=False)
    spiking(state, {USUAL})
    found = run(state, config)
    assert [(r.skipped, r.spike, kept) for r, kept in found] == [
        (r.step == USUAL,) * 3 for r, _ in found
    ]
    norm = found[USUAL][0].grad_norm
    assert math.isfinite(norm) and norm not in state.norms and len(state.norms) == USUAL + 3
    assert (state.skipped, state.skipped_in_a_row, state.spikes_seen) == (1, 0, 1)
    (told,) = caplog.messages
    assert told.startswith(f"step {USUAL}: skipped as a spike: gradient norm {norm:.4g}, more than")
    assert "train.skip_spikes=10 times the recent median of" in told


@pytest.mark.fault(34, control=True)
def test_an_unguarded_spike_moves_weights_and_moments(model, spike_config, caplog) -> None:
    config = spike_config(train__skip_spikes=0.0, train__grad_clip=0.0)
    kept = {}
    for steps in (set(), {USUAL}):
        state = start(model, config)
        spiking(state, steps)
        found = run(state, config)
        assert not any(r.skipped or same for r, same in found)
        weight = state.model.transformer.h[1].mlp.c_fc.weight
        kept[bool(steps)] = state.optimizer.state[weight]["exp_avg_sq"].mean().item()
    assert kept[True] > 1e3 * kept[False], "the spike stays in AdamW's memory"
    assert caplog.messages == []


def test_a_guard_that_meets_no_spike_changes_no_bit(model, spike_config) -> None:
    ends = []
    for factor in (0.0, 1e9):
        config = spike_config(train__skip_spikes=factor)
        state = start(model, config)
        losses = [r.loss for r, _ in run(state, config)]
        ends.append((losses, everything(state)))
    assert ends[0][0] == ends[1][0] and all(map(torch.equal, ends[0][1], ends[1][1]))


def test_without_enough_history_nothing_is_a_spike(model, spike_config) -> None:
    config, state = spike_config(), start(model, spike_config())
    spiking(state, {3})
    assert not any(r.skipped for r, _ in run(state, config))
    assert max(state.norms) == state.norms[3]


def test_a_restored_window_judges_as_the_unbroken_one(model, spike_config) -> None:
    config, state = spike_config(), start(model, spike_config())
    state.norms = [0.001] * 64
    assert run(state, replace(config, steps=2))[0][0].spike
    state = start(model, config)
    state.norms = [1000.0] * 64
    run(state, replace(config, steps=2))
    assert len(state.norms) == 64 and state.norms[:62] == [1000.0] * 62


@pytest.mark.fault(34)
def test_norms_that_have_grown_for_good_stop_the_run_and_say_so(model, spike_config) -> None:
    config = spike_config(train__max_skipped=3, train__steps=99)
    state = start(model, config)
    spiking(state, set(range(USUAL, 99)))
    before = None
    with pytest.raises(NumericsError) as stopped:
        for _ in loop.fit(state, config, lambda step: [batch(2, seed=step)]):
            before = before or (everything(state) if state.step == USUAL else None)
    assert stopped.value.exit_code == 4 and unchanged(state, before)
    assert re.fullmatch(
        rf"step {USUAL + 2}: 3 steps skipped in a row \(train.max_skipped\), the last ones for "
        r"gradient norms of [\d.]+, [\d.]+, [\d.]+, each more than train.skip_spikes=10 times the "
        r"recent median of [\d.]+: these are no spikes, the norm has grown; try a lower train.lr, "
        r"a longer train.warmup_steps or train.skip_spikes=0",
        str(stopped.value),
    )


def test_an_overflow_in_fp16_is_no_spike_and_a_spike_no_overflow(model, spike_config) -> None:
    config, state = spike_config(), start(model, spike_config(), "fp16")
    spiking(state, {USUAL})
    spiking(state, {USUAL + 1}, math.inf)
    found = {r.step: r for r, _ in run(state, config)}
    spike, overflow, after = (found[USUAL + n] for n in range(3))
    assert (spike.skipped, spike.spike) == (True, True)
    assert (overflow.skipped, overflow.spike) == (True, False)
    assert overflow.loss_scale == spike.loss_scale == 2 * after.loss_scale
    assert all(math.isfinite(norm) for norm in state.norms)


def test_a_spike_counts_as_a_good_step_for_the_scaler(model, spike_config) -> None:
    config, state = spike_config(), start(model, spike_config(), "fp16")
    state.scaler = torch.amp.GradScaler("cpu", growth_interval=USUAL + 1)
    spiking(state, {USUAL})
    found = [r for r, _ in run(state, config)]
    assert found[USUAL].spike and found[USUAL + 1].loss_scale == 2 * found[USUAL].loss_scale


def test_many_spikes_are_told_five_times(model, spike_config, caplog) -> None:
    config = spike_config(train__steps=USUAL + 20)
    state = start(model, config)
    spiking(state, set(range(USUAL, USUAL + 20, 2)))
    assert sum(r.spike for r, _ in run(state, config)) == 10
    assert len(caplog.messages) == loop.TOLD
    assert caplog.messages[-1].endswith("; further ones show in train/skipped alone")


def test_the_reports_carry_the_schedule_and_every_step_once(model, train_config) -> None:
    from pipeline.training.optimizers import learning_rate

    asked: list[int] = []

    def micro_batches(step: int) -> list[training_step.Batch]:
        asked.append(step)
        return [batch(2, seed=step)]

    reports = list(loop.fit(start(model, train_config), train_config, micro_batches))
    assert [r.step for r in reports] == asked == [0, 1, 2, 3]
    assert [r.learning_rate for r in reports] == [learning_rate(s, train_config) for s in range(4)]
    assert all(r.tokens == 32 and r.seconds > 0 for r in reports)


def test_training_learns_a_batch_by_heart(model, make_config) -> None:
    config = make_config(train__steps=60, train__warmup_steps=5, train__lr=0.01).train
    reports = list(loop.fit(start(model, config), config, lambda step: [batch(2)]))
    assert reports[0].loss == pytest.approx(math.log(97), abs=0.1)
    assert reports[-1].loss < 0.5


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16", "fp8"])
def test_five_steps_in_a_low_precision_end_near_fp32_and_not_on_it(
    model, make_config, precision: str
) -> None:
    config = make_config(train__steps=5, train__warmup_steps=1).train
    ends = []
    for name in ("fp32", precision):
        state = start(model, config, name)
        list(loop.fit(state, config, lambda step: [batch(4, seed=step)]))
        ends.append(weights(state))
    assert not torch.equal(*ends)
    assert (ends[0] - ends[1]).norm() < 0.02 * ends[0].norm()


def test_validation_between_steps_changes_no_weight(model, make_config) -> None:
    from pipeline.model.loss import mean_loss

    config = make_config(train__steps=4, train__warmup_steps=1).train
    dropped = GPT(GPTConfig(**{**SHAPE.__dict__, "dropout": 0.2}))
    dropped.load_state_dict(model.state_dict())
    ends = []
    for validate in (False, True):
        torch.manual_seed(3)
        state = start(dropped, config)
        for _ in loop.fit(state, config, lambda step: [batch(4, seed=step)]):
            if validate:
                mean_loss(state.model, [batch(2, seed=9)], state.precision, CPU)
        ends.append(weights(state))
    assert torch.equal(*ends)
