"""The simulated cluster agrees with the formulas in their limits, and loses no request."""

import collections
import dataclasses

import numpy as np
import pytest

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.config.check import CallerError
from gpt4moe.plan.serving import expert_load
from gpt4moe.plan.serving.batching import Lengths, continuous_batching_gain
from gpt4moe.plan.serving.cluster import Cluster, percentiles, simulate
from gpt4moe.plan.serving.cost import day_utilization, prefill_tokens_per_second, serve
from gpt4moe.plan.serving.layout import ServeLayout
from gpt4moe.plan.serving.lending import Lender, replicas_needed, requests_per_second
from gpt4moe.plan.serving.replica import Policy, Replica
from gpt4moe.plan.serving.rooflines import Server, decode_step, prefill_step
from gpt4moe.plan.serving.routing_draws import RoutingDraws
from gpt4moe.plan.serving.traffic import Request, Traffic, day_curve, day_requests, poisson_requests, with_lengths

MIXTRAL, H100 = shape_named("mixtral_8x7b"), chip_named("h100")
ONE_STAGE = Server(MIXTRAL, H100, ServeLayout(2))
FOUR_STAGES = Server(MIXTRAL, H100, ServeLayout(2, 4))


def run(cluster, requests, seed=0, price=2.0, lender=None):
    return simulate(cluster, requests, price, np.random.default_rng(seed), lender)


def fixed(prompt: int, answer: int, rate: float = 1.0) -> Traffic:
    return Traffic(rate, Lengths("fixed", prompt), Lengths("fixed", answer))


def at_once(traffic: Traffic, count: int, seed: int = 0) -> list[Request]:
    return with_lengths(traffic, [0.0] * count, np.random.default_rng(seed))


@pytest.mark.parametrize("server", [ONE_STAGE, FOUR_STAGES], ids=["one_stage", "four_stages"])
def test_full_load_is_the_roofline(server):
    """Every lane full all the time, rows of 1,000 cached tokens and half of an answer on average."""
    rows, answer = 16, 200
    lanes = server.layout.stage
    found = run(Cluster(server, Policy(rows, prefill="elsewhere")), at_once(fixed(1000, answer), 3 * rows * lanes))
    roofline = serve(server, rows, 1000 + (answer + 1) / 2, 2.0)
    assert found.tokens_per_second == pytest.approx(roofline.tokens_per_second, rel=0.005)
    assert found.dollars_per_1k_tokens == pytest.approx(roofline.dollars_per_1k_tokens, rel=0.005)
    assert found.token_gap_seconds[50] == pytest.approx(1 / roofline.user_tokens_per_second, rel=0.01)
    assert found.utilization == pytest.approx(1, abs=0.005)
    assert found.completed == 3 * rows * lanes and found.tokens == found.completed * answer


@pytest.mark.parametrize("kind", ["fixed", "uniform", "exponential"])
def test_continuous_over_static_batching_is_the_formula(kind):
    """While requests wait. Rows have next to no cache, so that a step takes equally long whatever they hold."""
    rows, traffic = 8, Traffic(1.0, Lengths("fixed", 1), Lengths(kind, 60))
    requests = at_once(traffic, 160 * rows)
    speeds = [
        run(Cluster(ONE_STAGE, Policy(rows, batching, "elsewhere")), requests).waiting_tokens_per_second
        for batching in ("continuous", "static")
    ]
    assert speeds[0] / speeds[1] == pytest.approx(continuous_batching_gain(traffic.outputs, rows), rel=0.03)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_row_waits_as_in_an_m_d_1_queue(load):
    """Poisson arrivals, a fixed time of service S, one at a time: the mean wait is load S / (2 (1 - load))."""
    service = prefill_step(ONE_STAGE, 1, 256).seconds
    requests = poisson_requests(fixed(256, 1, load / service), 20_000, np.random.default_rng(3))
    found = run(Cluster(ONE_STAGE, Policy(1)), requests)
    assert found.mean_wait_seconds == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)
    assert found.utilization == pytest.approx(load, rel=0.02)


def test_servers_that_only_read_prompts_are_such_a_queue_too():
    service, load = prefill_step(ONE_STAGE, 1, 2000).seconds, 0.7
    requests = poisson_requests(fixed(2000, 1, load / service), 10_000, np.random.default_rng(4))
    found = run(Cluster(ONE_STAGE, Policy(64, prefill="elsewhere"), prefill_replicas=1), requests)
    assert found.mean_wait_seconds == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)


def test_an_idle_cluster_serves_at_its_rooflines_speed():
    requests = [Request(100.0 * index, 300, 50) for index in range(4)]
    found = run(Cluster(FOUR_STAGES), requests)
    assert found.first_token_seconds[99] == pytest.approx(4 * prefill_step(FOUR_STAGES, 1, 300).seconds)
    gaps = [4 * decode_step(FOUR_STAGES, 1, context).seconds for context in (300, 350)]
    assert gaps[0] <= found.token_gap_seconds[50] <= gaps[1]


