"""Rows of measurements: what is read, what is refused with its place, what a row leaves open."""

import collections
import csv
import dataclasses
import random

import pytest

from gpt4moe.accounting import parameters
from gpt4moe.config.check import CallerError
from gpt4moe.launch import main
from gpt4moe.plan.published import conventions, validate
from gpt4moe.plan.published.measurements import COLUMNS, PUBLISHED_RUNS, NotTold, chip_of, read_rows
from gpt4moe.plan.published.setups import setup_of
from gpt4moe.plan.published.sources import source_of

ROW = {
    "name": "some-13b", "kind": "train", "params_total": "13e9", "params_active": "13e9", "layers": "40",
    "d_model": "5120", "n_heads": "40", "seq": "2048", "global_batch_tokens": "1048576", "gpus": "64",
    "gpu_type": "A100-80GB", "tp": "8", "pp": "1", "dp": "8", "measured_metric": "step_time", "value": "10",
    "unit": "s", "source": "nobody",
}  # fmt: skip


def write(path, *rows, columns=COLUMNS):
    """A CSV file of rows that change `ROW`."""
    lines = [",".join(columns)]
    lines += [",".join(str((ROW | row).get(name, "")) for name in columns) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": "forty"}, r"line 3, column layers: 'forty' must be a whole number above 0"),
        ({"d_model": "512.5"}, r"line 3, column d_model: '512.5' must be a whole number above 0"),
        ({"value": "-3"}, r"line 3, column value: '-3' must be a number above 0"),
        ({"value": "nan"}, r"line 3, column value: 'nan' must be a number above 0"),
        ({"value": ""}, r"line 3, column value: '' must be a number above 0"),
        ({"layers": "1e300"}, r"line 3, column layers: '1e300' must be at most 1e\+07"),
        ({"params_active": "14e9"}, r"line 3, column params_active: 1.4e\+10 must be at most params_total"),
        ({"kind": "tune"}, r"line 3, column kind: 'tune' must be in \('train', 'infer'\)"),
        ({"name": ""}, r"line 3, column name: '' must not be empty"),
        ({"name": "first"}, r"column name: 'first' is there twice with 'step_time'; names must differ"),
        ({"source": "one, two"}, r"line 3: not as many cells as the 18 columns; quote cells with commas"),
    ],
)
def test_a_bad_row_names_its_place(tmp_path, changes, says):
    path = write(tmp_path / "rows.csv", {"name": "first"}, changes)
    with pytest.raises(CallerError, match=says) as caught:
        read_rows(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dp": "5"}, r"line 2, column dp: 5 times tp \(8\) and pp \(1\) must divide gpus \(64\)"),
        (
            {"tp": "7", "gpus": "56", "dp": "8"},
            r"line 2, columns tp, pp, dp: num_heads=40 must be divisible by the tensor",
        ),
        ({"global_batch_tokens": "100"}, r"line 2, column global_batch_tokens: 100 must be at least seq \(2048\)"),
        (
            {"params_active": "2e9"},
            r"line 2, column name: 'some-13b' is no model we know, and does not say its experts",
        ),
        ({"params_active": "2e9", "name": "some-2e4"}, r"line 2, column name: '2e4' must have more experts than"),
        ({"params_total": "1e9", "params_active": "1e9"}, r"line 2, column params_total: 1e\+09 must be above what"),
    ],
)
def test_a_row_that_is_no_run(tmp_path, changes, says):
    (row,) = read_rows(write(tmp_path / "rows.csv", changes))
    with pytest.raises(CallerError, match=says) as caught:
        setup_of(row)
    assert "\n" not in str(caught.value)


