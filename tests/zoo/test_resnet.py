"""Residual networks: the right architecture, files as people have them, and refusals that name what is wrong."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from tmpq_exp.cost import ConvShape
from tmpq_exp.data import ImageFolderData
from tmpq_exp.metrics.accuracy import count_correct
from tmpq_exp.zoo.resnet import CIFAR_DEPTHS, IMAGENET_DEPTHS, CifarBlock, CifarResNet, ResNetCifar, ResNetImagenet

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def fresh(depth: int = 20, num_classes: int = 4) -> CifarResNet:
    torch.manual_seed(1)
    return CifarResNet(depth, num_classes).eval()


def parallel(network: nn.Module) -> dict[str, Any]:
    """What many training scripts save: keys of a parallel network, no counters, other values beside them."""
    state = {f"module.{k}": v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    return {"state_dict": OrderedDict(state), "best_prec1": 91.7}


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_depth_counts_the_layers_with_weights(depth: int) -> None:
    with torch.device("meta"):
        network = CifarResNet(depth, 10)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules()) == depth


def test_the_published_size() -> None:
    assert sum(p.numel() for p in CifarResNet(20, 10).parameters()) == 269_722  # 0.27 M in table 6 of the paper


def test_the_shortcut_takes_every_second_pixel_and_adds_zeros_on_both_sides() -> None:
    block = CifarBlock(4, 8, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 4, 6, 6)
    with torch.no_grad():
        y = block(x)
    assert y.shape == (1, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


@pytest.mark.parametrize("suffix", [".th", ".safetensors"])
def test_files_load_as_they_are(suffix: str, tmp_path: Path) -> None:
    network, path = fresh(), tmp_path / f"weights{suffix}"
    if suffix == ".th":
        torch.save(parallel(network), path)
    else:
        save_file(network.state_dict(), path)
    task = ResNetCifar(20, str(path)).task()
    assert (task.name, task.num_classes, task.network.training) == ("resnet_cifar20", 4, False)
    with torch.no_grad():
        assert torch.equal(task.network(X), network(X))
    layers = task.layers((3, 32, 32))
    assert [layer.name for layer in layers[:2]] == ["conv1", "layer1.0.conv1"]
    # of every convolution that keeps its shape; the two that halve the image and double the channels take half
    full = 32 * 32 * 9 * 16 * 16
    assert (
        sum(layer.macs for layer in layers if isinstance(layer, ConvShape)) == 32 * 32 * 9 * 3 * 16 + 16 * full + full
    )


@pytest.fixture(scope="module")
def torchvisions() -> dict[int, nn.Module]:
    """torchvision's own networks, of random weights, by depth."""
    torch.manual_seed(1)
    networks = {18: torchvision.models.resnet18, 34: torchvision.models.resnet34, 50: torchvision.models.resnet50}
    return {depth: build(weights=None, num_classes=3).eval() for depth, build in networks.items()}


@pytest.mark.parametrize("depth", IMAGENET_DEPTHS)
def test_torchvisions_own_state_dict_loads(depth: int, torchvisions: dict[int, nn.Module], tmp_path: Path) -> None:
    path = tmp_path / f"r{depth}.pth"
    torch.save(torchvisions[depth].state_dict(), path)
    task = ResNetImagenet(depth, str(path)).task()
    assert (task.name, task.num_classes, task.network.training) == (f"resnet_imagenet{depth}", 3, False)
    with torch.no_grad():
        assert torch.equal(task.network(X), torchvisions[depth](X))
    layers = task.layers((3, 32, 32))
    assert sum("downsample" not in layer.name for layer in layers) == depth  # shortcuts do not count