def test_long_prompts_are_read_in_chunks_between_which_others_decode():
    """A row that decodes waits for 512 tokens at a time, not for 8,192."""
    requests = [Request(0.0, 10, 60), Request(0.1, 8192, 1)]
    slowest = {}
    for chunk in (512, 8192):
        policy = Policy(8, prompt_tokens_per_step=chunk)
        found = run(Cluster(ONE_STAGE, policy), requests)
        slowest[chunk] = found.token_gap_seconds[99]
    step, last = decode_step(ONE_STAGE, 1, 70), prefill_step(ONE_STAGE, 1, 512, 7680)
    assert slowest[512] < step.seconds + last.seconds
    assert slowest[8192] > prefill_step(ONE_STAGE, 1, 8192).seconds > 5 * slowest[512]


def test_a_pool_of_readers_bounds_what_is_written():
    """One reader for one writer where the ratio asks for more: all wait for the reader, as fast as its roofline."""
    traffic = fixed(4096, 16)
    found = run(Cluster(ONE_STAGE, Policy(64, prefill="elsewhere"), 1, 1), at_once(traffic, 400))
    reading = prefill_tokens_per_second(ONE_STAGE, 1, 4096)
    assert found.tokens_per_second == pytest.approx(reading / 4096 * 16, rel=0.01)


def test_a_cache_is_never_overfull_and_too_long_requests_are_counted():
    replica = Replica(ONE_STAGE, Policy(100), cache_tokens=1000)
    queue = collections.deque(Request(0.0, 200, 100) for _ in range(5))
    lane = replica.lanes[0]
    while replica.admit(lane, queue):
        replica.finish(lane, replica.start(lane, 0.0))
    assert (lane.rows, replica.kept_tokens, len(queue)) == (3, 900, 2)
    longest = int(2e6)
    requests = [Request(0.0, 10, 5), Request(1.0, longest, 5), Request(2.0, 10, 5)]
    found = run(Cluster(ONE_STAGE), requests)
    assert (found.completed, found.refused, found.tokens) == (2, 1, 10)


@pytest.mark.parametrize("batching", ["continuous", "static"])
@pytest.mark.parametrize("prefill", ["mixed", "elsewhere"])
def test_every_request_gets_all_its_tokens(batching, prefill):
    traffic = Traffic(20.0, Lengths("lognormal", 700), Lengths("exponential", 40))
    requests = poisson_requests(traffic, 300, np.random.default_rng(5))
    cluster = Cluster(FOUR_STAGES, Policy(4, batching, prefill), replicas=2, prefill_replicas=int(prefill != "mixed"))
    found = run(cluster, requests)
    assert found.completed == 300
    assert found.tokens == sum(request.new_tokens for request in requests)
    assert found.elapsed_hours * 3600 >= requests[-1].arrival_seconds