def test_a_row_without_a_prediction_is_passed_over_with_its_place(tmp_path):
    """The others are scored; where there is no other, its line is the answer."""
    bad = {
        "chip": ({"gpu_type": "X100"}, "column gpu_type: 'X100': chip='x100' is not in the table; near: "),
        "empty": ({"layers": ""}, "column layers: '' must be told of a model to train"),
        "heads": ({"tp": "7", "gpus": "56"}, "num_heads=40 must be divisible by the tensor degree"),
        "unit": ({"unit": "fortnights"}, "column unit: 'fortnights' is no unit of step_time; give s or ms"),
        "kind": ({"unit": "TFLOP/s"}, "column unit: 'TFLOP/s' is no unit of step_time; give s or ms"),
        "fast": ({"value": "0.1"}, "column value: 0.1 s means "),
        "slow": ({"value": "1e17"}, "column value: 1e+17 s is more than 1000 times from the "),
        "megatron-sc21-x": (
            {"params_total": "1300e9", "params_active": "1300e9"},
            "column params_total: 1.3e+12 does not go with layers and d_model, which give 1.286e+10",
        ),
        "wide": (
            {"params_total": "3000e9", "params_active": "3000e9"},
            "column params_total: 3e+12 does not go with a feed-forward of 4,875,520; check them",
        ),
        "some-fp8": ({}, "matmul_bits=8 needs fp8 products, which a100_80 lacks"),
        "metric": ({"measured_metric": "joy"}, "column measured_metric: 'joy' is no time, rate or memory of a step"),
        "pope-palm540B-decode": (
            {"kind": "infer", "measured_metric": "latency"},
            "must end in prefill-bN or decode-bN",
        ),
        "kipply-13B-decode": ({"kind": "infer"}, "column measured_metric: 'step_time' of kipply- rows must be latency"),
        "pope-palm540B-decode-b64": ({"kind": "infer", "measured_metric": "latency", "unit": "moons"}, "column unit: "),
    }
    path = write(tmp_path / "rows.csv", {"name": "good"}, *({"name": name} | row for name, (row, _) in bad.items()))
    document = validate.examine(path)
    assert [row["name"] for row in document["rows"]] == ["good"]
    reasons = {item["name"]: item["reason"] for item in document["skipped"]}
    assert list(reasons) == list(bad)
    for number, (name, (row, says)) in enumerate(bad.items(), 3):
        assert says in reasons[name] and f"{path}, line {number}" in reasons[name] and "\n" not in reasons[name]
        with pytest.raises(CallerError, match="line 2") as caught:
            validate.examine(write(tmp_path / "one.csv", {"name": name} | row))
        assert says in str(caught.value)
    text = validate.format_document(document)
    assert all(f"{path}, line {number}" in text for number in range(3, 3 + len(bad)))


def test_one_run_may_tell_several_numbers(tmp_path):
    told = ({}, {"measured_metric": "mfu", "value": "40", "unit": "%"}, {"name": "some-7", "dp": "n/a", "gpus": "32"})
    document = validate.examine(write(tmp_path / "rows.csv", *told))
    assert [row["metric"] for row in document["rows"]] == ["step_time", "mfu", "step_time"]
    assert document["rows"][0]["calibrated_error"] != document["rows"][1]["calibrated_error"]


ODD = (
    "",
    "0",
    "-1",
    "1",
    "7",
    "8.0",
    "1e9",
    "1e-9",
    "1e400",
    "nan",
    "x",
    '"a, b"',
    "A100",
    "MI300X",
    "v5p",
    "mfu",
    "h",
)


def test_no_cell_makes_an_error_that_is_not_told(tmp_path):
    """Rows of the published file with one or two cells that are something else: a result, or one line."""
    draw = random.Random(0)
    with open(PUBLISHED_RUNS, newline="") as file:
        published = list(csv.DictReader(file))
    results = collections.Counter()
    for _ in range(400):
        row = draw.choice(published)
        row = row | {name: draw.choice(ODD) for name in draw.sample(COLUMNS, draw.randint(1, 2))}
        row["source"] = "nobody"
        try:
            validate.format_document(validate.examine(write(tmp_path / "rows.csv", row)))
            results["scored"] += 1
        except CallerError as error:
            assert "\n" not in str(error) and "rows.csv, line " in str(error)
            results["told"] += 1
    assert min(results["scored"], results["told"]) > 40


