"""CsiNet ("Deep Learning for Massive MIMO CSI Feedback", Wen et al., 2018): the first of the autoencoders.

The authors' code is Keras, and so are their weights: :meth:`CsiNet.load_keras` reads those files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from csimodels.models.autoencoder import CsiAutoencoder

SLOPE = 0.3  # of the leaky ReLU for negative arguments: Keras' default of the time
_EPSILON = 1e-3  # of the batch normalisation, likewise


class CsiNet(CsiAutoencoder):
    """A convolution and a dense layer at the UE; a dense layer and two RefineNets at the BS.

    Parameters at M = 256, 2 x 32 x 32: 524,586 at the UE and 529,698 at the BS.

    Args:
        codeword_length, delays, antennas, scale, gain: as :class:`csimodels.models.autoencoder.CsiAutoencoder`.
    """

    def __init__(
        self,
        codeword_length: int,
        *,
        delays: int = 32,
        antennas: int = 32,
        scale: float | None = None,
        gain: float | None = None,
    ):
        super().__init__(codeword_length, delays=delays, antennas=antennas, scale=scale, gain=gain)
        self.encoder_conv = nn.Conv2d(2, 2, 3, padding=1)
        self.encoder_bn = nn.BatchNorm2d(2, eps=_EPSILON)
        self.encoder_fc = nn.Linear(self.elements, codeword_length)
        self.decoder_fc = nn.Linear(codeword_length, self.elements)
        self.refine1 = RefineNet()
        self.refine2 = RefineNet()
        self.output = nn.Conv2d(2, 2, 3, padding=1)

    def _encode(self, h: torch.Tensor) -> torch.Tensor:
        maps = F.leaky_relu(self.encoder_bn(self.encoder_conv(self._to_image(h))), SLOPE)
        return self.encoder_fc(maps.flatten(1))

    def _decode(self, codeword: torch.Tensor) -> torch.Tensor:
        initial = self.decoder_fc(codeword).unflatten(1, self.shape)
        return self._from_maps(self.output(self.refine2(self.refine1(initial))))

    def _ue_modules(self) -> Iterator[nn.Module]:
        yield from (self.encoder_conv, self.encoder_bn, self.encoder_fc)

    def load_keras(self, path: str | os.PathLike) -> None:
        """Take the weights of a file that the authors' Keras code saved (``model_CsiNet_indoor_dim512.h5`` and others).

        Args:
            path: of an HDF5 file by Keras' ``save_weights`` or ``save``, of the network with channels first.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such file, or its arrays are not those of this model (expected and given shapes).
        """
        arrays = _keras_weights(Path(path))
        targets: list[torch.Tensor] = []
        for module in self.modules():
            targets += module.parameters(recurse=False)
            if isinstance(module, nn.BatchNorm2d):  # Keras stores scale, offset, moving mean and moving variance
                targets += [module.get_buffer("running_mean"), module.get_buffer("running_var")]
        given = [_from_keras(array) for array in arrays]
        expected = [tuple(target.shape) for target in targets]
        if [array.shape for array in given] != expected:
            raise ValueError(f"{path}: expected arrays of {expected}, got {[array.shape for array in given]}")
        with torch.no_grad():
            for target, array in zip(targets, given, strict=True):
                target.copy_(torch.from_numpy(array))


class RefineNet(nn.Module):
    """Three 3x3 convolutions, 2 -> 8 -> 16 -> 2 maps, added to their input before the last activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8, eps=_EPSILON)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16, eps=_EPSILON)
        self.conv3, self.bn3 = nn.Conv2d(16, 2, 3, padding=1), nn.BatchNorm2d(2, eps=_EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = F.leaky_relu(self.bn1(self.conv1(x)), SLOPE)
        maps = F.leaky_relu(self.bn2(self.conv2(maps)), SLOPE)
        return F.leaky_relu(x + self.bn3(self.conv3(maps)), SLOPE)


def _from_keras(array: np.ndarray) -> np.ndarray:
    """Kernels ``[height, width, in, out]`` and ``[in, out]`` to ``[out, in, height, width]`` and ``[out, in]``."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1).copy()
    return array.T.copy()


def _keras_weights(path: Path) -> list[np.ndarray]:
    """All arrays of the layers in their order; ``save`` puts one level more above them than ``save_weights``."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            root = file.get("model_weights", file)
            layers = [root[_text(name)] for name in root.attrs["layer_names"]]
            return [layer[_text(name)][()] for layer in layers for name in layer.attrs["weight_names"]]
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: expected weights saved by Keras as HDF5 ({error})") from None


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