def test_the_same_seed_gives_the_same_result():
    requests = poisson_requests(Traffic(5.0), 20, np.random.default_rng(6))
    cluster = Cluster(FOUR_STAGES, Policy(8), sample_routing=True)
    one, again, other = (run(cluster, requests, seed) for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(("groups", "tokens"), [(1, 4), (8, 32), (4, 256)])
def test_sampled_routing_is_what_is_expected_of_it(groups, tokens):
    draws = RoutingDraws(MIXTRAL, groups, np.random.default_rng(7))
    sampled = np.asarray([draws.sample(tokens, 8, 64)]).reshape(-1, 2).mean(axis=0)
    assert sampled[0] == pytest.approx(expert_load.distinct_experts(8, 2, tokens), rel=0.03)
    assert sampled[1] == pytest.approx(expert_load.group_imbalance(8, 2, tokens, groups), rel=0.2)


def test_favourite_experts_slow_a_cluster_down():
    """Fewer experts are read, but the group that has the favourites is waited for."""
    shape = shape_named("mixtral_8x7b")
    favourites = (8.0, 8.0, *[1.0] * 6)
    even, skewed = (RoutingDraws(shape, 8, np.random.default_rng(8), w) for w in (None, favourites))
    (even_step,), (skewed_step,) = even.sample(256, 1, 400), skewed.sample(256, 1, 400)
    assert skewed_step[1] > 2 * even_step[1]
    server = Server(shape, H100, ServeLayout(expert=8))
    traffic, speeds = fixed(1, 60), []
    for weights in (None, favourites):
        cluster = Cluster(server, Policy(512, prefill="elsewhere"), sample_routing=True, expert_weights=weights)
        speeds.append(run(cluster, at_once(traffic, 1024)).tokens_per_second)
    assert speeds[1] < speeds[0]


def test_uneven_steps_leave_stages_idle():
    """Lanes cannot overtake: as many lanes as stages wait for each other, less so where prompts are cut alike."""
    traffic, found = Traffic(1.0, Lengths("exponential", 1500), Lengths("exponential", 60)), []
    for chunk in (512, 20_000):
        cluster = Cluster(FOUR_STAGES, Policy(16, prompt_tokens_per_step=chunk))
        found.append(run(cluster, at_once(traffic, 16 * 4 * 6)))
    assert found[0].utilization > found[1].utilization + 0.2
    assert found[0].waiting_tokens_per_second > 1.25 * found[1].waiting_tokens_per_second


def test_a_troughs_replicas_are_lent():
    """What is lent tends to the formula's share as requests become short against an hour."""
    policy, replicas, hour = Policy(16), 4, 15.0
    lengths = {"prompts": Lengths("fixed", 64), "outputs": Lengths("fixed", 16)}
    capacity = requests_per_second(ONE_STAGE, 16, Traffic(1.0, **lengths))
    curve = day_curve(trough_over_peak=0.2)
    rate = 0.75 * replicas * capacity * day_utilization(curve)
    traffic = Traffic(rate / 8, hourly=curve, hour_seconds=hour, **lengths)
    # An eighth of the requests at an eighth of the capacity: fewer to simulate.
    needed = replicas_needed(traffic.hour_rates(), capacity / 8, 0.8)
    lender = Lender(replicas, needed, hour, return_seconds=1.0)
    requests = day_requests(traffic, np.random.default_rng(9))
    kept = run(Cluster(ONE_STAGE, policy, replicas), requests)
    lent = run(Cluster(ONE_STAGE, policy, replicas), requests, lender=lender)
    assert max(needed) == replicas and min(needed) == 1
    assert lent.lent_fraction == pytest.approx(lender.lent_fraction(), abs=0.02)
    assert lent.lent_chip_hours == pytest.approx(lent.lent_fraction * 24 * replicas * 2, rel=0.01)
    assert kept.lent_chip_hours == 0
    assert lent.completed == kept.completed == len(requests)
    assert lent.dollars_per_1k_tokens == pytest.approx(kept.dollars_per_1k_tokens * (1 - lent.lent_fraction), rel=0.01)


def test_lending_by_hand():
    """Two replicas, three hours that need 2, 1, 2: the second is away for an hour less its return."""
    lender = Lender(2, (2, 1, 2), hour_seconds=100.0, return_seconds=10.0)
    assert sorted(lender.events(), key=lambda event: event[1]) == [(True, 100.0, 1), (False, 190.0, 1)]
    assert lender.lent_fraction() == pytest.approx(0.9 / 6)
    assert replicas_needed([10.0, 0.0, 8.0], 5.0, 0.8) == (3, 1, 2)


def test_a_days_requests_follow_its_course():
    traffic = Traffic(50.0, hourly=day_curve(), hour_seconds=20.0)
    requests = day_requests(traffic, np.random.default_rng(10))
    counts = np.histogram([item.arrival_seconds for item in requests], bins=24, range=(0, 480))[0]
    assert len(requests) == pytest.approx(50 * 480, rel=0.02)
    assert counts.argmax() in (14, 15, 16) and counts.argmin() in (2, 3, 4)
    assert counts.min() / counts.max() == pytest.approx(0.3, abs=0.06)
    assert day_utilization(day_curve()) == pytest.approx(0.65)


def test_percentiles_by_hand():
    assert percentiles([1.0, 2.0, 3.0, 4.0]) == {50: 2.0, 90: 4.0, 99: 4.0}
    assert percentiles([5.0, 1.0], [1, 99]) == {50: 1.0, 90: 1.0, 99: 1.0}
    assert percentiles([]) == {}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Policy(rows=0), "rows=0 must be an integer of at least 1"),
        (lambda: Policy(batching="dynamic"), "batching='dynamic' must be in"),
        (lambda: Policy(prefill="never"), "prefill='never' must be in"),
        (lambda: Cluster(ONE_STAGE, replicas=0), "replicas=0 must be"),
        (lambda: Traffic(0.0), "requests per second=0.0 must be a number above 0"),
        (lambda: Traffic(1.0, hourly=(1.0,)), "hourly=1 must be 24 rates"),
        (lambda: Traffic(1.0, hourly=(-1.0,) * 24), "an hourly rate=-1.0 must be a number of at least 0"),
        (lambda: Lender(1, (1,), 10.0, 20.0), "return_seconds=20.0 must be less than an hour (10)"),
        (lambda: run(Cluster(ONE_STAGE), []), "requests=0 must be at least one"),
        (lambda: run(Cluster(ONE_STAGE), [Request(0.0, 1, 1)], price=-1.0), "price=-1.0 must be a number"),
        (lambda: RoutingDraws(MIXTRAL, 1, None, [1.0]), "expert weights=1 must be num_experts (8)"),
        (
            lambda: run(Cluster(dataclasses.replace(ONE_STAGE, layout=ServeLayout())), [Request(0.0, 1, 1)]),
            "weights='bfloat16' leave no memory for the cache; use more chips",
        ),
    ],
)
def test_what_cannot_be_simulated(make, says):
    with pytest.raises(CallerError) as caught:
        make()
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