def test_columns_in_another_order_beside_others(tmp_path):
    """As a spreadsheet writes them: a byte order mark, quotes, blanks, lines without a cell."""
    path = write(tmp_path / "rows.csv", {}, columns=[*reversed(COLUMNS), "remark"])
    (plain,) = read_rows(path)
    text = path.read_text().replace("nobody", '" nobody, 2024 "')
    path.write_text("\ufeff" + text.replace(",name,", ", name ,") + "\n" + "," * len(COLUMNS) + "\n")
    (row,) = read_rows(path)
    assert row == dataclasses.replace(plain, source="nobody, 2024")


@pytest.mark.parametrize(("unit", "value"), [("s", "10"), ("ms", "10000"), ("min", str(10 / 60))])
def test_times_in_any_unit(tmp_path, unit, value):
    setup = _setup(tmp_path, unit=unit, value=value)
    assert conventions.measured_seconds(setup) == pytest.approx(10)


def test_rates_in_any_unit(tmp_path):
    told = {"measured_metric": "model_tflops_per_gpu"}
    setups = [_setup(tmp_path, **told, unit=unit, value=value) for unit, value in (("TFLOP/s", 150), ("PFLOP/s", 0.15))]
    assert conventions.measured_seconds(setups[0]) == pytest.approx(conventions.measured_seconds(setups[1]))


def as_written(path):
    """The rows of a file without their places."""
    return [dataclasses.replace(row, where="") for row in read_rows(path)]


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace(",", ";").encode(),
        lambda text: text.replace(",", "\t").encode(),
        lambda text: text.replace("name,kind", "Name, KIND ", 1).encode(),
        lambda text: "".join(f'"{line.replace(",", chr(34) + "," + chr(34))}"\n' for line in text.split()).encode(),
        lambda text: "".join(f"{line},,more\n" for line in text.split()).encode().replace(b",,more", b",,note", 1),
        lambda text: (text + "\n," + 16 * "," + "\n").encode(),
        lambda text: "".join(",".join(reversed(line.split(","))) + "\n" for line in text.split()).encode(),
    ],
    ids=["mark", "crlf", "cr", "semicolons", "tabs", "capitals", "quotes", "more columns", "blank rows", "other order"],
)
def test_tables_as_spreadsheets_write_them(tmp_path, rewrite):
    plain = write(tmp_path / "plain.csv", {"name": "one"}, {"name": "two", "seq": ""})
    (tmp_path / "other.csv").write_bytes(rewrite(plain.read_text()))
    assert as_written(tmp_path / "other.csv") == as_written(plain)
    assert [row.where.rpartition("line ")[2] for row in read_rows(tmp_path / "other.csv")] == ["2", "3"]


def test_a_quoted_cell_may_hold_separators_and_lines(tmp_path):
    path = write(tmp_path / "rows.csv", {"source": '"one, ""two""\nand three"'}, {"name": "next", "value": "-1"})
    with pytest.raises(CallerError, match="line 4, column value: '-1' must be"):
        read_rows(path)
    path.write_text(path.read_text().replace("-1", "1"))
    assert read_rows(path)[0].source == 'one, "two"\nand three'


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "line 1: has no names of columns; begin with name,kind,params_total"),
        (b"\n\n", "line 1: has no names of columns"),
        (b"name,kind\n", "line 1: no column params_total, params_active"),
        (",".join(COLUMNS).encode() + b",Value\n", "line 1: column value is there 2 times; keep one"),
        (",".join(COLUMNS).encode() + b"\nAm\xe9lie,train\n", "line 2, byte 3: 0xe9 is not UTF-8; save the table as"),
        (",".join(COLUMNS).encode("utf-16"), "line 1, byte 1: 0xff is not UTF-8"),
        (",".join(COLUMNS).encode() + b"\n\0\0", "line 2: holds a zero byte"),
    ],
)
def test_files_that_are_no_table(tmp_path, capsys, data, says):
    (tmp_path / "rows.csv").write_bytes(data)
    for word in ("validate", "calibrate"):
        assert main(["plan", word, "--csv", str(tmp_path / "rows.csv")]) == 2
        said = capsys.readouterr().err
        assert f"rows.csv, {says}" in said and said.count("\n") == 1


