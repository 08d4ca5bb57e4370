"""timm's image networks as students, for comparison with MergeNet.

EfficientNet-B2 (Tan and Le, "EfficientNet", 2019) and EfficientNetV2-B2 (Tan and Le, "EfficientNetV2", 2021) with one input
channel, as in Careddu, "Searching for EfficientNeXt", 2024, Table 2.

Shapes: B batch, C channels, F frequency positions, T time positions, E embedding size, K classes.
"""

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from students.catalog import register
from students.interface import StateDict, Student, StudentOutput, checked_mel
from students.layers.convolutions import initialize_weights
from students.layers.folding import folded_convolution
from students.layers.keyed import KeyedDropout


@dataclass(frozen=True)
class EfficientNetOptions:
    """Hyperparameters of EfficientNet. Raises ValueError where a value is not allowed."""

    dropout: float = 0.3
    """Probability of dropping a feature before the last layer; both papers use 0.3 for B2."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1; found {self.dropout}")


class EfficientNet(Student):
    """timm's EfficientNet with one input channel. The embedding is the mean over its last map.

    Both papers train with stochastic depth. It is left out here because it draws from the global generator. Layers in ``features``
    have timm's names.
    """

    Options = EfficientNetOptions

    def __init__(self, architecture: str, num_classes: int, options: EfficientNetOptions) -> None:
        """``architecture``: timm's name of the network, whose pretrained weights can be loaded."""
        import timm  # here because it is slow to import and most students do not need it

        network = timm.create_model(architecture, in_chans=1)
        super().__init__(num_classes, embedding_dim=network.num_features)
        self.imagenet_architecture = architecture
        layers = ("conv_stem", "bn1", "blocks", "conv_head", "bn2")
        self.features = nn.Sequential(OrderedDict((name, getattr(network, name)) for name in layers))
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(1),
            KeyedDropout(options.dropout),
            nn.Linear(self.embedding_dim, num_classes),
        )
        initialize_weights(self.classifier)

    def forward(self, mel: Tensor) -> StudentOutput:
        """(B, 1, n_mels, frames) -> logits (B, K), embedding (B, E)"""
        x = self.features(checked_mel(mel))
        return StudentOutput(self.classifier(x), x.mean((2, 3)))

    def feature_maps(self, mel: Tensor) -> list[Tensor]:
        """The maps (B, C, F, T) after the stem, after each of timm's stages and after the last convolution."""
        network = self.features
        maps = [network.bn1(network.conv_stem(checked_mel(mel)))]
        for stage in network.blocks:
            maps.append(stage(maps[-1]))
        return [*maps, network.bn2(network.conv_head(maps[-1]))]

    def fold_batch_norms(self) -> None:
        """timm's batch norms follow their convolutions directly, but not always in a Sequential, and include activations."""
        for module in list(self.features.modules()):
            layers = list(module.named_children())
            for (conv_name, conv), (norm_name, norm) in itertools.pairwise(layers):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(module, conv_name, folded_convolution(conv, norm))
                    setattr(module, norm_name, norm.act)

    def output_biases(self) -> Tensor:
        """(K,)"""
        return self.classifier[-1].bias

    def imagenet_weights(self, timm_state_dict: Mapping[str, Tensor]) -> StateDict:
        """``features`` of timm's network for colour images, with the stem's kernels averaged over colour channels."""
        filled = {}
        for name, own in self.features.state_dict().items():
            value = timm_state_dict.get(name)
            if value is not None and name == "conv_stem.weight":
                value = value.mean(dim=1, keepdim=True)
            if value is None or value.shape != own.shape:
                found = "missing" if value is None else f"of shape {tuple(value.shape)}, not {tuple(own.shape)}"
                raise ValueError(f"these are not the weights of timm's {self.imagenet_architecture}: {name} is {found}")
            filled[f"features.{name}"] = value
        return filled


def efficientnet_b2(num_classes: int, options: EfficientNetOptions) -> EfficientNet:
    """EfficientNet-B2: 9.1 million parameters with 1000 classes in timm, 1.7 GMACs for ten seconds."""
    return EfficientNet("efficientnet_b2", num_classes, options)


def efficientnetv2_b2(num_classes: int, options: EfficientNetOptions) -> EfficientNet:
    """EfficientNetV2-B2, in timm only with TensorFlow's padding: 3.0 GMACs for ten seconds."""
    return EfficientNet("tf_efficientnetv2_b2", num_classes, options)


register(EfficientNet, {"efficientnet_b2": EfficientNetOptions()}, build=efficientnet_b2, place=40)
register(EfficientNet, {"efficientnetv2_b2": EfficientNetOptions()}, build=efficientnetv2_b2, place=40)
