"""Every family of pipelines, tiny, through the loader: the images are those of diffusers' own pipeline classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_pipelines import FAMILIES, save_tiny
from tmpq_exp.__main__ import conf_dir
from tmpq_exp.config import QuantConfig, register_schema, to_config
from tmpq_exp.cost import AttentionShape
from tmpq_exp.diffusion.sampler import DDIM, RectifiedFlowEuler, initial_noise
from tmpq_exp.quant.allocation import Allocation
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.zoo.pipeline_folder import open_pipeline, read_prompts
from tmpq_exp.zoo.pipelines import PipelineModel
from tmpq_exp.zoo.task import task_layers

NUMPY_WARNING = "ignore:__array__ implementation:DeprecationWarning"
"""Of diffusers' schedulers."""

SD_LIKE = ("sd14", "sd15", "instaflow")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tiny pipelines, and a file of prompts."""
    root = tmp_path_factory.mktemp("pipelines")
    for family in FAMILIES:
        save_tiny(family, root / family)
    (root / "prompts.txt").write_text("a cat\n\n  the dog \nzoo\n", encoding="utf-8")
    return root


@pytest.fixture
def copy(folders: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a tiny pipeline, for tests that damage it."""
    return lambda family: Path(shutil.copytree(folders / family, tmp_path / family))


def make_model(folders: Path, family: str, **settings: Any) -> PipelineModel:
    if family == "stable_diffusion":
        settings.setdefault("prompts", str(folders / "prompts.txt"))
    return PipelineModel(family, str(folders / family), **settings)


def drawn(model: PipelineModel, timesteps: list[int], indices: range = range(3)) -> tuple[Tensor, Tensor]:
    """Images of a task, and the noise they started from."""
    task = model.task()
    with torch.inference_mode():
        images = task.sample(task.unet, indices, timesteps, 5)
    return images, initial_noise(task.sample_shape, indices, 5)


def near(images: Tensor, expected: Any) -> None:
    expected = torch.as_tensor(expected)
    if expected.shape[-1] == 1:
        expected = expected.permute(0, 3, 1, 2)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-4)


def with_noise(pipe: Any, monkeypatch: pytest.MonkeyPatch, noise: Tensor) -> Any:
    """A pipeline that starts from this noise."""
    module = pipe.__class__.__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: noise.clone())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("family", ["ddpm", "ldm"])
def test_unconditional_images_are_those_of_diffusers(
    family: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe: Any = (diffusers.DDIMPipeline if family == "ddpm" else diffusers.LDMPipeline).from_pretrained(
        folders / family, low_cpu_mem_usage=False
    )
    pipe.scheduler.set_timesteps(5)
    images, noise = drawn(make_model(folders, family), pipe.scheduler.timesteps.tolist())
    expected = with_noise(pipe, monkeypatch, noise)(batch_size=3, num_inference_steps=5, output_type="np").images
    near(images, expected)


def test_class_conditional_images_follow_their_label(folders: Path) -> None:
    model = make_model(folders, "ddim_of_classes")
    unet, scheduler = model.folder().unet(), DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    images, x = drawn(model, scheduler.timesteps.tolist())
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            noise = unet(x, timestep, class_labels=torch.arange(3)).sample
        x = scheduler.step(noise, timestep, x).prev_sample
    near(images, (x / 2 + 0.5).clamp(0, 1))


@pytest.mark.filterwarnings(NUMPY_WARNING)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver_pp_2m"])
def test_text_conditional_images_are_those_of_diffusers(folders: Path, scale: float, sampler: str) -> None:
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(
        folders / "stable_diffusion", low_cpu_mem_usage=False, safety_checker=None
    )
    if sampler == "ddim":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    else:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, final_sigmas_type="zero")
    pipe.scheduler.set_timesteps(6)
    timesteps = pipe.scheduler.timesteps.tolist()
    model = make_model(
        folders, "stable_diffusion", guidance_scale=scale, sampler=sampler, negative_prompt="bad", spacing="leading"
    )
    images, noise = drawn(model, timesteps)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        ["a cat", "the dog", "zoo"],
        negative_prompt=["bad"] * 3,
        num_inference_steps=6,
        guidance_scale=scale,
        latents=noise,
        output_type="np",
    ).images
    near(images, found)


def test_class_conditional_latents_are_guided_by_the_last_row(folders: Path) -> None:
    task = make_model(folders, "ldm_of_classes", guidance_scale=2.0).task()
    rows = load_file(folders / "ldm_of_classes" / "class_embedder" / "model.safetensors")["embedding.weight"]
    assert torch.equal(task.conditioning([0, 4])["encoder_hidden_states"][:, 0], rows[[0, 1]])
    assert torch.equal(task.conditions.null_inputs(1)["encoder_hidden_states"][0, 0], rows[3])
    assert task.calls_per_step == 2
    assert task.image_shape == (1, 16, 16)


