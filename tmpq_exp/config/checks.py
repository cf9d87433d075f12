"""The error for bad input, and the checks that several groups of the configuration share."""

from __future__ import annotations

from tmpq_exp.quant.allocation import FLOAT_BITS

MIN_BITS, MAX_BITS = 2, 16


class UserError(ValueError):
    """Something the user asked for cannot be done; the message names what was wrong, found and accepted."""


def check_at_least(name: str, value: float, low: float) -> None:
    """Refuse a value below ``low``."""
    if value < low:
        raise UserError(f"{name} must be at least {low}, found {value}")


def check_bits(name: str, bits: int, *, or_float: bool = False) -> None:
    """Refuse a bit width out of range."""
    if not MIN_BITS <= bits <= MAX_BITS and not (or_float and bits == FLOAT_BITS):
        accepted = f"{MIN_BITS}..{MAX_BITS}" + (f" or {FLOAT_BITS} (float)" if or_float else "")
        raise UserError(f"{name} must be in {accepted}, found {bits}")


def check_bit_choices(name: str, choices: list[int]) -> None:
    """Refuse bit choices that are empty, out of range or repeated."""
    if not choices:
        raise UserError(f"{name} must not be empty; give at least one bit width in {MIN_BITS}..{MAX_BITS}")
    for bits in choices:
        check_bits(name, bits)
    if len(set(choices)) != len(choices):
        raise UserError(f"{name} must not repeat a bit width, found {choices}")


def check_tile(name: str, m: int) -> None:
    """Refuse a tile out of range."""
    if not 2 <= m <= 6:
        raise UserError(f"{name}: m must be in 2..6, found {m}")
