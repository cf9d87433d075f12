"""The embedded digits models: a class-conditional DDPM at 16x16 and the feature network of ``fd_digits``."""

from __future__ import annotations

from diffusers import UNet2DModel
from torch import Tensor, nn

from tmpq_exp.data import DIGITS_SIZE
from tmpq_exp.zoo.embedded import EmbeddedClassifier, EmbeddedDDPM, FeatureClassifier
from tmpq_exp.zoo.training import random_affine

DIGIT_NAMES = tuple("0123456789")


class DigitsDDPM(EmbeddedDDPM):
    """Class-conditional DDPM on the UCI digits at 16x16: 0.82 M parameters, 40.8 MMAC a call, T = 1000, linear betas.

    Args:
        checkpoint, recipe: See ``EmbeddedDDPM``.
    """

    name = "ddpm_digits"
    image_shape = (1, DIGITS_SIZE, DIGITS_SIZE)
    class_names = DIGIT_NAMES

    def architecture(self) -> nn.Module:
        """A three-level U-Net with attention at 8x8 and 4x4."""
        network: nn.Module = UNet2DModel(
            sample_size=DIGITS_SIZE,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=32,
            num_class_embeds=len(DIGIT_NAMES),
        )
        return network


class DigitsClassifier(EmbeddedClassifier):
    """Small CNN on 16x16 digits; its 64 features serve ``fd_digits``.

    Args:
        checkpoint, recipe: See ``EmbeddedClassifier``.
    """

    name = "digits_classifier"
    image_shape = (1, DIGITS_SIZE, DIGITS_SIZE)

    def architecture(self) -> FeatureClassifier:
        """Three convolutions."""
        body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        return FeatureClassifier(body, 64, len(DIGIT_NAMES))

    def augment(self, images: Tensor) -> Tensor:
        """Turned, scaled, sheared and shifted a little."""
        return random_affine(images)