def test_a_rectified_flow_takes_the_parts_of_stable_diffusion(folders: Path) -> None:
    """InstaFlow's rule: t = 1000 (1 - i / N), x += v / N."""
    model = make_model(folders, "stable_diffusion", sampler="rectified_flow", spacing="trailing")
    task = model.task()
    images, x = drawn(model, [999, 749, 499, 249], range(1))
    with torch.no_grad():
        for timestep in (1000.0, 750.0, 500.0, 250.0):
            x = x + task.unet(x, torch.tensor([timestep]), **task.conditioning([0])).sample / 4
        near(images, task.decode(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_known_without_the_weights(family: str, folders: Path, copy: Callable[[str], Path]) -> None:
    settings = {"guidance_scale": 2.0} if family in ("stable_diffusion", "ldm_of_classes") else {}
    folder = copy(family)
    for file in folder.rglob("diffusion_pytorch_model.safetensors"):
        file.unlink()
    model = PipelineModel(family, str(folder), **settings)
    assert model.layers() == task_layers(make_model(folders, family, **settings).task())
    assert model.guided == bool(settings)
    assert any(isinstance(shape, AttentionShape) for shape in model.layers())
    with pytest.raises(ValueError, match=r"unet of the pipeline: .* holds no safetensors file; found: config\.json"):
        model.folder().unet()


def composed_model(name: str, *overrides: str) -> Any:
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return instantiate(to_config(compose("config", [f"model={name}", "paths.run_dir=x", *overrides])).model)


@pytest.mark.parametrize(
    ("option", "family"),
    [
        ("ddpm", "ddpm"),
        ("ddpm", "ddim_of_classes"),
        ("ddpm_cifar10_paper", "ddpm"),
        ("ldm", "ldm"),
        ("ldm_bedroom", "ldm"),
        ("ldm_church", "ldm"),
        ("ldm_imagenet", "ldm_of_classes"),
        *((option, "stable_diffusion") for option in SD_LIKE),
    ],
)
def test_every_option_takes_a_path(option: str, family: str, folders: Path) -> None:
    prompts = [f"model.prompts={folders / 'prompts.txt'}"] if option in SD_LIKE else []
    model = composed_model(option, f"model.path={folders / family}", *prompts)
    task = model.task()
    assert task.name == option
    assert isinstance(task.sampler, RectifiedFlowEuler if option == "instaflow" else DDIM)
    assert task.calls_per_step == (2 if option in ("sd14", "sd15", "ldm_imagenet") else 1)
    assert len(model.layers()) == len(task_layers(task))


@pytest.mark.parametrize(
    "option",
    [
        "ddpm_cifar10_paper",
        "ldm_church",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ldm_bedroom", "ldm_imagenet", "sd14", "instaflow")),
    ],
)
def test_full_size_networks_are_quantized_on_the_meta_device(option: str) -> None:
    architecture = composed_model(option).architecture
    network, layers = architecture.on_meta(architecture.diffusers), architecture.diffusers_layers()
    choices = [(8, 4)] * len(layers)
    supernet = Supernet(network, layers, choices, choices, QuantConfig())
    assert [layer.name for layer in supernet.layers] == [shape.name for shape in layers]
    tensors = [*supernet.parameters(), *supernet.buffers()]
    assert sum(tensor.numel() for tensor in tensors) > sum(parameter.numel() for parameter in network.parameters())
    assert all(tensor.is_meta for tensor in tensors)
    called = []
    for layer in supernet.layers:
        layer.register_forward_hook(lambda layer, *_: called.append(layer.name))
    with torch.no_grad(), supernet.subnet(Allocation((4,) * len(layers), (8,) * len(layers), (0,) * len(layers))):
        output = architecture.probe(supernet)
    assert tuple(output.sample.shape) == (1, *architecture.sample_shape)
    assert sorted(called) == sorted(shape.name for shape in layers)


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def truncated(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_a_weight(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def of_other_width(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", block_out_channels=[8, 32])


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    (
        "ddpm",
        no_index,
        "is no diffusers pipeline: it has no model_index.json; found: scheduler, unet. Accepted: give a",
    ),
    ("ddpm", lambda f: (f / "model_index.json").write_text("[]"), "must hold a JSON object, found list"),
    ("ddpm", lambda f: (f / "model_index.json").write_text("{"), "is no JSON"),
    (
        "stable_diffusion",
        lambda f: edit_json(f / "model_index.json", unet=None),
        "is a StableDiffusionPipeline without a U-Net; its parts are .*text_encoder.* Accepted are pipelines whose "
        "part 'unet' is a UNet2DModel or UNet2DConditionModel",
    ),
    (
        "ddpm",
        lambda f: edit_json(f / "model_index.json", unet=["diffusers", "UNet1DModel"]),
        "unet must be a UNet2DModel or UNet2DConditionModel, found UNet1DModel",
    ),
    ("ddpm", truncated, "unet of the pipeline: .* cannot be read"),
    ("ddpm", without_a_weight, r"misses 1 weights, the first is conv_in\.weight"),
    ("ddpm", of_other_width, "unet of the pipeline: .* cannot be read"),
    ("ddpm", lambda f: edit_json(f / "unet" / "config.json", out_channels=2), "takes 1 channels and predicts 2"),
    ("ddpm", lambda f: edit_json(f / "unet" / "config.json", sample_size=None), "sample_size of the U-Net must be an"),
    ("ddpm", lambda f: (f / "unet" / "config.json").unlink(), "unet of the pipeline: no file at"),
    ("ddpm", lambda f: shutil.rmtree(f / "scheduler"), "scheduler of the pipeline: no file at"),
    (
        "ldm",
        lambda f: edit_json(f / "model_index.json", vqvae=["diffusers", "AutoencoderTiny"]),
        "vqvae must be a AutoencoderKL or VQModel, found AutoencoderTiny",
    ),
    (
        "stable_diffusion",
        lambda f: edit_json(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        "text_encoder must be a CLIPTextModel, found T5EncoderModel",
    ),
    ("stable_diffusion", lambda f: shutil.rmtree(f / "tokenizer"), "has a text encoder, but no folder 'tokenizer'"),
    (
        "stable_diffusion",
        lambda f: edit_json(f / "unet" / "config.json", cross_attention_dim=16),
        "the U-Net attends to 16 channels, its text encoder has 12",
    ),
    ("ldm_of_classes", lambda f: shutil.rmtree(f / "class_embedder"), "neither a text_encoder nor a class_embedder"),
    (
        "ldm_of_classes",
        lambda f: save_file({"a": torch.zeros(4, 5)}, f / "class_embedder" / "model.safetensors"),
        r"class_embedder must be \(classes \+ 1, 6\), found \(4, 5\)",
    ),
    (
        "ldm_of_classes",
        lambda f: save_file({"a": torch.zeros(4)}, f / "class_embedder" / "model.safetensors"),
        "must hold one safetensors file with one matrix",
    ),
]


@pytest.mark.filterwarnings("ignore")  # diffusers may warn before it fails
@pytest.mark.parametrize(("family", "damage", "message"), DAMAGES)
def test_a_bad_folder_is_named(
    family: str, damage: Callable[[Path], Any], message: str, copy: Callable[[str], Path], folders: Path
) -> None:
    folder = copy(family)
    damage(folder)
    prompts = str(folders / "prompts.txt") if family == "stable_diffusion" else None
    with pytest.raises(ValueError, match=message) as error:
        PipelineModel(family, str(folder), prompts=prompts).task()
    assert str(folder) in str(error.value)


def test_prompts_are_lines_of_utf_8(tmp_path: Path, folders: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein Kätzchen\r\n\r\n雪の日 \n".encode())
    assert read_prompts(str(path)) == ("ein Kätzchen", "雪の日")
    for content, message in ((b"", "holds no prompt"), (b" \n\n", "holds no prompt"), (b"ok\n\xff", "byte 3 is 0xff")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            read_prompts(str(path))
        assert str(path) in str(error.value)
    for missing, message in ((str(tmp_path / "none.txt"), "no file at"), (str(tmp_path), "no file at")):
        with pytest.raises(ValueError, match=message):
            read_prompts(missing)
    with pytest.raises(ValueError, match=r"model\.prompts: this pipeline makes images from text; .* found null"):
        PipelineModel("sd14", str(folders / "stable_diffusion")).task()
    with pytest.raises(ValueError, match=r"model\.prompts must be null"):
        PipelineModel("ddpm", str(folders / "ddpm"), prompts=str(folders / "prompts.txt")).task()


def test_a_hub_id_without_network_says_how_to_give_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def unreachable(hub_id: str, **settings: Any) -> str:
        asked.append(settings)
        raise ConnectionError("the hub cannot be reached\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        ValueError, match=r"fetched from the hub \(the hub cannot be reached\)\. Without network, give a"
    ):
        open_pipeline("owner/model")
    assert len(asked) == 1
    assert asked[0]["etag_timeout"] <= 5


def test_a_hub_id_in_the_cache_is_a_folder(monkeypatch: pytest.MonkeyPatch, folders: Path) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folders / "ddpm"))
    assert open_pipeline("owner/model").path == folders / "ddpm"


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "missing", "a/b/c", "../x/y"])
def test_what_is_no_hub_id_is_not_looked_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=r"there is no folder .*, and it is no hub id \(owner/name\); give a local"):
        open_pipeline(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 0.5}, r"model\.guidance_scale must be at least 1 \(without guidance\), found 0\.5"),
        ({"sampler": "euler"}, r"model\.sampler must be one of ddim, dpm_solver_pp_2m, rectified_flow, found 'euler'"),
        ({"spacing": "even"}, r"model\.spacing must be one of quadratic, leading, trailing, found 'even'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineModel("ddpm", **settings)


def test_without_a_path_there_is_only_the_cost(folders: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path of sd14 must be a folder of a diffusers pipeline, or a hub id"):
        composed_model("sd14").task()
    with pytest.raises(ValueError, match="guidance needs a model with an empty condition"):
        make_model(folders, "ddpm", guidance_scale=2.0).task()
