"""The embedded text-to-image model: digits by caption, its U-Net and text encoder trained together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tmpq_exp.cost import LayerShape
from tmpq_exp.diffusion.sampler import DDIM
from tmpq_exp.diffusion.schedule import linear_alphas_cumprod
from tmpq_exp.scenes import CANVAS_SIZE, captions, prompts
from tmpq_exp.zoo.conditioning import Prompts
from tmpq_exp.zoo.embedded import embedded_file
from tmpq_exp.zoo.task import DiffusionTask, TrainableDiffusionModel, unet_layers
from tmpq_exp.zoo.text import NUM_TOKENS, text_encoder, tokenize
from tmpq_exp.zoo.training import DiffusionTraining, Recipe
from tmpq_exp.zoo.weights import content_hash, load_weights

TEXT_WIDTH = 64


class TextToImageNetwork(nn.Module):
    """A noise predictor that reads a prompt: text encoder, and U-Net that attends to its states."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = text_encoder(TEXT_WIDTH, num_layers=2)
        self.unet: nn.Module = UNet2DConditionModel(
            sample_size=CANVAS_SIZE,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 32, 96),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,  # the number of heads, in this class
            cross_attention_dim=TEXT_WIDTH,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens ``(N, NUM_TOKENS)`` -> states that the U-Net attends to, ``(N, NUM_TOKENS, 64)``."""
        states: Tensor = self.text_encoder(input_ids=tokens).last_hidden_state
        return states

    def forward(self, x: Tensor, timesteps: Tensor, tokens: Tensor) -> Any:
        """Prediction for ``x`` ``(N, 1, 24, 24)``, in ``.sample``."""
        return self.unet(x, timesteps, encoder_hidden_states=self.embed(tokens))


class TextToImageTraining(DiffusionTraining):
    """Noise prediction by caption; now and then without, so that guidance has something to move away from.

    Args:
        network, recipe, alphas_cumprod: See ``DiffusionTraining``.
        min_snr_gamma: See ``DiffusionTraining``.
        caption_dropout: Share of images trained with the empty prompt, in [0, 1].

    References:
        Ho, Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598, algorithm 1.
    """

    def __init__(
        self,
        network: TextToImageNetwork,
        recipe: Recipe,
        alphas_cumprod: Tensor,
        *,
        min_snr_gamma: float | None = None,
        caption_dropout: float = 0.1,
    ) -> None:
        super().__init__(network, recipe, alphas_cumprod, min_snr_gamma=min_snr_gamma)
        self.caption_dropout = caption_dropout
        self.register_buffer("tokens", tokenize([*captions(), ""]), persistent=False)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """As in ``DiffusionTraining``; labels are numbers of captions, some are replaced by that of the empty one."""
        dropped = torch.rand(len(labels), device=labels.device) < self.caption_dropout
        return super().loss(images, torch.where(dropped, len(captions()), labels))

    def conditioning(self, labels: Tensor) -> dict[str, Tensor]:
        """Tokens of the captions."""
        return {"tokens": self.get_buffer("tokens").to(labels.device)[labels]}


class DigitsTextToImage(TrainableDiffusionModel):
    """Text-to-image model of handwritten digits at 24x24, in pixel space, T = 1000, linear betas.

    A text encoder of two layers (0.1 M parameters) stays float; the U-Net with cross attention (2.2 M, 154 MMAC a call)
    is compressed. Image i is drawn for prompt ``i % 110`` of ``tmpq_exp.scenes.prompts``.

    Args:
        checkpoint: Weights as safetensors; None takes the shipped ones.
        recipe: Training settings; needed for training only.
        guidance_scale: Scale of classifier-free guidance, at least 1; 1 is without.
    """

    name = "sd_digits"
    image_shape = (1, CANVAS_SIZE, CANVAS_SIZE)
    weights_dtype = "float16"
    num_train_timesteps = 1000
    beta_range = (1e-4, 0.02)
    min_snr_gamma = 5.0

    def __init__(
        self, checkpoint: str | None = None, recipe: Recipe | None = None, guidance_scale: float = 2.0
    ) -> None:
        if not guidance_scale >= 1:
            raise ValueError(f"model.guidance_scale must be at least 1, found {guidance_scale}")
        self.checkpoint = Path(checkpoint) if checkpoint else embedded_file(self.name, "model.safetensors")
        self.recipe, self.guidance_scale, self.guided = recipe, guidance_scale, guidance_scale != 1

    @property
    def condition_names(self) -> tuple[str, ...]:
        """The prompts."""
        return prompts()

    def architecture(self) -> TextToImageNetwork:
        """Text encoder and U-Net."""
        return TextToImageNetwork()

    def layers(self) -> tuple[LayerShape, ...]:
        """Those of the U-Net."""
        with torch.device("meta"):
            network = self.architecture()
        states = torch.zeros(1, NUM_TOKENS, TEXT_WIDTH)
        return unet_layers(network.unet, self.image_shape, {"encoder_hidden_states": states})

    def load(self) -> TextToImageNetwork:
        """See ``TrainableModel.load``."""
        network = self.architecture()
        load_weights(network, self.checkpoint, self.name)
        return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def wrap(self, network: nn.Module) -> DiffusionTask:
        """See ``TrainableDiffusionModel.wrap``."""
        assert isinstance(network, TextToImageNetwork)

        def embed(prompt: str) -> Tensor:
            device = next(network.text_encoder.parameters()).device
            return network.embed(tokenize([prompt]).to(device))[0]

        encoder = content_hash(network.text_encoder.state_dict() | {"tokens": tokenize(prompts())})
        return DiffusionTask(
            name=self.name,
            unet=network.unet,
            sample_shape=self.image_shape,
            # clipping x_0 works against guidance, the more steps the more: 18 % of the captions met at 50, not 88 %
            sampler=DDIM(self._alphas_cumprod(), clip_sample=False),
            conditions=Prompts(prompts(), embed, encoder),
            guidance_scale=self.guidance_scale,
        )

    def training_module(self) -> TextToImageTraining:
        """See ``TrainableModel.training_module``."""
        if self.recipe is None:
            raise ValueError("model.recipe is null: training needs a recipe")
        return TextToImageTraining(
            self.architecture(), self.recipe, self._alphas_cumprod(), min_snr_gamma=self.min_snr_gamma
        )

    def _alphas_cumprod(self) -> Tensor:
        return linear_alphas_cumprod(self.num_train_timesteps, *self.beta_range)