@pytest.mark.parametrize(
    ("of", "read_as", "said"),
    [
        (18, 34, r"first missing key layer1\.2\.bn1\.bias"),
        (34, 18, r"first extra key layer1\.2\.bn1\.bias"),
        (34, 50, r"first missing key layer1\.0\.bn3\.bias"),
        (50, 34, r"first extra key layer1\.0\.bn3\.bias"),
    ],
)
def test_another_depth_of_torchvision_is_refused_by_the_first_key(
    of: int, read_as: int, said: str, torchvisions: dict[int, nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / f"r{of}.pth"
    torch.save(torchvisions[of].state_dict(), path)
    with pytest.raises(ValueError, match=rf"resnet_imagenet{read_as}: .*r{of}\.pth does not fit: .*{said}"):
        ResNetImagenet(read_as, str(path)).task()


def test_another_depth_is_refused_by_the_first_key(tmp_path: Path) -> None:
    small, large = tmp_path / "20.th", tmp_path / "32.th"
    torch.save(parallel(fresh(20)), small)
    torch.save(parallel(fresh(32)), large)
    with pytest.raises(ValueError, match=r"20\.th does not fit: .*first missing key layer1\.3\.bn1\.bias"):
        ResNetCifar(32, str(small)).task()
    with pytest.raises(ValueError, match=r"32\.th does not fit: .*first extra key layer1\.3\.bn1\.bias"):
        ResNetCifar(20, str(large)).task()


class Trap:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_nothing_but_weights_is_read(tmp_path: Path) -> None:
    path, trace = tmp_path / "trap.th", tmp_path / "trace"
    torch.save({"state_dict": fresh().state_dict(), "extra": Trap(trace)}, path)
    with pytest.raises(ValueError, match=r"trap\.th is damaged or holds more than weights .* nothing is unpickled"):
        ResNetCifar(20, str(path)).task()
    path.write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(ValueError, match=r"trap\.th is damaged or holds more than weights"):
        ResNetCifar(20, str(path)).task()
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"no file at"),
        (b"", r"is damaged or holds more"),
        (b"hello", r"is damaged or holds more"),
        ({"epoch": 3}, r"holds no state dict"),
        ([1, 2], r"holds no state dict"),
        ({"state_dict": {}}, r"holds no state dict"),
        ({"linear.bias": torch.zeros(4)}, r"first missing key bn1\.bias"),
        ({"conv1.weight": torch.zeros(16, 3, 3, 3)}, r"first missing key bn1\.bias"),
    ],
    ids=str,
)
def test_files_that_hold_something_else_are_named(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.th"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"checkpoint of model resnet_cifar20.*mine\.th.*{said}|{said}.*mine\.th"):
        ResNetCifar(20, str(path)).task()


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.th"
    torch.save(parallel(fresh()), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.th is damaged"):
        ResNetCifar(20, str(path)).task()


def test_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"model\.depth must be one of 20, 32, 44, 56, 110, found 18"):
        ResNetCifar(18, "x.th")
    with pytest.raises(ValueError, match=r"model\.depth must be one of 18, 34, 50, found 20"):
        ResNetImagenet(20, "x.th")
    with pytest.raises(ValueError, match=r"model\.checkpoint must be given"):
        ResNetCifar(20, None)


@pytest.mark.slow
def test_published_weights_reach_their_accuracy(shared_data: Path, tmp_path: Path) -> None:
    """81.03 % on all 10,000 JPEG-compressed test images of CIFAR-10; here on every tenth, within four deviations."""
    archive = shared_data / "cifar10_jpg_test.tar.xz"
    weights = shared_data / "resnet_cifar10" / "resnet20-12fca82f.th"
    if not (archive.is_file() and weights.is_file()):
        pytest.skip(f"{shared_data} has no CIFAR-10 test images or no ResNet-20")
    import tarfile

    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    data = ImageFolderData(str(tmp_path / "cifar10" / "test"), limit=1000)
    correct = count_correct(ResNetCifar(20, str(weights)).task().network, data.test_dataloader())
    assert abs(correct - 810.3) < 4 * (1000 * 0.81 * 0.19) ** 0.5
