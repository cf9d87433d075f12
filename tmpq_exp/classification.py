"""The parts of task=classify: what is compared, the rows with their scales, and the measuring of each."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from tmpq_exp.choices import spec_of
from tmpq_exp.config import Config, Granularity, UserError, VariantConfig, WinogradConfig
from tmpq_exp.config.identity import digest
from tmpq_exp.cost import ConvShape, CostModel, is_eligible, with_error_feedback
from tmpq_exp.data import CalibrationImages, ImageFolderData
from tmpq_exp.forecast import duration
from tmpq_exp.metrics.accuracy import count_correct
from tmpq_exp.progress import StageBar
from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Allocation
from tmpq_exp.quant.layers import QuantConv2d
from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.quant.static_ranges import RangesByLayer, load_ranges, measuring_ranges_for_all_bits, ranges_state
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.rundir import RunDirectory, bad_input
from tmpq_exp.seeding import stream_seed
from tmpq_exp.trainers import single_device, stage_trainer
from tmpq_exp.winograd.learning import learn_scales
from tmpq_exp.winograd.network import eligible_layers
from tmpq_exp.winograd.noise import noise
from tmpq_exp.winograd.scales import (
    HELD_OUT_STREAM,
    ConvWeight,
    ScaleSet,
    fsq_style_scales,
    noise_seeds,
    read_scales,
)
from tmpq_exp.winograd.spec import Method, WinogradSpec
from tmpq_exp.winograd.transform import closed_form_scales, ineligible_reason, standard_scales
from tmpq_exp.zoo.task import ClassificationModel, ClassificationTask
from tmpq_exp.zoo.weights import content_hash, read_tensors, write_tensors

BITS = 8
"""Bits of weights and activations of every quantized row, and of x, V and U of Winograd layers."""

FORECAST_IMAGES = 8
"""Images that the forecast times a row on."""

_WINOGRAD_UNITS = 8
"""What a batch counts in the progress bar as a Winograd row; 1 in a direct one. Only the remaining time knows it."""


@dataclass(frozen=True)
class Study:
    """What all parts of the job share.

    Args:
        config: Checked configuration.
        run: Run directory.
        task: Float classifier.
        data: Test images.
        cost: Prices allocations; its layers are in the order of every allocation.
        supernet: The classifier, whose layers are float, direct W8A8 or Winograd; on ``device``.
        layers: Eligible convolutions.
        ineligible: Why each other convolution stays direct, by name.
        device: Where images are classified, the Trainer's.
        fingerprint: Hash of images, weights, preprocessing, batch size, device, threads and library.
    """

    config: Config
    run: RunDirectory
    task: ClassificationTask
    data: ImageFolderData
    cost: CostModel
    supernet: Supernet
    layers: tuple[ConvWeight, ...]
    ineligible: Mapping[str, str]
    device: torch.device
    fingerprint: str


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Args:
        name: ``float``, ``direct_w8a8`` or that of a Winograd row.
        bits: Of weights and activations.
        variant: What a Winograd row was asked to be; None for the two others.
        spec, scales: Its stages and scales.
        ranges: Where activation scales are static, those of its layers.
    """

    name: str
    bits: int
    variant: VariantConfig | None = None
    spec: WinogradSpec | None = None
    scales: ScaleSet | None = None
    ranges: RangesByLayer = field(default_factory=dict, compare=False)

    def state(self) -> list[Any]:
        """All that its figures depend on beside network, images and noise, as JSON."""
        return [
            self.bits,
            None if self.spec is None else asdict(self.spec),
            None if self.scales is None else self.scales.to_json(),
            *([content_hash(ranges_state(self.ranges))] if self.ranges else []),
        ]


