"""Winograd's algebra in exact rationals: published matrices, exact convolution, scales, noise gain, bad input."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmpq_exp.winograd.transform import (
    IMPROVED_POINTS,
    Matrix,
    Transform,
    WinogradScales,
    build_transform,
    closed_form_scales,
    exact_matrices,
    format_point,
    ineligible_reason,
    noise_gain,
    parse_points,
    standard_scales,
    standard_scales_exact,
    tap_std,
    to_tensor,
    transpose,
)


def rational_rows(text: str) -> Matrix:
    return tuple(tuple(Fraction(v) for v in row.split()) for row in text.strip().split("\n"))


# A_T, G, B_T of Lavin and Gray (2016) and, for F(6,3), of wincnn and NNPACK.
PUBLISHED = {
    2: (
        "1 1 1 0\n0 1 -1 -1",
        "1 0 0\n1/2 1/2 1/2\n1/2 -1/2 1/2\n0 0 1",
        "1 0 -1 0\n0 1 1 0\n0 -1 1 0\n0 1 0 -1",
    ),
    4: (
        "1 1 1 1 1 0\n0 1 -1 2 -2 0\n0 1 1 4 4 0\n0 1 -1 8 -8 1",
        "1/4 0 0\n-1/6 -1/6 -1/6\n-1/6 1/6 -1/6\n1/24 1/12 1/6\n1/24 -1/12 1/6\n0 0 1",
        "4 0 -5 0 1 0\n0 -4 -4 1 1 0\n0 4 -4 -1 1 0\n0 -2 -1 2 1 0\n0 2 -1 -2 1 0\n0 4 0 -5 0 1",
    ),
    6: (
        "1 1 1 1 1 1 1 0\n0 1 -1 2 -2 1/2 -1/2 0\n0 1 1 4 4 1/4 1/4 0\n0 1 -1 8 -8 1/8 -1/8 0\n"
        "0 1 1 16 16 1/16 1/16 0\n0 1 -1 32 -32 1/32 -1/32 1",
        "1 0 0\n-2/9 -2/9 -2/9\n-2/9 2/9 -2/9\n1/90 1/45 2/45\n1/90 -1/45 2/45\n"
        "32/45 16/45 8/45\n32/45 -16/45 8/45\n0 0 1",
        "1 0 -21/4 0 21/4 0 -1 0\n0 1 1 -17/4 -17/4 1 1 0\n0 -1 1 17/4 -17/4 -1 1 0\n"
        "0 1/2 1/4 -5/2 -5/4 2 1 0\n0 -1/2 1/4 5/2 -5/4 -2 1 0\n0 2 4 -5/2 -5 1/2 1 0\n"
        "0 -2 4 5/2 -5 -1/2 1 0\n0 -1 0 21/4 0 -21/4 0 1",
    ),
}


def standard_matrices(transform: Transform) -> tuple[Matrix, Matrix, Matrix]:
    return exact_matrices(transform, *standard_scales_exact(transform))


def sign_between(ours: tuple[Fraction, ...], theirs: tuple[Fraction, ...]) -> int:
    assert ours == theirs or ours == tuple(-v for v in theirs), (ours, theirs)
    return 1 if ours == theirs else -1


@pytest.mark.parametrize("m", [2, 4, 6])
def test_equals_the_published_matrices_up_to_signs_that_cancel(m: int) -> None:
    A_T, G, B_T = standard_matrices(build_transform(m))
    published_A_T, published_G, published_B_T = map(rational_rows, PUBLISHED[m])
    pairs = zip(
        transpose(A_T), transpose(published_A_T), G, published_G, B_T, published_B_T, strict=True
    )  # one tap at a time
    for a, published_a, g, published_g, b, published_b in pairs:
        signs = [sign_between(a, published_a), sign_between(g, published_g), sign_between(b, published_b)]
        assert math.prod(signs) == 1


rationals = st.fractions(min_value=-4, max_value=4, max_denominator=6)


@st.composite
def transforms(draw: st.DrawFn, max_m: int = 6) -> Transform:
    m, r = draw(st.integers(2, max_m)), draw(st.integers(2, 5))
    with_infinity = draw(st.booleans())
    num_finite = m + r - 1 - with_infinity
    finite = draw(st.lists(rationals, min_size=num_finite, max_size=num_finite, unique=True))
    position = draw(st.integers(0, num_finite))
    return build_transform(m, r, [*finite[:position], *(["inf"] if with_infinity else []), *finite[position:]])


def times(matrix: Matrix, columns: Matrix) -> Matrix:
    return tuple(tuple(sum((a * b for a, b in zip(row, c, strict=True)), Fraction(0)) for c in transpose(columns))
                 for row in matrix)  # fmt: skip


def hadamard(a: Matrix, b: Matrix) -> Matrix:
    return tuple(tuple(x * y for x, y in zip(p, q, strict=True)) for p, q in zip(a, b, strict=True))


def integer_matrix(draw: st.DrawFn, rows: int, columns: int) -> Matrix:
    row = st.lists(st.integers(-9, 9).map(Fraction), min_size=columns, max_size=columns).map(tuple)
    return tuple(draw(st.lists(row, min_size=rows, max_size=rows)))


@settings(max_examples=25, deadline=None)
@given(st.data(), transforms())
def test_one_dimension_is_exact_for_any_points_and_any_scales(data: st.DataObject, transform: Transform) -> None:
    nonzero = rationals.filter(bool)
    scales = st.lists(nonzero, min_size=transform.n, max_size=transform.n)
    A_T, G, B_T = exact_matrices(transform, data.draw(scales), data.draw(scales))
    d, g = (data.draw(st.composite(integer_matrix)(size, 1)) for size in (transform.n, transform.r))
    expected = tuple((sum(d[j + k][0] * g[k][0] for k in range(transform.r)),) for j in range(transform.m))
    assert times(A_T, hadamard(times(G, g), times(B_T, d))) == expected


@settings(max_examples=25, deadline=None)
@given(st.data(), transforms(max_m=4))
def test_two_dimensions_are_exact(data: st.DataObject, transform: Transform) -> None:
    A_T, G, B_T = standard_matrices(transform)
    d, g = (data.draw(st.composite(integer_matrix)(size, size)) for size in (transform.n, transform.r))
    u, v = times(times(G, g), transpose(G)), times(times(B_T, d), transpose(B_T))
    taps = range(transform.r)
    expected = tuple(
        tuple(sum(d[i + a][j + b] * g[a][b] for a in taps for b in taps) for j in range(transform.m))
        for i in range(transform.m)
    )
    assert times(times(A_T, hadamard(u, v)), transpose(A_T)) == expected


@settings(max_examples=25, deadline=None)
@given(transforms())
def test_standard_scales_leave_A_T_free_of_scales(transform: Transform) -> None:
    s_b, s_g = standard_scales_exact(transform)
    assert all(b * g == 1 for b, g in zip(s_b, s_g, strict=True))
    assert standard_matrices(transform)[0] == transpose(transform.V_m)


@settings(max_examples=25, deadline=None)
@given(transforms())
def test_closed_form_scales_make_every_tap_of_white_input_alike(transform: Transform) -> None:
    scales = closed_form_scales(transform)
    assert tap_std(transform, scales) == pytest.approx([1.0] * transform.n)
    assert [a * b * g for a, b, g in zip(scales.s_a, scales.s_b, scales.s_g, strict=True)] == pytest.approx(
        [1.0] * transform.n
    )


@pytest.mark.parametrize(("m", "spread"), [(2, 4 / 3), (4, 115.2), (6, 1678.8)])
def test_standard_scales_spread_the_taps(m: int, spread: float) -> None:
    std = tap_std(build_transform(m), standard_scales(build_transform(m)))
    assert (max(std) / min(std)) ** 2 == pytest.approx(spread, rel=2e-3)


@pytest.mark.parametrize(
    ("m", "points", "loss_db"),
    [
        (2, "standard", 4.4),
        (4, "standard", 20.6),
        (4, "improved", 13.6),
        (5, "improved", 19.6),
        (6, "standard", 26.3),
        (3, "improved", 8.4),
    ],
)
def test_noise_gain(m: int, points: str, loss_db: float) -> None:
    assert 20 * math.log10(noise_gain(build_transform(m, 3, points))) == pytest.approx(loss_db, abs=0.06)


@pytest.mark.parametrize(("m", "r"), IMPROVED_POINTS)
def test_improved_points_are_never_worse(m: int, r: int) -> None:
    assert noise_gain(build_transform(m, r, "improved")) <= noise_gain(build_transform(m, r))


def test_points_are_read_as_rationals() -> None:
    spec = [0, "2/3", -1.5, Fraction(-2, 3), "1.5", "inf"]
    assert [format_point(p) for p in parse_points(spec, 4)] == ["0", "2/3", "-3/2", "-2/3", "3/2", "inf"]
    assert parse_points([format_point(p) for p in parse_points(spec, 4)], 4) == parse_points(spec, 4)
    assert build_transform(4, 3, ("0", "1", "-1", "2", "-2", "inf")) is build_transform(4)


@pytest.mark.parametrize(
    ("spec", "m", "r", "message"),
    [
        (["0", "1", "1", "inf"], 2, 3, "points must all differ, found 1 more than once"),
        (["0", "2/4", "1/2", "inf"], 2, 3, "found 1/2 more than once"),
        (["0", "inf", "inf", "1"], 2, 3, "found inf more than once"),
        (["0", "1", "inf"], 2, 3, "m \\+ r - 1 = 4 entries for F\\(2,3\\), found 3"),
        (["0", "1", "x", "inf"], 2, 3, "found 'x'"),
        (["0", "1", "1/0", "inf"], 2, 3, "found '1/0'"),
        (["0", "1", float("nan"), "inf"], 2, 3, "found nan"),
        ([0, True, -1, "inf"], 2, 3, "found True"),
        ("best", 4, 3, "'standard', 'improved' or a list of 6 points, found 'best'"),
        ("improved", 4, 5, "found F\\(4,5\\)"),
        ("standard", 1, 3, "m must be an integer in 2..8, found 1"),
        ("standard", 9, 3, "m must be an integer in 2..8, found 9"),
        ("standard", 4, 7, "r must be an integer in 2..5, found 7"),
        ("standard", 4.0, 3, "m must be an integer"),
    ],
)
def test_bad_points_are_refused(spec: object, m: int, r: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_points(spec, m, r)  # type: ignore[arg-type]


def test_scales_survive_json_and_refuse_nonsense() -> None:
    scales = closed_form_scales(build_transform(6))
    assert WinogradScales.from_json(scales.to_json()) == scales
    with pytest.raises(ValueError, match="s_b must hold finite numbers other than 0"):
        WinogradScales((1.0, 0.0), (1.0, 1.0))
    with pytest.raises(ValueError, match="equal length, found 2 and 1"):
        WinogradScales((1.0, 1.0), (1.0,))
    with pytest.raises(ValueError, match="not Winograd scales"):
        WinogradScales.from_json({"s_b": [1.0]})


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((3,), None),
        (((3, 3), (1, 1), (1, 1), 1), None),
        ((1,), "kernel 1x1, needs 3x3"),
        (((3, 1),), "kernel 3x1, needs 3x3"),
        ((3, 2), "stride 2x2, needs 1x1"),
        ((3, 1, (1, 2)), "dilation 1x2, needs 1x1"),
        ((3, 1, 1, 4), "groups 4, needs 1"),
        ((5, 1, 1, 1, 5), None),
    ],
)
def test_eligibility(args: tuple[int, ...], reason: str | None) -> None:
    assert ineligible_reason(*args) == reason


def test_tensor_rounds_each_entry_once() -> None:
    assert to_tensor(((Fraction(1, 3), Fraction(-2)),)).tolist() == [[1 / 3, -2.0]]


def test_needs_no_torch() -> None:
    code = (
        "import sys, tmpq_exp.winograd.transform as t\n"
        "t.closed_form_scales(t.build_transform(4)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
