"""Published measurements: rows of a CSV file, each a model, a machine, a layout as far as it is told, and a number.

In: a path. Out: `Row`s as the file has them; `CallerError` with file, line, column and value for a cell that cannot be.
What a row leaves open is decided in `setups`; a row that nothing can be predicted for is passed over by `comparison`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
import re

from gpt4moe.accounting import chips
from gpt4moe.accounting.chips import Chip
from gpt4moe.config.check import CallerError
from gpt4moe.plan.published import csv_table, units

PUBLISHED_RUNS = pathlib.Path(__file__).with_name("published_runs.csv")
COUNTS = ("layers", "d_model", "n_heads", "seq", "gpus", "tp", "pp", "dp")
NUMBERS = ("params_total", "params_active", "global_batch_tokens", "value")
COLUMNS = ("name", "kind", *NUMBERS, *COUNTS, "gpu_type", "measured_metric", "unit", "source")
KINDS = ("train", "infer")
# Widths without which there is no model to train.
WIDTHS = ("params_total", "layers", "d_model", "n_heads")
# How tables write a number that nobody told.
EMPTY = ("", "-", "n/a", "na", "none", "?")
# Of counts and of other numbers: beyond it is a slip of the pen, and nothing here is reckoned with it.
MOST_COUNT, MOST_NUMBER = 10**7, 1e18


class NotTold(CallerError):
    """A row that is well formed and leaves out what a prediction needs: it is passed over, and said so."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement; None where the file leaves a cell empty. gpus are chips of any kind; tokens of one step."""

    name: str
    kind: str
    params_total: float | None
    params_active: float | None
    layers: int | None
    d_model: int | None
    n_heads: int | None
    seq: int | None
    global_batch_tokens: int | None
    gpus: int | None
    gpu_type: str
    tp: int | None
    pp: int | None
    dp: int | None
    measured_metric: str
    value: float
    unit: str
    source: str
    where: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What no other row of a file has: one run may tell several numbers."""
        return self.name, self.measured_metric

    @property
    def chip(self) -> Chip:
        """The chip that `gpu_type` means; raises `CallerError` with its place for an unknown one."""
        try:
            return chip_of(self.gpu_type)
        except CallerError as error:
            raise CallerError(f"{self.where}, column gpu_type: {self.gpu_type!r}: {error}") from None

    @property
    def told(self) -> float:
        """The value in the unit of its metric (`units`); raises `NotTold` with its place for a unit of another kind."""
        try:
            return units.in_unit_of(self.measured_metric, self.value, self.unit)
        except CallerError as error:
            raise NotTold(f"{self.where}, column unit: {error}") from None


def read_rows(path: str | os.PathLike) -> list[Row]:
    """Returns the rows of a CSV file; raises `CallerError` for what is missing or no number, `OSError` as it comes.

    Columns may stand in any order, beside others; rows without a single cell are passed over.
    """
    rows = [_read_row(cells, f"{path}, line {line}") for line, cells in csv_table.read_cells(path, COLUMNS)]
    if not rows:
        raise CallerError(f"{path}, line 2: no rows; give at least one measurement")
    keys = collections.Counter(row.key for row in rows)
    for row in rows:
        if keys[row.key] > 1:
            told = f"{row.name!r} is there twice with {row.measured_metric!r}; names must differ"
            raise CallerError(f"{row.where}, column name: {told}")
    return rows


def chip_of(gpu_type: str) -> Chip:
    """Returns the chip of a published name: `A100-80GB`, `TPUv5p`, `a100_80`; raises `CallerError` for an unknown one.

    Names of our table, as `--chip` takes them, and those that JAX reports are known too.
    """
    own = gpu_type.strip().lower()
    if own in {chip.name for chip in chips.CHIPS}:
        return chips.chip_named(own)
    plain = "".join(letter for letter in own if letter.isalnum())
    for word in (
        "nvidia",
        "tesla",
        "sxm2",
        "sxm3",
        "sxm4",
        "sxm5",
        "sxm",
        "pcie",
        "dgx",
        "hbm2e",
        "hbm2",
        "hbm3e",
        "hbm3",
    ):
        plain = plain.replace(word, "")
    small = plain.endswith("40gb")
    plain = re.sub(r"(16|32|40|80|94|96|141)gb$", "", plain)
    plain = plain.replace("tpu", "tpu_").removesuffix("ironwood") if plain.startswith("tpu") else plain
    known = {"a100": "a100_40" if small else "a100_80", "tpu_7": "tpu_7x", "tpu_v7": "tpu_7x", "tpu_v7x": "tpu_7x"}
    known |= {"v5p": "tpu_v5p", "v5e": "tpu_v5e", "tpu_v5litepod": "tpu_v5e", "trillium": "tpu_v6e", "v6e": "tpu_v6e"}
    name = known.get(plain, plain)
    reported = None if name in {chip.name for chip in chips.CHIPS} else chips.find_chip(gpu_type.strip())
    return reported or chips.chip_named(name)


def _read_row(texts: dict[str, str], where: str) -> Row:
    texts |= {name: texts[name].lower() for name in ("kind", "measured_metric")}
    if not texts["name"]:
        raise CallerError(f"{where}, column name: '' must not be empty")
    if texts["kind"] not in KINDS:
        raise CallerError(f"{where}, column kind: {texts['kind']!r} must be in {KINDS}")
    numbers = {name: _number(texts[name], where, name) for name in (*NUMBERS, *COUNTS)}
    if numbers["value"] is None:
        raise CallerError(f"{where}, column value: '' must be a number above 0")
    if numbers["global_batch_tokens"] is not None:
        numbers["global_batch_tokens"] = int(numbers["global_batch_tokens"])
    active = numbers["params_active"] or numbers["params_total"]
    if active and numbers["params_total"] and active > 1.05 * numbers["params_total"]:
        most = f"must be at most params_total ({numbers['params_total']:g})"
        raise CallerError(f"{where}, column params_active: {active:g} {most}")
    return Row(**texts | numbers | {"params_active": active, "where": where})


def _number(text: str, where: str, column: str) -> float | int | None:
    """A number above zero, whole where the column counts something; None where nobody told it."""
    if text.lower() in EMPTY:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    whole, most = column in COUNTS, MOST_COUNT if column in COUNTS else MOST_NUMBER
    if not (math.isfinite(number) and number > 0 and (not whole or number == int(number))):
        kind = "a whole number" if whole else "a number"
        raise CallerError(f"{where}, column {column}: {text!r} must be {kind} above 0")
    if number > most:
        raise CallerError(f"{where}, column {column}: {text!r} must be at most {most:g}")
    return int(number) if whole else number