@bad_input()
def prepare(config: Config, run: RunDirectory) -> Study:
    """Load classifier and images, check that they fit, and build the quantized network.

    Raises:
        ValueError: If a checkpoint or the image folder is bad, or a setting cannot be used here.
    """
    model = instantiate(config.model)
    if not isinstance(model, ClassificationModel):
        raise UserError(f"model: {type(model).__name__} is no classifier; task=classify needs one, as resnet_cifar")
    _check_settings(config)
    task = model.task()
    data = instantiate(config.data)
    if not isinstance(data, ImageFolderData):
        raise UserError(f"data: {type(data).__name__} has no test images for task=classify; choose data=image_folder")
    if len(data.classes) != task.num_classes:
        raise UserError(
            f"data.root: {data.root} has {len(data.classes)} class folders, model {task.name} tells {task.num_classes} "
            "classes apart; give the folder whose subfolders are the classes"
        )
    _check_calibration(config, data)
    device = single_device(config)
    cost = CostModel(task.layers(data.image_shape))
    convs = [shape for shape in cost.layers if isinstance(shape, ConvShape)]
    reasons = {s.name: ineligible_reason(s.kernel_size, s.stride, s.dilation, s.groups) for s in convs}
    layers = tuple(layer for layer in eligible_layers(task.network)[0] if reasons.get(layer.name, "") is None)
    if not layers:
        raise UserError(f"model: {task.name} has no convolution that Winograd can compute")
    _check_files_of_scales(config, layers)
    choices = [(BITS,)] * len(cost)
    supernet = Supernet(task.network, cost.layers, choices, choices, config.quant).eval()
    for layer in supernet.layers:
        weights = layer.weight_rows()
        if weights is not None:
            weights[0].estimate(weights[1])
    supernet.to(device)
    fingerprint = digest(
        [
            data.fingerprint(),
            task.weights_hash,
            data.batch_size,
            str(device),
            torch.get_num_threads(),
            torch.__version__,
        ]
    )
    ineligible = {name: reason for name, reason in reasons.items() if reason is not None}
    return Study(config, run, task, data, cost, supernet, layers, ineligible, device, fingerprint)


def _check_settings(config: Config) -> None:
    """Refuse what shows before anything is loaded, down to the rows' points."""
    for place, quantizer in (("weight", config.quant.weight), ("act", config.quant.act)):
        if quantizer.granularity != Granularity.PER_GROUP:
            raise UserError(
                f"quant.{place}.granularity must be per_group for task=classify, found {quantizer.granularity!r}; "
                "choose quant=groupwise"
            )
    if config.winograd.scales_from is not None:
        raise UserError(
            "winograd.scales_from: task=classify takes scales of another run in rows of classification.further, as "
            "{name: transferred, m: 4, scales: learned, winograd: {scales_from: PATH}}"
        )
    if config.winograd.learning.num_steps == 0 and "learned" in [row.scales for row in config.classification.rows()]:
        raise UserError("winograd.learning.num_steps must be at least 1 where classification has learned scales")
    for row in config.classification.rows():
        with _row(row):
            spec_of(config.winograd.varied(row), row.m)


def _check_files_of_scales(config: Config, layers: Sequence[ConvWeight]) -> None:
    for row in config.classification.rows():
        winograd = config.winograd.varied(row)
        if winograd.scales_from is not None:
            with _row(row):
                names = [layer.name for layer in layers]
                read_scales(Path(winograd.scales_from), spec_of(winograd, row.m), names)


def _row(row: VariantConfig) -> AbstractContextManager[None]:
    """Names the row behind what is wrong with it."""
    return bad_input(f" (row {row.name} of classification)")


def _check_calibration(config: Config, data: ImageFolderData) -> None:
    static = [row.name for row in config.classification.rows() if config.winograd.varied(row).act_scales == "static"]
    if static and data.calibration is None:
        raise UserError(
            f"winograd.act_scales: static scales of {static[0]} are measured on images, and test images must not "
            "calibrate what is measured on them; give others with data.calibration_root, such as the training images, "
            "or choose dynamic"
        )


