"""The article's claims about the model, its data and its training run: facts in, an answer for each claim out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gpt4moe.accounting import flops, parameters
from gpt4moe.plan.article.facts import Answer, Facts

DAY_SECONDS = 86_400
HALF_PRECISION_BYTES = 2
ADAM_BYTES = 12  # float32 copy of the weights and two moments


def run_days(training_flops: float, chips: int, peak_flops: float, utilization: float) -> float:
    """Returns the days of a run at this model FLOPs utilisation (a share of the peak)."""
    return training_flops / (chips * peak_flops * utilization) / DAY_SECONDS


def _scale(facts: Facts) -> Answer:
    premises = facts.premises
    computed = facts.training_flops / (6 * premises.gpt3_parameters * premises.gpt3_tokens)
    size, data = facts.total / premises.gpt3_parameters, premises.training_tokens / premises.gpt3_tokens
    return Answer(computed, f"{computed:.0f}x in FLOPs, {size:.1f}x in parameters, {data:.0f}x in tokens")


def _total(facts: Facts) -> Answer:
    counted = parameters.count(facts.shape)
    rest = (facts.case.total_parameters - counted.experts - counted.attention) / 1e9
    return Answer(facts.case.total_parameters, f"of these {rest:.2f}B embedding, router and norms")


def _larger_than_gpt3(facts: Facts) -> Answer:
    return Answer(facts.total / facts.premises.gpt3_parameters)


def _expert(facts: Facts) -> Answer:
    shape = facts.shape
    computed = shape.num_moe_layers * parameters.one_expert(shape)
    return Answer(computed, f"{computed / (shape.num_layers * shape.model_dim**2):.3g} d^2 L")


def _attention(facts: Facts) -> Answer:
    shape = facts.shape
    computed = parameters.count(shape).attention
    narrow = shape.model_dim // shape.head_dim
    plain = dataclasses.replace(shape, num_heads=narrow, num_kv_heads=min(shape.num_kv_heads, narrow))
    usual = parameters.count(plain).attention
    ratio = computed / (shape.num_layers * shape.model_dim**2)
    width = shape.num_heads * shape.head_dim / shape.model_dim
    note = f"{ratio:.3g} d^2 L with queries {width:.3g} d wide; {usual / 1e9:.1f}B if they were d wide"
    return Answer(computed, note)


def _active(facts: Facts) -> Answer:
    more = (facts.case.active_parameters - facts.case.experts_and_attention) / 1e9
    return Answer(facts.case.experts_and_attention, f"{more:.2f}B more with embedding, router and norms")


def _forward(facts: Facts) -> Answer:
    computed = 2 * facts.case.experts_and_attention
    return Answer(computed, f"{computed / 1e9:,.0f} GFLOP a token: TFLOP are those of 1,000 tokens")


def _dense_forward(facts: Facts) -> Answer:
    computed = 2 * facts.case.total_parameters
    return Answer(computed, f"{computed / 1e9:,.0f} GFLOP a token: TFLOP are those of 1,000 tokens")


def _chinchilla(facts: Facts) -> Answer:
    rate, tokens = facts.premises.chinchilla_tokens_per_parameter, facts.premises.training_tokens
    computed, of_all = rate * facts.case.active_parameters, rate * facts.case.total_parameters
    fitting = facts.claims[28].number / rate
    note = (
        f"the run has {tokens / computed:.1f}x what the active parameters ask for, {tokens / of_all:.2f}x what all do"
    )
    return Answer(computed, f"{note}; the claim fits {fitting / 1e12:.2g}T parameters")


def _batch(facts: Facts) -> Answer:
    premises = facts.premises
    rows, steps = premises.batch_tokens / premises.context_tokens, premises.training_tokens / premises.batch_tokens
    a_chip = premises.batch_tokens / premises.gpus
    return Answer(
        None, f"{rows:,.0f} sequences, {steps:,.0f} steps of {_step_seconds(facts):.1f} s, {a_chip:,.0f} tokens a chip"
    )  # fmt: skip


def _batch_of_an_expert(facts: Facts) -> Answer:
    return Answer(facts.premises.batch_tokens * facts.shape.experts_per_token / facts.shape.num_experts)


def _weights_of_a_chip(facts: Facts) -> Answer:
    return Answer(_weight_bytes(facts) / 1e9)


def _fits(facts: Facts) -> Answer:
    """ZeRO-1: weights and gradients whole on every replica, the optimizer's state shared out over all chips.

    Not by `memory.estimate`, which knows that one stage is fuller (0.8 % more weights), keeps float32 gradients and
    reserves memory for the runtime: the claim is checked in the article's own terms, and fails even so.
    """
    premises, shape = facts.premises, facts.shape
    weights = _weight_bytes(facts)
    state = ADAM_BYTES * facts.case.total_parameters / (_replicas(facts) * premises.tensor * premises.stages)
    computed = (2 * weights + state) / 1e9
    kept = HALF_PRECISION_BYTES * shape.num_layers * premises.context_tokens * shape.model_dim / premises.tensor / 1e9
    memory = premises.chip.memory_bytes / 1e9
    note = f"{weights / 1e9:.1f} weights + {weights / 1e9:.1f} gradients + {state / 1e9:.1f} optimizer"
    return Answer(computed, f"{note}; {kept:.1f} GB of saved activations on top, of {memory:.0f} GB", against=memory)


def _flops(facts: Facts) -> Answer:
    context = facts.premises.context_tokens
    forward = flops.forward_flops_per_token(facts.shape)
    shares = [
        flops.attention_core_flops_per_token(facts.shape, int(context), causal=causal) / forward
        for causal in (True, False)
    ]
    note = f"without the attention core: {shares[0]:.1%} more (causal), {shares[1]:.1%} (all pairs)"
    return Answer(facts.case.training_flops, note)


def _chips(facts: Facts) -> Answer:
    premises, replicas = facts.premises, _replicas(facts)
    whole = premises.tensor * premises.stages * replicas
    return Answer(None, f"{whole:,} = {premises.tensor} x {premises.stages} x {replicas}")


def _days_low(facts: Facts) -> Answer:
    return Answer(_days(facts, facts.premises.mfu_high_percent))


def _days_high(facts: Facts) -> Answer:
    return Answer(_days(facts, facts.premises.mfu_low_percent))


def _utilization_low(facts: Facts) -> Answer:
    return Answer(_utilization_percent(facts, facts.premises.days_high))


def _utilization_high(facts: Facts) -> Answer:
    return Answer(_utilization_percent(facts, facts.premises.days_low))


def _cost(facts: Facts) -> Answer:
    premises = facts.premises
    low, high = (
        premises.gpus * 24 * days * premises.dollars_per_gpu_hour for days in (premises.days_low, premises.days_high)
    )
    days = facts.claims[43].number / (premises.gpus * 24 * premises.dollars_per_gpu_hour)
    needed = _utilization_percent(facts, days)
    note = f"${low / 1e6:.1f}M to ${high / 1e6:.1f}M; the claim is {days:.0f} days, {needed:.1f} % of the peak"
    return Answer(high, note)


def _network(facts: Facts) -> Answer:
    """A ring all-reduce of 16-bit gradients between the replicas, each chip with its share of a node's links.

    At the full rate of the links, as the claim compares networks; `communication` reckons with what they reach.
    """
    premises, replicas = facts.premises, _replicas(facts)
    sent = 2 * (replicas - 1) / replicas * _weight_bytes(facts)

    def seconds(gbit_per_node: float) -> float:
        return sent / (gbit_per_node * 1e9 / 8 / premises.gpus_per_node)

    slow, fast = seconds(premises.slow_gbit_per_node), seconds(premises.fast_gbit_per_node)
    share = slow / _step_seconds(facts)
    note = f"{share:.0%} of a step; {fast:.1f} s at {premises.fast_gbit_per_node:g}G a node"
    return Answer(slow, note)


def _h100_days(facts: Facts) -> Answer:
    premises, chip = facts.premises, facts.premises.h100_chip
    usual = (premises.mfu_low_percent + premises.mfu_high_percent) / 200
    computed = run_days(facts.training_flops, premises.h100s, chip.peak_flops, usual)
    needed = usual * computed / premises.h100_days
    of_8bit = needed * chip.peak_flops / chip.peak_8bit_ops
    dollars = premises.h100s * 24 * computed * premises.dollars_per_h100_hour
    return Answer(
        computed,
        f"{premises.h100_days:g} days need {needed:.1%} of the 16-bit peak, {of_8bit:.1%} of the 8-bit one; "
        f"at the first run's {usual:.0%} it is ${dollars / 1e6:.1f}M",
    )


def _h100_cost(facts: Facts) -> Answer:
    premises = facts.premises
    return Answer(premises.h100s * 24 * premises.h100_days * premises.dollars_per_h100_hour)


def _replicas(facts: Facts) -> int:
    premises = facts.premises
    return max(premises.gpus // (premises.tensor * premises.stages), 1)


def _weight_bytes(facts: Facts) -> float:
    """16-bit weights of one chip, were they spread evenly over tensor and stages."""
    return HALF_PRECISION_BYTES * facts.case.total_parameters / (facts.premises.tensor * facts.premises.stages)


def _step_seconds(facts: Facts) -> float:
    """A step of the run in the middle of the article's days."""
    days = (facts.premises.days_low + facts.premises.days_high) / 2
    return days * DAY_SECONDS * facts.premises.batch_tokens / facts.premises.training_tokens


def _days(facts: Facts, mfu_percent: float) -> float:
    premises = facts.premises
    return run_days(facts.training_flops, premises.gpus, premises.chip.peak_flops, mfu_percent / 100)


def _utilization_percent(facts: Facts, days: float) -> float:
    premises = facts.premises
    return 100 * run_days(facts.training_flops, premises.gpus, premises.chip.peak_flops, 1.0) / days


FORMULAS: dict[int, Callable[[Facts], Answer]] = {
    1: _scale,
    11: _total,
    14: _larger_than_gpt3,
    16: _expert,
    18: _attention,
    19: _active,
    20: _forward,
    21: _dense_forward,
    28: _chinchilla,
    31: _batch,
    32: _batch_of_an_expert,
    35: _weights_of_a_chip,
    36: _fits,
    37: _flops,
    38: _chips,
    39: _days_low,
    40: _days_high,
    41: _utilization_low,
    42: _utilization_high,
    43: _cost,
    44: _network,
    46: _h100_days,
    47: _h100_cost,
}
