"""Quantized Winograd convolution: exact in float, right in integers, as accurate as the algebra says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.winograd import conv
from tmpq_exp.winograd.conv import FLOAT_STAGES, WinogradMatrices, WinogradSpec, transform_weights, winograd_conv2d
from tmpq_exp.winograd.transform import WinogradScales, closed_form_scales, standard_scales


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def winograd(
    x: Tensor,
    weight: Tensor,
    spec: WinogradSpec,
    bits: int = 8,
    padding: int | tuple[int, int] = 1,
    scales: WinogradScales | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    matrices = WinogradMatrices.from_scales(spec.transform(), scales, dtype=x.dtype)
    u = transform_weights(weight, matrices, spec, bits)
    return winograd_conv2d(x, u, bias, matrices, spec, bits, padding)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 6),
    st.sampled_from([2, 3, 5]),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 4),
    st.tuples(st.integers(5, 17), st.integers(5, 17)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.booleans(),
)
def test_with_all_stages_off_it_is_the_convolution(
    m: int, r: int, batch: int, c: int, k: int, size: tuple[int, int], padding: tuple[int, int], with_bias: bool
) -> None:
    x, weight = random(batch, c, *size), random(k, c, r, r, seed=1)
    bias = random(k, seed=2) if with_bias else None
    y = winograd(x, weight, WinogradSpec(m, r, **FLOAT_STAGES), padding=padding, bias=bias)
    expected = F.conv2d(x, weight, bias, padding=padding)
    assert y.is_contiguous()
    tolerance = 1e-10 if r < 5 else 1e-9  # the standard points for n = 10 amplify rounding by 58 dB
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def per_pixel_groups(x: Tensor, group_size: int) -> Tensor:
    grouped = x.unflatten(1, (-1, group_size))
    scale = grouped.abs().amax(2, keepdim=True) / 127
    return ((grouped / scale).round() * scale).flatten(1, 2)


# Rows: m, points, then dB with M in float, M int8 standard scales, M int8 closed form; C = K = 64, 24 x 24, groups 32.
SQNR_TABLE = [
    (2, "standard", (37.2, 35.9, 36.0)),
    (4, "standard", (21.5, -3.8, 19.9)),
    (4, "improved", (28.5, 16.8, 26.8)),
    (6, "standard", (15.8, -17.4, 14.2)),
]


@pytest.mark.parametrize(("m", "points", "expected"), SQNR_TABLE)
def test_sqnr_of_white_noise(m: int, points: str, expected: tuple[float, float, float]) -> None:
    x, weight = random(2, 64, 24, 24, dtype=torch.float32), random(64, 64, 3, 3, seed=1, dtype=torch.float32)
    reference = F.conv2d(x, weight, padding=1)
    spec = WinogradSpec(m, points=points)
    variants = [
        (replace(spec, quantize_m=False), closed_form_scales),
        (spec, standard_scales),
        (spec, closed_form_scales),
    ]
    # The figures are for x quantized in groups of channels at each pixel; one scale a group for the whole image
    # costs up to 1.3 dB at F(2,3) and 0.2 dB elsewhere.
    fine = per_pixel_groups(x, 32)
    for (variant, scales), db in zip(variants, expected, strict=True):
        chosen = scales(spec.transform())
        finer = sqnr_db(reference, winograd(fine, weight, replace(variant, quantize_input=False), scales=chosen))
        coarser = sqnr_db(reference, winograd(x, weight, variant, scales=chosen))
        assert finer == pytest.approx(db, abs=0.6)
        assert finer - (1.3 if m == 2 else 0.2) <= coarser <= finer + 0.1


@pytest.mark.parametrize("stage", FLOAT_STAGES)
def test_each_stage_alone_adds_its_error_and_float_bits_switch_it_off(stage: str) -> None:
    x, weight = random(2, 16, 12, 12), random(8, 16, 3, 3, seed=1)
    reference = F.conv2d(x, weight, padding=1)
    spec = replace(WinogradSpec(4, **FLOAT_STAGES), **{stage: True})
    ten, eight = (sqnr_db(reference, winograd(x, weight, replace(spec, m_bits=b), b)) for b in (10, 8))
    assert 15 < eight < 60
    assert ten - eight == pytest.approx(12, abs=1.5)
    off = winograd(x, weight, replace(spec, m_bits=FLOAT_BITS), FLOAT_BITS)
    torch.testing.assert_close(off, reference, rtol=1e-10, atol=1e-10)


def to_int8(values: Tensor, group_size: int, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """int8 of ``values``, and the scale of every element, one for each group along dims[0] over the other dims."""
    scales = torch.cat([g.abs().amax(dims, keepdim=True).expand_as(g) / 127 for g in values.split(group_size, dims[0])],
                       dim=dims[0])  # fmt: skip
    return (values / scales).round().to(torch.int8), scales


@pytest.mark.parametrize(("m", "c", "k", "group_size"), [(2, 40, 5, 32), (4, 48, 3, 32), (6, 16, 4, 128)])
def test_equals_int8_operands_and_int32_accumulators(m: int, c: int, k: int, group_size: int) -> None:
    x, weight = random(2, c, 2 * m + 2, 3 * m + 2).clamp(-3.9, 3.9), random(k, c, 3, 3, seed=1)
    x[:, ::group_size, 0, 0] = 127 / 32  # scale 1/32 and dyadic B_T: V is exact, and so is where its ties fall
    spec = WinogradSpec(m, group_size=group_size)
    scales = standard_scales(spec.transform())
    mat, n = WinogradMatrices.from_scales(spec.transform(), scales, torch.float64), spec.n

    x_int, x_scale = zip(*(to_int8(image[None], group_size, (1, 2, 3)) for image in x), strict=True)
    tiles_int = torch.cat(x_int).unfold(2, n, m).unfold(3, n, m)  # B C th tw n n
    tile_scale = torch.cat(x_scale)[:, :, :1, :1, None, None]
    v = tile_scale * (mat.B_T @ tiles_int.double() @ mat.B_T.t())
    v_int, v_scale = to_int8(v, group_size, (1,))
    u_int, u_scale = to_int8(mat.G @ weight @ mat.G.t(), group_size, (1,))

    hadamard = torch.zeros(2, k, 2, 3, n, n, dtype=torch.float64)
    for group in torch.arange(c).split(group_size):
        accumulator = torch.einsum("bcxyij,kcij->bkxyij", v_int[:, group].int(), u_int[:, group].int())
        assert accumulator.dtype == torch.int32
        first = int(group[0])
        hadamard += accumulator * v_scale[:, first, None] * u_scale[:, first, None, None]
    m_int, m_scale = to_int8(hadamard, max(1, group_size // n**2), (1, 4, 5))
    tiles = m_scale[..., :1, :1] * (mat.A_T @ m_int.double() @ mat.A_T.t())  # B K th tw m m
    expected = tiles.permute(0, 1, 2, 4, 3, 5).reshape(2, k, 2 * m, 3 * m)
    y = winograd(x, weight, spec, padding=0, scales=scales)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stage", ["quantize_input", "quantize_v"])
@pytest.mark.parametrize("c", [1, 16, 48, 80])
def test_a_short_last_group_has_its_own_scale(c: int, stage: str) -> None:
    """Channels of one group do not feel how large those of another are."""
    x, weight = random(1, c, 12, 12), random(4, c, 3, 3, seed=1)
    spec = replace(WinogradSpec(4, group_size=32, quantize_m=False), **{stage: False})
    last = slice(c - (c % 32 or 32), c)
    loud = x.clone()
    loud[:, : last.start] *= 1000
    quiet_weight = weight.clone()
    quiet_weight[:, : last.start] = 0
    torch.testing.assert_close(
        winograd(loud, quiet_weight, spec), winograd(x[:, last], weight[:, last], spec), rtol=1e-9, atol=1e-9
    )


# Quantized x makes V meet rounding ties, which the last bit of a GEMM decides; that bit may change with its shape.
# Tests that compare GEMMs of different shapes therefore leave one of the two stages off.
TIE_FREE = [WinogradSpec(4, quantize_v=False), WinogradSpec(4, quantize_input=False)]


@pytest.mark.parametrize("spec", TIE_FREE)
def test_images_do_not_share_scales(spec: WinogradSpec) -> None:
    x, weight = random(3, 8, 12, 12), random(4, 8, 3, 3, seed=1)
    loud = x.clone()
    loud[1:] *= 100
    torch.testing.assert_close(winograd(loud, weight, spec)[:1], winograd(x, weight, spec)[:1], rtol=1e-9, atol=1e-9)


def test_per_tap_stages_do_not_feel_the_scales() -> None:
    x, weight = random(2, 8, 12, 12), random(4, 8, 3, 3, seed=1)
    spec = WinogradSpec(4, quantize_input=False, quantize_m=False)  # integers x would put V on ties
    results = [winograd(x, weight, spec, scales=f(spec.transform())) for f in (standard_scales, closed_form_scales)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_memory_format_and_repetition_do_not_matter_and_x_stays() -> None:
    x, weight, bias = random(3, 20, 10, 14), random(6, 20, 3, 3, seed=1), random(6, seed=2)
    before, spec = x.clone(), WinogradSpec(4)
    for padding in (0, 1, (2, 0)):
        first = winograd(x, weight, spec, padding=padding, bias=bias)
        assert torch.equal(winograd(x, weight, spec, padding=padding, bias=bias), first)
        channels_last = x.to(memory_format=torch.channels_last)
        assert torch.equal(winograd(channels_last, weight, spec, padding=padding, bias=bias), first)
        assert torch.equal(x, before)


@pytest.mark.parametrize("spec", TIE_FREE)
def test_images_at_once_do_not_matter(spec: WinogradSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = random(5, 20, 11, 13), random(6, 20, 3, 3, seed=1), random(6, seed=2)
    whole = winograd(x, weight, spec, bias=bias)
    for chunk in (1, 2 * 36 * 12 * 20):
        monkeypatch.setattr(conv, "CHUNK_ELEMENTS", chunk)
        torch.testing.assert_close(winograd(x, weight, spec, bias=bias), whole, rtol=1e-9, atol=1e-9)


def test_values_with_a_gradient_are_the_values_without() -> None:
    x, weight, bias = random(2, 40, 11, 11), random(6, 40, 3, 3, seed=1), random(6, seed=2)
    spec = WinogradSpec(2)
    plain = winograd(x, weight, spec, bias=bias)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    y = winograd(x, weight, spec, bias=bias)
    torch.testing.assert_close(y.detach(), plain, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (x, weight, bias))


def test_gradient_of_the_error_knows_that_a_common_factor_changes_nothing() -> None:
    x, weight, spec = random(1, 8, 8, 8), random(8, 8, 3, 3, seed=1), WinogradSpec(4)
    start = closed_form_scales(spec.transform())
    log_scales = [torch.tensor(s, dtype=torch.float64).log().requires_grad_() for s in (start.s_b, start.s_g)]
    matrices = WinogradMatrices.from_tensors(spec.transform(), *(s.exp() for s in log_scales))
    y = winograd_conv2d(x, transform_weights(weight, matrices, spec, 8), None, matrices, spec, 8, 1)
    (y - F.conv2d(x, weight, padding=1)).square().sum().backward()
    for log_scale in log_scales:
        assert log_scale.grad is not None
        assert log_scale.grad.abs().max() > 1e-3
        assert float(log_scale.grad.sum()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"group_size": -1}, "group_size must be an integer of at least 1, or 0 or 'all' for one group, found -1"),
        ({"group_size": 32.0}, "group_size must be an integer"),
        ({"m_bits": 1}, "m_bits: bits must be in 2..16, found 1, or 32 for float"),
        ({"points": ["0", "1", "inf"]}, "points must have m \\+ r - 1 = 6 entries"),
        ({"m": 40}, "m must be an integer in 2..8, found 40"),
    ],
)
def test_a_bad_spec_is_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WinogradSpec(**{"m": 4, **kwargs})  # type: ignore[arg-type]


def test_misfits_are_refused() -> None:
    spec = WinogradSpec(4)
    with pytest.raises(ValueError, match="weight must have shape \\(K, C, 3, 3\\), found \\(2, 4, 5, 5\\)"):
        winograd(random(1, 4, 8, 8), random(2, 4, 5, 5), spec)
    with pytest.raises(ValueError, match="with equal C"):
        winograd(random(1, 3, 8, 8), random(2, 4, 3, 3), spec)
    with pytest.raises(ValueError, match="leave an input of at least 3x3, found 0 for 2x8"):
        winograd(random(1, 4, 2, 8), random(2, 4, 3, 3), spec, padding=0)
    with pytest.raises(ValueError, match=r"weight_bits: bits must be in 2\.\.16, found 17"):
        winograd(random(1, 4, 8, 8), random(2, 4, 3, 3), spec, bits=17)
    with pytest.raises(ValueError, match="scales must have 6 entries for F\\(4,3\\), found 4"):
        WinogradMatrices.from_scales(spec.transform(), standard_scales(WinogradSpec(2).transform()))
