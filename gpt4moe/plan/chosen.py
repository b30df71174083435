"""The model, chip and price that a word's flags name: --gin_file or --shape, --chip, --price."""

from __future__ import annotations

import argparse
import dataclasses

from gpt4moe.accounting.chips import Chip, chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.accounting.shape import Shape, shape_of
from gpt4moe.config.check import require, require_not_negative
from gpt4moe.plan.command import Build


def shape_from(args: argparse.Namespace, build: Build) -> Shape:
    """Returns the shape of the model that gin files build, or a published one; raises unless one of them is given."""
    given = bool(args.gin_file) + bool(args.shape)
    mend = "give --gin_file=FILE or --shape=NAME"
    require(given == 1, "the model", args.shape, f"must be named once, not {given} times", mend)
    if args.shape:
        return shape_named(args.shape)
    return dataclasses.replace(shape_of(build.model()), name=args.gin_file[-1])


def chip_from(args: argparse.Namespace) -> Chip:
    """Returns the chip that --chip names."""
    return chip_named(args.chip)


def price_from(args: argparse.Namespace, chip: Chip) -> float:
    """Returns the dollars of a chip's hour: --price, else what the table of chips says."""
    price = chip.dollars_per_hour if args.price is None else args.price
    require(price is not None, "price", None, f"of {chip.name} is not in the table", "give --price=DOLLARS")
    require_not_negative("price", price)
    return price
