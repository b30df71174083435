"""The article's claims about reading speed, experts, serving, speculation and images: facts in, answers out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gpt4moe.accounting import flops, parameters
from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.published import shape_named
from gpt4moe.accounting.shape import Shape
from gpt4moe.plan.article.facts import Answer, Facts
from gpt4moe.plan.serving.expert_load import distinct_experts
from gpt4moe.plan.serving.layout import ServeLayout, token_cache_bytes, weight_bytes_per_chip
from gpt4moe.plan.serving.speculation import Draft, speed_up, weight_bound_verification

HALF_PRECISION_BYTES = 2
ENGLISH_TOKENS_PER_WORD = 1.33
CENT = 0.01
MHA = "palm_540b"  # "500B+ parameters", whose cache the article reckons with full attention


def _slow_reader(facts: Facts) -> Answer:
    return _reader(facts, facts.premises.slow_words_per_minute)


def _fast_reader(facts: Facts) -> Answer:
    return _reader(facts, facts.premises.fast_words_per_minute)


def _reader(facts: Facts, words_per_minute: float) -> Answer:
    rate = facts.premises.tokens_per_word
    usual = words_per_minute / 60 * ENGLISH_TOKENS_PER_WORD
    note = f"at {rate:g} tokens a word; the usual {ENGLISH_TOKENS_PER_WORD} gives {usual:.3g}"
    return Answer(words_per_minute / 60 * rate, note)


def _dense_bandwidth(facts: Facts) -> Answer:
    premises = facts.premises
    needed = premises.dense_parameters * premises.weight_bytes * _fast_rate(facts) / 1e12
    there = premises.gpus_per_node * premises.h100_chip.bandwidth_bytes_per_second / 1e12
    return Answer(
        needed, f"TB/s needed, of {there:.1f}; {needed / premises.weight_bytes:.1f} with a byte a weight", there
    )


def _dense_utilization(facts: Facts) -> Answer:
    premises, chip = facts.premises, facts.premises.h100_chip
    needed = 2 * premises.dense_parameters * premises.dense_tokens_per_second / premises.gpus_per_node
    computed = 100 * needed / chip.peak_8bit_ops
    batch = facts.claims[8].number / computed
    of_16bit = 100 * needed / chip.peak_flops
    return Answer(computed, f"one sequence; {of_16bit:.2g} % of the 16-bit peak; 5 % is a batch of {batch:.0f}")


def _largest_dense(facts: Facts) -> Answer:
    premises = facts.premises
    there = premises.gpus_per_node * premises.h100_chip.bandwidth_bytes_per_second
    computed = there / (_fast_rate(facts) * premises.weight_bytes)
    return Answer(computed, f"at all of the bandwidth; the claim is {facts.claims[9].number / computed:.0%} of it")


def _list_price(facts: Facts) -> Answer:
    price = facts.premises.list_dollars_per_1k_tokens
    first, second = (price / facts.claims[claim].number for claim in (68, 69))
    return Answer(None, f"{first:.1f}x the cost claimed for the first cluster, {second:.1f}x that of H100s")


def _h100_bandwidth(facts: Facts) -> Answer:
    return Answer(facts.premises.h100_chip.bandwidth_bytes_per_second / 1e12)


def _h100_8bit(facts: Facts) -> Answer:
    return Answer(facts.premises.h100_chip.peak_8bit_ops / 1e12)


def _human_rate(facts: Facts) -> Answer:
    return Answer(_fast_rate(facts))


def _flops_per_parameter(facts: Facts) -> Answer:
    shape, counted = facts.shape, parameters.count(facts.shape)
    head = shape.vocab_size * shape.model_dim
    tables = counted.embedding + counted.head + counted.norms
    matrices = facts.case.total_parameters - tables - counted.experts + parameters.experts_active(shape) + head
    return Answer(flops.forward_flops_per_token(shape) / matrices, "forward, a token")


def _small_batch(facts: Facts) -> Answer:
    return _intensity(facts, facts.premises.small_batch)


def _large_batch(facts: Facts) -> Answer:
    return _intensity(facts, facts.premises.large_batch)


def _intensity(facts: Facts, batch: int) -> Answer:
    """Arithmetic intensity of a matrix product that reads weights of 8 bits."""
    chip, narrow = facts.premises.h100_chip, facts.premises.weight_bytes / 2
    balance = [peak / chip.bandwidth_bytes_per_second for peak in (chip.peak_8bit_ops, chip.peak_flops)]
    note = (
        f"weights of {narrow:g} byte; an {facts.premises.h100} has {balance[0]:.0f} at 8 bits, {balance[1]:.0f} at 16"
    )
    return Answer(2 * batch / narrow, note)


def _large_cache(facts: Facts) -> Answer:
    computed, premises = _mha_cache_bytes(facts, facts.premises.cache_head_dim), facts.premises
    own = _mha_cache_bytes(facts, shape_named(MHA).head_dim)
    one_head = computed / _mha_shape(facts, premises.cache_head_dim).num_heads
    return Answer(
        computed, f"{own / 1e12:.1f} TB with PaLM's own heads of 256; {one_head / 1e12:.3f} TB with one head of keys"
    )


def _cache_over_weights(facts: Facts) -> Answer:
    weights = HALF_PRECISION_BYTES * parameters.count(shape_named(MHA)).total
    return Answer(_mha_cache_bytes(facts, facts.premises.cache_head_dim) / weights)


def _least_batch(facts: Facts) -> Answer:
    batch = facts.premises.least_batch
    touched = distinct_experts(facts.shape.num_experts, facts.shape.experts_per_token, batch)
    return Answer(_rows_of_an_expert(facts, batch), f"{touched:.1f} experts of a layer are touched")


def _expert_batch(facts: Facts) -> Answer:
    premises = facts.premises
    step = _rows_of_an_expert(facts, premises.inference_batch / premises.inference_stages)
    running = premises.inference_batch * premises.inference_stages
    cache = running * premises.cache_context_tokens * facts.case.cache_bytes_per_token
    note = (
        f"{step:.0f} a step where {premises.inference_batch:,} sequences are spread over {premises.inference_stages} "
        f"stages; as many in each step are {running:,} sequences, {cache / 1e12:.1f} TB of cache at "
        f"{premises.cache_context_tokens:,} tokens"
    )
    return Answer(_rows_of_an_expert(facts, premises.inference_batch), note, elsewhere=step)


def _cluster(facts: Facts) -> Answer:
    return Answer(_cluster_chips(facts))


def _parameters_of_a_node(facts: Facts) -> Answer:
    stages, claimed = facts.premises.inference_stages, facts.claims[62].number
    one_less = facts.case.total_parameters / max(stages - 1, 1)
    implied = HALF_PRECISION_BYTES * claimed / facts.premises.inference_tensor / 1e9
    note = f"{one_less / 1e9:.0f}B over one stage less; the claim is {implied:.1f} GB a chip, against claim 63"
    return Answer(facts.case.total_parameters / stages, note)


def _half_precision_of_a_chip(facts: Facts) -> Answer:
    return Answer(weight_bytes_per_chip(facts.shape, _layout(facts)) / 1e9)


def _8bit_of_a_chip(facts: Facts) -> Answer:
    return Answer(weight_bytes_per_chip(facts.shape, _layout(facts, "int8")) / 1e9)


def _layers_of_a_node(facts: Facts) -> Answer:
    return Answer(facts.shape.num_layers / max(facts.premises.inference_stages - 1, 1), "one stage for the embedding")


def _over_davinci(facts: Facts) -> Answer:
    gpt3 = shape_named("gpt3_175b")
    feed_forward = parameters.experts_active(facts.shape) / parameters.count(gpt3).dense
    computed = facts.active / facts.premises.gpt3_parameters
    return Answer(computed, f"of all active parameters; {feed_forward:.1f}x of the feed-forward alone")


def _first_cluster(facts: Facts) -> Answer:
    return _price(facts, 68, facts.premises.chip, facts.premises.dollars_per_gpu_hour, facts.premises.chip.peak_flops)


def _second_cluster(facts: Facts) -> Answer:
    chip = facts.premises.h100_chip
    return _price(facts, 69, chip, facts.premises.dollars_per_h100_hour, chip.peak_8bit_ops)


def _price(facts: Facts, claim: int, chip: Chip, dollars_per_hour: float, peak: float) -> Answer:
    """The throughput at which the cluster costs so much, and whether chips could reach it were cents meant."""
    chips, dollars = _cluster_chips(facts), facts.claims[claim].number
    rate = 1000 * chips * dollars_per_hour / (3600 * dollars)
    needed = 2 * facts.case.experts_and_attention * rate / chips
    beyond = needed / CENT / peak
    note = (
        f"{rate / chips:.1f} tok/s a chip, {needed / chip.peak_flops:.1%} of the 16-bit peak at ${dollars_per_hour:g}/h"
    )
    return Answer(rate, f"{note}; cents, as written, need {beyond:.1f}x the peak", beyond_peak=beyond)


def _latency(facts: Facts) -> Answer:
    premises = facts.premises
    seconds = _serial_seconds(facts, premises.chip)
    half = 1 / _serial_seconds(facts, premises.chip, "int8")
    others = [1 / _serial_seconds(facts, premises.h100_chip, weights) for weights in ("bfloat16", "int8")]
    note = f"at least {1000 * seconds:.0f} ms a token; {half:.1f} tok/s with 8-bit weights"
    return Answer(1 / seconds, f"{note}; {premises.h100}: {others[0]:.1f} and {others[1]:.1f}")


def _cache_of_a_token(facts: Facts) -> Answer:
    premises, size = facts.premises, facts.case.cache_bytes_per_token
    short, long = (size * length / 1e9 for length in (premises.context_tokens, premises.long_context_tokens))
    every_head = short * facts.shape.num_heads / facts.shape.num_kv_heads
    note = f"{short:.2f} GB a sequence of {premises.context_tokens:,.0f}"
    note += f", {long:.1f} of {premises.long_context_tokens:,.0f}"
    return Answer(size, f"{note}; {every_head:.1f} with keys for each head")


def _speculation(facts: Facts) -> Answer:
    premises, batches = facts.premises, (1, 8, 32)
    acceptance = premises.speculative_acceptance_percent / 100
    draft = Draft(premises.speculative_tokens, acceptance, premises.speculative_draft_cost)
    mixture = [speed_up(draft, weight_bound_verification(facts.shape, batch, draft.tokens)) for batch in batches]
    note = ", ".join(f"{gain:.2f}x at {batch}" for gain, batch in zip(mixture, batches, strict=True))
    return Answer(speed_up(draft), f"of a dense model; with experts read from memory {note} sequences")


def _image_tokens(facts: Facts) -> Answer:
    share = facts.premises.vision_tokens / facts.premises.training_tokens
    return Answer(share, f"{share:.1%} more tokens")


def _image_bytes(facts: Facts) -> Answer:
    return Answer(facts.premises.vision_bytes_per_patch / facts.premises.text_bytes_per_token)


def _layout(facts: Facts, weights: str = "bfloat16") -> ServeLayout:
    return ServeLayout(facts.premises.inference_tensor, facts.premises.inference_stages, weights=weights)


def _serial_seconds(facts: Facts, chip: Chip, weights: str = "bfloat16") -> float:
    """A token through all stages, each reading its weights at the data sheet's rate; chips of a stage read at once."""
    layout = _layout(facts, weights)
    return layout.stage * weight_bytes_per_chip(facts.shape, layout) / chip.bandwidth_bytes_per_second


