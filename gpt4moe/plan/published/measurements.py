"""Published measurements: rows of a CSV file, each a model, a machine, a layout as far as it is told, and a number.

In: a path. Out: `Row`s as the file has them; `CallerError` with file, line, column and value for a cell that cannot be.
What a row leaves open is decided in `setups`; a row that nothing can be predicted for is passed over by `comparison`.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import math
import os
import pathlib

from gpt4moe.accounting import chips
from gpt4moe.accounting.chips import Chip
from gpt4moe.config.check import CallerError

PUBLISHED_RUNS = pathlib.Path(__file__).with_name("published_runs.csv")
COUNTS = ("layers", "d_model", "n_heads", "seq", "gpus", "tp", "pp", "dp")
NUMBERS = ("params_total", "params_active", "global_batch_tokens", "value")
COLUMNS = ("name", "kind", *NUMBERS, *COUNTS, "gpu_type", "measured_metric", "unit", "source")
KINDS = ("train", "infer")
# Widths without which there is no model to train.
WIDTHS = ("params_total", "layers", "d_model", "n_heads")
# How tables write a number that nobody told.
EMPTY = ("", "-", "n/a", "na", "none", "?")
# Seconds of a time's unit.
TIME_UNITS = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0}
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
    def unit_seconds(self) -> float:
        """Seconds of the unit of a row that tells a time; raises `NotTold` with its place for another unit."""
        if self.unit not in TIME_UNITS:
            raise NotTold(f"{self.where}, column unit: {self.unit!r} of a time must be in {tuple(TIME_UNITS)}")
        return TIME_UNITS[self.unit]


def read_rows(path: str | os.PathLike) -> list[Row]:
    """Returns the rows of a CSV file; raises `CallerError` for what is missing or no number, `OSError` as it comes.

    Columns may stand in any order, beside others; rows without a single cell are passed over.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a byte order mark
        reader = csv.DictReader(file, strict=True)
        try:
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            missing = [name for name in COLUMNS if name not in reader.fieldnames]
            if missing:
                told = f"no column {', '.join(missing)}; the columns are {','.join(COLUMNS)}, with commas between"
                raise CallerError(f"{path}, line 1: {told}")
            twice = [name for name in COLUMNS if reader.fieldnames.count(name) > 1]
            if twice:
                raise CallerError(f"{path}, line 1: column {twice[0]} is there twice; take one out")
            rows = [_read_row(cells, f"{path}, line {reader.line_num}") for cells in reader if _is_told(cells)]
        except csv.Error as error:
            raise CallerError(f"{path}, line {reader.reader.line_num}: is no CSV ({error}); close its quotes") from None
        except UnicodeDecodeError as error:
            raise CallerError(f"{path}: is not UTF-8 ({error.reason}); save it so") from None
    if not rows:
        raise CallerError(f"{path}, line 2: no rows; give at least one measurement")
    keys = collections.Counter(row.key for row in rows)
    for row in rows:
        if keys[row.key] > 1:
            told = f"{row.name!r} is there twice with {row.measured_metric!r}; names must differ"
            raise CallerError(f"{row.where}, column name: {told}")
    return rows


def chip_of(gpu_type: str) -> Chip:
    """Returns the chip of a published name: `A100-80GB`, `TPUv5p`, `H800`; raises `CallerError` for an unknown one."""
    if gpu_type in {chip.name for chip in chips.CHIPS}:
        return chips.chip_named(gpu_type)
    plain = "".join(letter for letter in gpu_type.lower() if letter.isalnum())
    for word in ("nvidia", "sxm4", "sxm5", "sxm", "pcie", "dgx"):
        plain = plain.replace(word, "")
    small = plain.endswith("40gb")
    plain = plain.removesuffix("80gb").removesuffix("40gb").removesuffix("32gb").removesuffix("141gb")
    plain = plain.replace("tpu", "tpu_").removesuffix("ironwood") if plain.startswith("tpu") else plain
    known = {"a100": "a100_40" if small else "a100_80", "tpu_7": "tpu_7x", "tpu_v7": "tpu_7x", "tpu_v7x": "tpu_7x"}
    known |= {"v5p": "tpu_v5p", "v5e": "tpu_v5e", "tpu_v5litepod": "tpu_v5e", "trillium": "tpu_v6e", "v6e": "tpu_v6e"}
    return chips.chip_named(known.get(plain, plain))


def _is_told(cells: dict[str, str | None]) -> bool:
    return any(value and (type(value) is list or value.strip()) for value in cells.values())


def _read_row(cells: dict[str, str | None], where: str) -> Row:
    if None in cells or None in cells.values():
        columns = sum(name is not None for name in cells)
        raise CallerError(f"{where}: not as many cells as the {columns} columns; quote cells with commas")
    texts = {name: (cells[name] or "").strip() for name in COLUMNS}
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
