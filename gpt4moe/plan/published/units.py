"""Units of measured values: a number in the unit that a row names, in the one unit of its metric.

In: metric, value, unit as a table has them. Out: the value in the unit that predictions have. A unit left empty is that
of the metric; one of another kind is refused, for 138 GFLOP/s read as TFLOP/s is no measurement.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from gpt4moe.config.check import CallerError

_PREFIXES = {
    "": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15,
    "kilo": 1e3, "mega": 1e6, "giga": 1e9, "tera": 1e12, "peta": 1e15,
}  # fmt: skip
_SECONDS = {
    1e-6: ("us", "µs"), 1e-3: ("ms", "msec", "milliseconds"), 1.0: ("s", "sec", "second", "seconds"),
    60.0: ("min", "minute", "minutes"), 3600.0: ("h", "hr", "hrs", "hour", "hours"), 86_400.0: ("d", "day", "days"),
}  # fmt: skip
_CHIPS = ("gpu", "chip", "device", "tpu", "accelerator")


def _prefixed(words: Iterable[str], unit: float = 1.0) -> dict[str, float]:
    """The words with each prefix, in a unit of so many of them."""
    return {f"{prefix}{word}": size / unit for prefix, size in _PREFIXES.items() for word in words}


@dataclasses.dataclass(frozen=True)
class _Kind:
    """The unit of a metric, another one, and all it takes, in small letters without spaces: how many units each is.

    owners: whose value it is, which a unit may repeat, as in TFLOP/s/GPU.
    """

    unit: str
    example: str
    taken: Mapping[str, float]
    owners: tuple[str, ...] = ()


_TIMES = {word: size for size, words in _SECONDS.items() for word in words}
_HOURS = {word: size / 3600 for word, size in _TIMES.items()} | _prefixed(_SECONDS[3600.0])
_TOKENS = _prefixed(("tok", "token", "tokens"))
_RATES = {f"{many}/{time}": size / _TIMES[time] for many, size in _TOKENS.items() for time in _TIMES}
_FLOPS = _Kind("TFLOP/s", "GFLOP/s", _prefixed(("flops", "flop/s", "flops/s", "flop/sec", "flops/sec"), 1e12), _CHIPS)
_SHARE = _Kind(
    "%",
    "fraction",
    {"%": 1.0, "percent": 1.0, "pct": 1.0, "fraction": 100.0, "share": 100.0, "ratio": 100.0, "1": 100.0},
)
_BINARY_BYTES = {f"{letter}ib": 1024.0**power / 1e9 for power, letter in enumerate("kmgt", 1)}
_MEMORY = _Kind("GB", "GiB", _prefixed(("b", "byte", "bytes"), 1e9) | _BINARY_BYTES, _CHIPS)
_OF_METRIC = {
    "step_time": _Kind("s", "ms", _TIMES, ("step", "iteration", "iter")),
    "hw_tflops_per_gpu": _FLOPS,
    "tflops_per_gpu": _FLOPS,
    "model_tflops_per_gpu": _FLOPS,
    "mfu": _SHARE,
    "hfu": _SHARE,
    "mfu_noncausal_bf16peak": _SHARE,
    "tokens_per_s_per_gpu": _Kind("tok/s", "tokens/min", _RATES, _CHIPS),
    "tokens_per_s_per_node": _Kind("tok/s", "tokens/min", _RATES, ("node", "server")),
    "tokens_per_s": _Kind("tok/s", "tokens/min", _RATES),
    "gpu_hours": _Kind("h", "GPU-days", _HOURS),
    "latency": _Kind("s", "ms", _TIMES, ("token", "step", "prompt")),
    "max_context": _Kind("tokens", "k tokens", _TOKENS),
}


def in_unit_of(metric: str, value: float, unit: str) -> float:
    """Returns the value in the unit of the metric; as it came for a metric that nothing here knows.

    Raises `CallerError` for a unit that is none of the metric's.
    """
    kind = _MEMORY if is_memory(metric) else _OF_METRIC.get(metric)
    if kind is None:
        return value
    plain = _plain(unit, kind.owners or (_CHIPS if metric == "gpu_hours" else ()))
    if not plain:
        return 100 * value if kind is _SHARE and value <= 1 else value
    if plain not in kind.taken:
        raise CallerError(f"{unit!r} is no unit of {metric}; give {kind.unit} or {kind.example}")
    return value * kind.taken[plain]


def is_memory(metric: str) -> bool:
    """Whether the metric is bytes of one chip."""
    return metric.startswith(("memory", "mem_gb", "peak_memory", "max_memory"))


def _plain(unit: str, owners: tuple[str, ...]) -> str:
    """Small letters without spaces, `per` as a stroke, without the owner: `tflop/s` of `TFLOP/s per GPU`."""
    plain = re.sub(r"per(?!cent)", "/", "".join(unit.lower().replace("_", " ").replace("-", " ").split()))
    for owner in owners:
        plain = re.sub(rf"/{owner}$|{owner}(?=h|d)", "", plain)
    return plain