def _fast_rate(facts: Facts) -> float:
    return facts.premises.fast_words_per_minute / 60 * facts.premises.tokens_per_word


def _rows_of_an_expert(facts: Facts, batch: float) -> float:
    return batch * facts.shape.experts_per_token / facts.shape.num_experts


def _cluster_chips(facts: Facts) -> int:
    return facts.premises.inference_tensor * facts.premises.inference_stages


def _mha_shape(facts: Facts, head_dim: int) -> Shape:
    shape = shape_named(MHA)
    return dataclasses.replace(shape, head_dim=head_dim, num_kv_heads=shape.num_heads)


def _mha_cache_bytes(facts: Facts, head_dim: int) -> float:
    shape, premises = _mha_shape(facts, head_dim), facts.premises
    return token_cache_bytes(shape) * premises.cache_batch * premises.cache_context_tokens


FORMULAS: dict[int, Callable[[Facts], Answer]] = {
    5: _slow_reader,
    6: _fast_reader,
    7: _dense_bandwidth,
    8: _dense_utilization,
    9: _largest_dense,
    10: _list_price,
    50: _h100_bandwidth,
    51: _h100_8bit,
    52: _human_rate,
    53: _flops_per_parameter,
    54: _small_batch,
    55: _large_batch,
    56: _large_cache,
    57: _cache_over_weights,
    58: _least_batch,
    60: _expert_batch,
    61: _cluster,
    62: _parameters_of_a_node,
    63: _half_precision_of_a_chip,
    64: _8bit_of_a_chip,
    65: _layers_of_a_node,
    67: _over_davinci,
    68: _first_cluster,
    69: _second_cluster,
    70: _latency,
    72: _cache_of_a_token,
    73: _speculation,
    74: _image_tokens,
    75: _image_bytes,
}
