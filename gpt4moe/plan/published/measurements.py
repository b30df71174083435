"""Published measurements: rows of a CSV file, each a model, a machine, a layout as far as it is told, and a number.

In: a path. Out: `Row`s as the file has them; `CallerError` with file, line, column and value for a bad one. What a row
leaves open is decided in `published_setups`.
"""

from __future__ import annotations

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
# Widths without which there is no model; of inference rows their predictor decides.
NEEDED = ("params_total", "layers", "d_model", "n_heads", "value")


class NotTold(CallerError):
    """A row that is well formed and leaves out what a prediction needs: it is passed over, and said so."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement; None where the file leaves a cell empty. gpus are chips of any kind; tokens of one step."""

    name: str
    kind: str
    params_total: float
    params_active: float
    layers: int
    d_model: int
    n_heads: int
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
    def chip(self) -> Chip:
        """The chip that `gpu_type` means."""
        return chip_of(self.gpu_type)


def read_rows(path: str | os.PathLike) -> list[Row]:
    """Returns the rows of a CSV file; raises `CallerError` for what is missing or no number, `OSError` as it comes."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise CallerError(f"{path}, line 1: no column {', '.join(missing)}; the columns are {','.join(COLUMNS)}")
        rows = [_read_row(cells, f"{path}, line {reader.line_num}") for cells in reader]
    if not rows:
        raise CallerError(f"{path}, line 2: no rows; give at least one measurement")
    names = [row.name for row in rows]
    for row in rows:
        if names.count(row.name) > 1:
            raise CallerError(f"{row.where}, column name: {row.name!r} is there twice; names must differ")
    return rows


def chip_of(gpu_type: str) -> Chip:
    """Returns the chip of a published name: `A100-80GB`, `TPUv5p`, `H800`; raises `CallerError` for an unknown one."""
    plain = "".join(letter for letter in gpu_type.lower() if letter.isalnum())
    for word in ("nvidia", "sxm4", "sxm5", "sxm", "pcie", "dgx"):
        plain = plain.replace(word, "")
    small = plain.endswith("40gb")
    plain = plain.removesuffix("80gb").removesuffix("40gb").removesuffix("32gb").removesuffix("141gb")
    plain = plain.replace("tpu", "tpu_").removesuffix("ironwood") if plain.startswith("tpu") else plain
    known = {"a100": "a100_40" if small else "a100_80", "tpu_7": "tpu_7x", "tpu_v7": "tpu_7x", "tpu_v7x": "tpu_7x"}
    known |= {"v5p": "tpu_v5p", "v5e": "tpu_v5e", "tpu_v5litepod": "tpu_v5e", "trillium": "tpu_v6e", "v6e": "tpu_v6e"}
    return chips.chip_named(known.get(plain, plain))


def _read_row(cells: dict[str, str | None], where: str) -> Row:
    if None in cells or None in cells.values():
        raise CallerError(f"{where}: not as many cells as the {len(COLUMNS)} columns; quote cells with commas")
    texts = {name: (cells[name] or "").strip() for name in COLUMNS}
    if not texts["name"]:
        raise CallerError(f"{where}, column name: '' must not be empty")
    if texts["kind"] not in KINDS:
        raise CallerError(f"{where}, column kind: {texts['kind']!r} must be in {KINDS}")
    numbers = {name: _number(texts[name], where, name) for name in (*NUMBERS, *COUNTS)}
    for name in NEEDED:
        if numbers[name] is None and (texts["kind"] == "train" or name == "value"):
            raise CallerError(f"{where}, column {name}: '' must be a number above 0")
    if numbers["global_batch_tokens"] is not None:
        numbers["global_batch_tokens"] = int(numbers["global_batch_tokens"])
    active = numbers["params_active"] or numbers["params_total"]
    if active and numbers["params_total"] and active > 1.05 * numbers["params_total"]:
        most = f"must be at most params_total ({numbers['params_total']:g})"
        raise CallerError(f"{where}, column params_active: {active:g} {most}")
    row = Row(**texts | numbers | {"params_active": active, "where": where})
    try:
        _ = row.chip
    except CallerError as error:
        raise CallerError(f"{where}, column gpu_type: {row.gpu_type!r}: {error}") from None
    return row


def _number(text: str, where: str, column: str) -> float | int | None:
    """A number above zero, whole where the column counts something; None for an empty cell."""
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    whole = column in COUNTS
    if not (math.isfinite(number) and number > 0 and (not whole or number == int(number))):
        kind = "a whole number" if whole else "a number"
        raise CallerError(f"{where}, column {column}: {text!r} must be {kind} above 0")
    return int(number) if whole else number
