"""Published measurements of serving, predicted without a constant fitted to them."""

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.plan.published.serving_rows import predict_row

# Pope et al. 2022, table 1: name, batch, tokens.
CONTEXTS = (
    ("mha-dh128", 128, 1320),
    ("mqa-baseline", 128, 660),
    ("mqa-batchsharded", 128, 43_000),
    ("mha-dh128", 512, 330),
    ("mqa-baseline", 512, 165),
    ("mqa-batchsharded", 512, 10_700),
)
# Tables 2 and 3: name, chips, seconds.
LATENCIES = (
    ("palm540B-prefill-b1", 64, 0.29),
    ("palm540B-decode-b64", 64, 1.82),
    ("palm540B-prefill-b512", 64, 85.2),
    ("palm540B-decode-b512", 64, 6.0),
    ("palm62B-prefill-b1", 16, 0.16),
    ("palm62B-decode-b32", 16, 0.73),
    ("palm62B-prefill-b512", 32, 20.2),
    ("palm62B-decode-b512", 8, 5.1),
)
# kipply, Transformer Inference Arithmetic: name, chips, milliseconds.
KIPPLY = (("prefill512-tp1", 1, 63.17), ("decode-tp1", 1, 22.0), ("prefill512-tp2", 2, 45.45), ("decode-tp2", 2, 13.5))


def relative_error(name: str, value: float, **columns) -> float:
    row = {"name": name, "seq": "2048", "tp": "", "gpus": "", "global_batch_tokens": ""}
    return predict_row(row | {key: str(number) for key, number in columns.items()}) / value - 1


@pytest.mark.parametrize(("kind", "batch", "tokens"), CONTEXTS)
def test_popes_longest_contexts(kind, batch, tokens):
    error = relative_error(f"pope-maxctx-{kind}-b{batch}", tokens, gpus=64, global_batch_tokens=batch)
    assert abs(error) < 0.02


@pytest.mark.parametrize(("name", "chips", "seconds"), LATENCIES)
def test_popes_latencies(name, chips, seconds):
    assert abs(relative_error(f"pope-{name}", seconds, tp=float(chips))) < 0.15


def test_popes_latencies_together():
    errors = [abs(relative_error(f"pope-{name}", seconds, tp=chips)) for name, chips, seconds in LATENCIES]
    assert sum(errors) / len(errors) < 0.08


def test_tracked_rows_stay_where_they_are():
    """No bar: within a third, which only a change of the model would move."""
    errors = [relative_error(f"kipply-13B-{name}", ms / 1e3, tp=chips, seq=512) for name, chips, ms in KIPPLY]
    errors.append(relative_error("deepseek-v3-serving-decode", 14_800, seq=4989))
    errors.append(relative_error("deepseek-v3-serving-prefill", 73_700))
    assert max(map(abs, errors)) < 0.34
    assert sum(map(abs, errors)) / len(errors) < 0.16


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"name": "orca-175B"}, "the layout of a server is known of names that begin with pope-maxctx, pope-, kipply-"),
        ({"name": "pope-palm540B-decode-b"}, "name='pope-palm540B-decode-b' must end in prefill-bN or decode-bN"),
        ({"name": "kipply-13B-decode-tp1", "tp": "one"}, "tp='one' must be a positive whole number in kipply-13B"),
        ({"name": "kipply-13B-decode-tp1", "tp": "-1"}, "tp='-1' must be a positive whole number"),
    ],
)
def test_rows_that_cannot_be_read(row, says):
    with pytest.raises(CallerError) as caught:
        predict_row({"seq": "512"} | row)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