def test_files_that_are_none(tmp_path):
    with pytest.raises(CallerError, match=r"line 1: no column value; the columns are name,kind,"):
        read_rows(write(tmp_path / "a.csv", {}, columns=[name for name in COLUMNS if name != "value"]))
    with pytest.raises(CallerError, match="line 2: no rows"):
        read_rows(write(tmp_path / "b.csv"))
    twice = tmp_path / "f.csv"
    twice.write_text(
        write(tmp_path / "e.csv", {}).read_text().replace("source", "source,value").replace("nobody", "nobody,1")
    )
    with pytest.raises(CallerError, match=r"f\.csv, line 1: column value is there 2 times; keep one"):
        read_rows(twice)
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_bytes(write(tmp_path / "e.csv", {}).read_bytes().replace(b"nobody", b"M\xfcller"))
    with pytest.raises(CallerError, match=r"d\.csv, line 2, byte \d+: 0xfc is not UTF-8"):
        read_rows(tmp_path / "d.csv")
    with pytest.raises(CallerError, match=r"b\.csv, line 2: is no row of cells .*close every quotation mark"):
        read_rows(write(tmp_path / "b.csv", {"source": '"nobody'}))


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("A100-80GB", "a100_80"), ("A100-40GB", "a100_40"), ("a100_40gb", "a100_40"), ("A100", "a100_80"),
        ("NVIDIA A100-SXM4-80GB", "a100_80"), ("A800-80GB", "a800"), ("H100-80GB", "h100"), ("H100 SXM5", "h100"),
        ("H800", "h800"), ("H200", "h200"), ("V100", "v100"), ("TPUv4", "tpu_v4"), ("TPUv5p", "tpu_v5p"),
        ("TPU v5e", "tpu_v5e"), ("a100_80", "a100_80"), ("A100_40", "a100_40"), ("tpu_v6e", "tpu_v6e"),
        ("TPU v5 lite", "tpu_v5e"), ("NVIDIA H100 80GB HBM3", "h100"), ("Tesla V100-SXM2-32GB", "v100"),
        ("v5p", "tpu_v5p"), ("TPUv6e", "tpu_v6e"), ("trillium", "tpu_v6e"), ("B200", "b200"),
    ],
)  # fmt: skip
def test_chips_variously_spelt(name, chip):
    assert chip_of(name).name == chip


def test_shapes_have_the_parameters_of_their_rows():
    """All published rows: within 3 % of the total, 4 % of the active ones, or the vocabulary is not counted."""
    for row in read_rows(PUBLISHED_RUNS):
        if row.kind == "train":
            shape = setup_of(row).shape
            total, active = parameters.count(shape).total, parameters.count_active(shape)
            assert total / row.params_total == pytest.approx(1, abs=0.03), row.name
            assert active / row.params_active == pytest.approx(1, abs=0.04), row.name


def _setup(tmp_path, **changes):
    (row,) = read_rows(write(tmp_path / "rows.csv", changes))
    return setup_of(row)


def test_names_tell_experts_and_capacity(tmp_path):
    changes = {"params_total": "754e9", "params_active": "123e9", "layers": 56, "d_model": 8192, "n_heads": 128}
    setup = _setup(tmp_path, name="new-16e2-cf1.5", tp="", pp="", dp="", gpus="256", gpu_type="TPUv6e", **changes)
    shape = setup.shape
    assert (shape.num_experts, shape.experts_per_token, shape.capacity_factor) == (16, 2, 1.5)
    assert (shape.expert_hidden_dim, shape.head_dim) == (32_768, 256)
    assert setup.guessed == ("tp", "pp", "dp") and setup.layout.chips == 256


def test_names_tell_microbatch_zero_and_remat(tmp_path):
    layout = _setup(tmp_path, name="bloom-x-mbs4-zero0-selective").layout
    assert (layout.microbatch_rows, layout.zero, layout.remat) == (4, 0, "selective")
    layout = _setup(tmp_path, name="korthikanti-x-full").layout
    assert (layout.remat, layout.sequence_parallel) == ("full", False)


