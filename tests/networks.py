"""Networks of the libraries, without what only costs time."""

from __future__ import annotations

import torchvision
from torch import nn


def vgg11_bn(classes: int) -> nn.Module:
    """Returns torchvision's, with 64 hidden neurons before the classes: it has 120 million weights there."""
    net: nn.Module = torchvision.models.vgg11_bn(init_weights=False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    net.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, classes))
    return net