def winograd_row(study: Study, variant: VariantConfig, learned: dict[str, dict[str, Any]]) -> Row:
    """A row with its scales; what had to be learned for it is added to ``learned``, by the digest of its inputs."""
    winograd = study.config.winograd.varied(variant)
    spec = spec_of(winograd, variant.m)
    if winograd.scales_from is not None:
        return Row(variant.name, BITS, variant, spec, read_scales(Path(winograd.scales_from), spec))
    if variant.scales == "standard":
        return Row(variant.name, BITS, variant, spec, ScaleSet(standard_scales(spec.transform())))
    closed = ScaleSet(closed_form_scales(spec.transform()))
    if variant.scales == "closed_form":
        if spec.method == Method.FSQ_STYLE:
            seed = stream_seed(study.config.seed, "fsq", spec.m) % 2**32
            closed = ScaleSet(
                closed.shared, {layer.name: fsq_style_scales(layer, spec, seed) for layer in study.layers}
            )
        return Row(variant.name, BITS, variant, spec, closed)
    plain = replace(spec, shaped_stages=())  # learning sees plain rounding
    inputs = [study.task.weights_hash, asdict(plain), asdict(winograd.learning), study.config.seed, str(study.device)]
    key = digest(inputs)
    if key not in learned:
        compute = partial(_learn, study, variant, plain, winograd)
        learned[key] = {"name": variant.name} | study.run.stage(f"learn {variant.name}", inputs, [], compute)
    further = variant in study.config.classification.further
    return Row(
        variant.name, BITS, variant, spec, ScaleSet.from_json(learned[key]["scales"]["kept" if further else "learned"])
    )


def _learn(study: Study, variant: VariantConfig, spec: WinogradSpec, winograd: WinogradConfig) -> dict[str, Any]:
    learning = winograd.learning
    result = learn_scales(
        study.layers,
        spec,
        num_steps=learning.num_steps,
        learning_rate=learning.learning_rate,
        seed=stream_seed(study.config.seed, "winograd", spec.m) % 2**32,
        trainer_factory=lambda **a: stage_trainer(
            study.config, study.run, f"learn {variant.name.removesuffix('_learned')}", a["max_steps"], **a
        ),
        initial=learning.init,
        layers_per_step=learning.layers_per_step,
        noise_kind=learning.noise,
        per_layer=learning.per_layer,
        separate_columns=learning.separate_columns,
    )
    return {
        "m": spec.m,
        "points": variant.points,
        "noise": learning.noise,
        "kept": result.kept,
        "held_out_sqnr_db": dict(result.sqnr_db),
        "curve_db": list(result.curve),
        "scales": {kind: scales.to_json() for kind, scales in result.scales.items()},
    }


def with_ranges(study: Study, row: Row) -> Row:
    """A row with the static ranges that it asks for: of the float network on calibration images, never on test images.

    Raises:
        UserError: If a calibration image or a file of an earlier start cannot be read.
    """
    data = study.data.calibration
    if data is None or row.spec is None or row.scales is None or not row.spec.is_static:
        return row
    tiles = {row.spec.m: (row.spec, row.scales)}
    inputs = [study.task.weights_hash, data.fingerprint(), str(study.device), row.state()]
    path = study.run.row_ranges / f"{digest(inputs)}.safetensors"
    study.supernet.set_winograd(tiles)
    study.run.stage(f"ranges {row.name}", inputs, [path], partial(_measure_ranges, study, row.name, data, path))
    with bad_input("; remove it to measure again"):
        load_ranges(study.supernet, read_tensors(path, "static ranges of Winograd layers")[0], str(path))
    return replace(row, ranges=dict(study.supernet.ranges))


@torch.no_grad()
def _measure_ranges(study: Study, name: str, data: CalibrationImages, path: Path) -> None:
    with (
        measuring_ranges_for_all_bits(study.supernet) as found,
        StageBar(f"ranges {name}", data.num_batches) as bar,
        bad_input(),
    ):
        for images, _ in data.test_dataloader():
            study.supernet(images.to(study.device))
            bar.advance()
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, ranges_state(found), {"model": study.task.name, "row": name})


