"""A table of text as spreadsheets write it: with or without a byte-order mark, commas, semicolons or tabs.

In: a path and the columns that must be there, in any order, in capitals or not, beside others. Out: the line and the
cells of each row. `CallerError` with file and line for what is no such table; `OSError` as it comes.
"""

from __future__ import annotations

import csv
import io
import os
import pathlib
from collections.abc import Sequence

from gpt4moe.config.check import CallerError

SEPARATORS = ",;\t|"


def read_cells(path: str | os.PathLike, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Returns line number and cells by column of each row, spaces around them taken off; rows without text left out.

    The number is that of a row's last line, where a quoted cell goes over several.
    """
    text = _text(path)
    separator = max(SEPARATORS, key=lambda mark: len(_known(_names(text.partition("\n")[0], mark), columns)))
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    found = []
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        _check_header(path, names, columns)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                mend = "quote cells with commas" if separator == "," else f"quote cells with {separator!r} in them"
                raise CallerError(
                    f"{path}, line {reader.line_num}: not as many cells as the {len(names)} columns; {mend}"
                )
            row = dict(zip(names, (cell.strip() for cell in cells), strict=True))
            found.append((reader.line_num, {name: row[name] for name in columns}))
    except csv.Error as error:
        mend = "close every quotation mark, double those inside"
        raise CallerError(f"{path}, line {reader.line_num}: is no row of cells ({error}); {mend}") from None
    return found


def _text(path: str | os.PathLike) -> str:
    """The file as text whose lines end in one newline each."""
    data = pathlib.Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, byte = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        said = f"0x{data[error.start]:02x} is not UTF-8; save the table as CSV in UTF-8"
        raise CallerError(f"{path}, line {line}, byte {byte}: {said}") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise CallerError(f"{path}, line {line}: holds a zero byte, so it is no text; save the table as CSV in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _names(header: str, separator: str) -> list[str]:
    return [name.strip().strip('"').lower() for name in header.split(separator)]


def _known(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    return [name for name in columns if name in names]


def _check_header(path: str | os.PathLike, names: Sequence[str], columns: Sequence[str]) -> None:
    if not any(names):
        raise CallerError(f"{path}, line 1: has no names of columns; begin with {','.join(columns)}")
    missing = [name for name in columns if name not in names]
    if missing:
        raise CallerError(f"{path}, line 1: no column {', '.join(missing)}; the columns are {','.join(columns)}")
    twice = [name for name in columns if names.count(name) > 1]
    if twice:
        raise CallerError(f"{path}, line 1: column {twice[0]} is there {names.count(twice[0])} times; keep one")