def test_what_a_layout_does_not_take_splits_the_sequence(tmp_path):
    assert _setup(tmp_path, gpus="128").layout.context == 2


def test_a_slice_of_a_pod_is_its_domain(tmp_path):
    setup = _setup(tmp_path, name="maxtext-13b-4x16", gpu_type="TPUv5p")
    assert setup.chip.network.domain_chips == 16


def test_known_sources_and_others(tmp_path):
    (known, other, tpu, eight) = read_rows(
        write(
            tmp_path / "rows.csv",
            {"name": "megatron-sc21-t2-x-zero3-384"},
            {"name": "nobody-7b"},
            {"name": "nobody-7b-tpu", "gpu_type": "TPUv4"},
            {"name": "mpt-7b-fp8", "gpu_type": "H100"},
        )
    )
    assert source_of(known).stack.name == "deepspeed-zero3"
    assert (source_of(other).name, source_of(other).zero, source_of(tpu).zero) == ("nobody", 1, 3)
    assert source_of(eight).stack.matmul_bits == 8


def test_conventions_of_one_step_agree(tmp_path):
    """A step told in every way it can be is the same number of seconds."""
    setup = _setup(tmp_path, name="nobody-13b")
    seconds = 10.0
    layers, dim, heads = 40, 5120, 40
    work = {}
    for causal in (False, True):
        core = 12 * layers * heads * (dim // heads) * 2048 / (2 if causal else 1)
        matrices = 6 * (parameters.count(setup.shape).total - parameters.count(setup.shape).norms)
        work[causal] = (matrices + core) * setup.batch_tokens
    told = {
        "step_time": seconds,
        "mfu": 100 * work[False] / seconds / 64 / 312e12,
        "model_tflops_per_gpu": work[False] / seconds / 64 / 1e12,
        "tokens_per_s_per_gpu": setup.batch_tokens / seconds / 64,
        "tokens_per_s": setup.batch_tokens / seconds,
    }
    for metric, value in told.items():
        assert conventions.SECONDS[metric](setup, value) == pytest.approx(seconds, rel=0.03), metric
    assert work[True] < work[False]


def test_recomputation_is_counted_where_the_paper_does(tmp_path):
    """96 B s l h^2 (1 + s/6h + V/16lh), Narayanan et al. 2021, equation 3: the head is not computed again."""
    setup = _setup(tmp_path, name="megatron-sc21-x")
    assert setup.layout.remat == "full"
    layers, dim, vocab = 40, 5120, 51_200
    rows = setup.batch_tokens / 2048
    work = 96 * rows * 2048 * layers * dim**2 * (1 + 2048 / (6 * dim) + vocab / (16 * layers * dim))
    found = conventions.SECONDS["hw_tflops_per_gpu"](setup, 140.0)
    assert found == pytest.approx(work / (64 * 140e12), rel=1e-3)


def test_hours_need_the_tokens_of_the_run(tmp_path):
    setup = _setup(tmp_path, name="llama2-13B-x", measured_metric="gpu_hours")
    hours = 64 * 10 * (2e12 / setup.batch_tokens) / 3600
    assert conventions.SECONDS["gpu_hours"](setup, hours) == pytest.approx(10)
    with pytest.raises(NotTold, match=r"gpu_hours need the tokens of the run, .*line 2"):
        conventions.SECONDS["gpu_hours"](_setup(tmp_path, name="nobody-13B"), hours)


def test_memory_is_in_its_unit(tmp_path):
    told = {"measured_metric": "memory_gb", "value": "30"}
    rows = [told | {"name": "some-1", "unit": "GB"}, told | {"name": "some-2", "unit": "GiB"}]
    found = validate.examine(write(tmp_path / "rows.csv", *rows))["rows"]
    assert found[0]["predicted"] == pytest.approx(found[0]["memory_bytes"] / 1e9)
    assert found[0]["predicted"] / found[1]["predicted"] == pytest.approx(2**30 / 1e9)


def test_conventions_of_utilisation(tmp_path):
    """A fraction is percent over 100; hardware counts what is computed again; llm-foundry divides by the 8-bit peak."""
    full = _setup(tmp_path, name="some-13b-full")
    seconds = {
        metric: conventions.SECONDS[metric](full, value)
        for metric, value in (("hfu", 40.0), ("mfu", 40.0), ("hw_tflops_per_gpu", 0.4 * 312))
    }
    assert seconds["hfu"] == pytest.approx(seconds["hw_tflops_per_gpu"])
    assert 1.3 < seconds["hfu"] / seconds["mfu"] < 4 / 3
    told = {"measured_metric": "mfu", "value": "0.4", "unit": "fraction"}
    assert conventions.measured_seconds(_setup(tmp_path, **told)) == pytest.approx(
        conventions.measured_seconds(_setup(tmp_path, **told | {"value": "40", "unit": "%"}))
    )
    half = _setup(tmp_path, name="maxtext-13b-x", gpu_type="TPUv5p")
    assert half.source.causal
    whole = conventions.SECONDS["mfu_noncausal_bf16peak"](half, 40.0)
    assert whole > conventions.SECONDS["mfu"](half, 40.0)
    eight = _setup(tmp_path, name="mpt-13b-fp8", gpu_type="H100")
    half_rate = eight.chip.peak_flops / eight.chip.peak_8bit_ops
    work = conventions.model_flops_per_token(eight, causal=False) * eight.batch_tokens
    assert conventions.SECONDS["mfu"](eight, 40.0) == pytest.approx(
        half_rate * work / (64 * 0.4 * eight.chip.peak_flops)
    )
    opt = _setup(tmp_path, name="opt-13b-full")
    plain = _setup(tmp_path, name="nobody-13b-full")
    assert opt.layout.remat == plain.layout.remat == "full"
    ratio = [
        conventions.SECONDS["tflops_per_gpu"](each, 140.0) / conventions.SECONDS["model_tflops_per_gpu"](each, 140.0)
        for each in (opt, plain)
    ]
    assert ratio[0] > 1.25 and ratio[1] == pytest.approx(1)


def test_a_batch_is_rounded_up_by_a_tenth_at_most(tmp_path):
    """80 sequences over 64 replicas: one each; microbatches of two would make 128 of them."""
    layout = _setup(tmp_path, tp="1", dp="64", global_batch_tokens=str(80 * 2048)).layout
    assert layout.microbatch_rows == 1


def test_values_that_no_chip_reaches(tmp_path):
    """Above the peak by its own claim, by the FLOPs of its step, or with a batch that we guessed."""
    claims = (
        ({"measured_metric": "hw_tflops_per_gpu", "unit": "TFLOP/s", "value": "400"}, "400 TFLOP/s means 400 TFLOP/s"),
        ({"measured_metric": "mfu", "unit": "%", "value": "101"}, "101 % means 315.1 TFLOP/s"),
        ({"value": "1"}, r"1 s means 1\d\d\d TFLOP/s"),
        ({"measured_metric": "tokens_per_s", "unit": "tok/s", "value": "1e18"}, r"1e\+18 tok/s means"),
    )
    for changes, says in claims:
        with pytest.raises(CallerError, match=rf"line 2, column value: {says}.* a chip, a100_80 has 312; look"):
            conventions.measured_seconds(_setup(tmp_path, **changes))
    with pytest.raises(NotTold, match="line 2, column global_batch_tokens: is empty, and with 524288 1 s means"):
        conventions.measured_seconds(_setup(tmp_path, value="1", global_batch_tokens=""))
    conventions.measured_seconds(_setup(tmp_path, value="5"))
    eight = {"name": "mpt-7b-fp8", "gpu_type": "H100", "measured_metric": "tflops_per_gpu", "unit": "TFLOP/s"}
    conventions.measured_seconds(_setup(tmp_path, **eight, value="1200"))