def evaluate(study: Study, rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Images that each row gets right, and the SQNR of its layers on noise, by name of the row."""
    stages = {
        row.name: (f"evaluate {row.name}", [study.fingerprint, study.config.seed, *_inputs(study, row)]) for row in rows
    }
    pending = [row for row in rows if not study.run.is_done(*stages[row.name])]
    _say_forecast(study, pending)
    units = study.data.num_batches * sum(_units(row) for row in pending)
    with StageBar("evaluate", units) as bar:
        return {row.name: study.run.stage(*stages[row.name], [], partial(_measure, study, row, bar)) for row in rows}


@torch.inference_mode()
def _say_forecast(study: Study, rows: Sequence[Row]) -> None:
    """What the rows will take, from the second of two calls of each on a few images."""
    if not rows:
        return
    images = next(iter(study.data.test_dataloader()))[0][:FORECAST_IMAGES].to(study.device)
    taken = 0.0
    for row in rows:
        with _as(study, row):
            for _ in range(2):
                start = time.perf_counter()
                study.supernet(images).cpu()
                last = time.perf_counter() - start
        taken += last * len(study.data.samples) / len(images)
    print(
        f"forecast  {len(study.data.samples):,} images in {len(rows)} rows, about {duration(taken)} here, "
        "scales learned",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def _as(study: Study, row: Row) -> Iterator[None]:
    """The network at the bits, tile and scales of a row."""
    study.supernet.set_winograd({} if row.spec is None or row.scales is None else {row.spec.m: (row.spec, row.scales)})
    study.supernet.set_ranges(row.ranges)
    with study.supernet.subnet(allocation(study.cost, row)):
        yield


def _inputs(study: Study, row: Row) -> list[Any]:
    return [asdict(study.config.quant), row.state()]


def _units(row: Row) -> int:
    return 1 if row.spec is None else _WINOGRAD_UNITS


def _measure(study: Study, row: Row, bar: StageBar) -> dict[str, Any]:
    with _as(study, row):
        noisy = row.bits != FLOAT_BITS and not row.ranges  # ranges of images say nothing of noise
        by_layer = dict(_noise_sqnr_db(study)) if noisy else {}
        correct = count_correct(
            study.supernet, study.data.test_dataloader(), lambda: bar.advance(_units(row), row.name)
        )
    return {"num_correct": correct, "layer_sqnr_db": by_layer}


def row_cost(cost: CostModel, row: Row) -> CostModel:
    """What layers cost in a row: error feedback with them, where its stages are shaped."""
    return CostModel(with_error_feedback(cost.layers, () if row.spec is None else row.spec.shaped_stages))


def allocation(cost: CostModel, row: Row) -> Allocation:
    """Bits and tile of every layer in a row."""
    bits = (row.bits,) * len(cost)
    tile = DIRECT_TILE if row.spec is None else row.spec.m
    tiles = (tile if isinstance(shape, ConvShape) and is_eligible(shape) else DIRECT_TILE for shape in cost.layers)
    return Allocation(bits, bits, tuple(tiles))


@torch.inference_mode()
def _noise_sqnr_db(study: Study) -> Iterator[tuple[str, float]]:
    """SQNR of each eligible layer as it is set at present, on unit Gaussian noise that is the same for all rows."""
    names = {layer.name for layer in study.layers}
    layers = [layer for layer in study.supernet.layers if layer.name in names]
    seeds = noise_seeds(stream_seed(study.config.seed, "sqnr") % 2**32, HELD_OUT_STREAM, len(layers))
    for layer, seed in zip(layers, seeds, strict=True):
        assert isinstance(layer, QuantConv2d)
        x = noise(layer.float_layer.in_channels, torch.Generator().manual_seed(seed)).to(study.device)
        value = sqnr_db(layer.float_layer(x), layer(x))
        if math.isfinite(value):  # a layer whose weights are all 0 has no figure
            yield layer.name, value
