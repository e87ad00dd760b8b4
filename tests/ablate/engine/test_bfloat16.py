"""How far bfloat16 is from float64, in units of what is measured: the effect of ablation, the size of gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate.digits import digits_model, digits_split
from ablate.engine.gated_model import Speed

LIMIT = 0.02  # of the standard deviation over keep-vectors of an example's output, and of its largest gradient
ROWS, EXAMPLES = 64, 100

log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ablate.Examples]:
    whole = digits_split("test")
    examples = ablate.Examples(whole.inputs(0, EXAMPLES), whole.targets[:EXAMPLES])
    return digits_model(0, cache=tmp_path_factory.mktemp("digits") / "model"), examples


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "fraction"), [("weight", 0.05), ("weight", 0.1), ("activation", 0.1), ("weight", 0.3)]
)
def test_outputs_on_a_trained_model(mode: str, fraction: float, digits: tuple[nn.Module, ablate.Examples]) -> None:
    model, examples = digits
    index = ablate.ComponentIndex.from_model(model)
    keep = ablate.KeepPlan(len(index), ROWS, fraction, seed=1).take(0, ROWS)
    exact = ablate.Engine(model, index, precision="float64", mode=mode).outputs(keep, examples)
    rounded = ablate.Engine(model, index, precision="bfloat16", mode=mode).outputs(keep, examples)
    assert rounded.dtype == torch.float32
    effect = exact.std(dim=0)
    error = (rounded.double() - exact).pow(2).mean(dim=0).sqrt() / effect
    noise = (rounded.double() - exact).std(dim=0) / effect  # without what is the same for every keep-vector
    together = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(rounded.T.double(), exact.T, strict=True)]
    )
    log.info(
        "%s, %.2f ablated: error %.4f of the effect (worst %.4f), noise %.4f, correlation %.6f (worst %.6f)",
        mode, fraction, error.mean(), error.max(), noise.mean(), together.mean(), together.min(),
    )  # fmt: skip
    assert float(error.mean()) <= LIMIT
    assert float(error.max()) <= 3 * LIMIT
    assert float(together.min()) >= 0.999


@pytest.mark.slow
def test_gradients_on_a_trained_model(digits: tuple[nn.Module, ablate.Examples]) -> None:
    """One gradient is a few percent off, as any in bfloat16 is: ReLUs flip. A mean of many is less."""
    model, examples = digits
    index = ablate.ComponentIndex.from_model(model)
    engines = [ablate.Engine(model, index, precision=precision) for precision in ("float64", "bfloat16")]
    total = torch.zeros(2, EXAMPLES, len(index), dtype=torch.float64)
    for turn in range(8):
        gates = ablate.KeepPlan(len(index), EXAMPLES, 0.1, seed=turn).take(0, EXAMPLES).astype(np.float32)
        exact, rounded = (engine.gate_gradients(gates, examples)[1] for engine in engines)
        assert rounded.dtype == torch.float32
        total += torch.stack([exact, rounded.double()]) / 8
        if turn == 0:
            _compare("one gradient", rounded.double(), exact, limit=0.06, least=0.99)
            keep = ablate.KeepPlan(len(index), ROWS, 0.1, seed=1).take(0, ROWS)
            effect = engines[0].outputs(keep, examples).std(dim=0)
            share = (rounded.double() - exact).pow(2).mean(dim=1).sqrt() / effect
            log.info("a component's gradient: error %.4f of the effect (worst %.4f)", share.mean(), share.max())
            assert float(share.max()) <= LIMIT
    _compare("mean of 8", total[1], total[0], limit=0.03, least=0.995)


def _compare(what: str, rounded: Tensor, exact: Tensor, limit: float, least: float) -> None:
    scale = exact.abs().amax(dim=1)
    error = (rounded - exact).norm(dim=1) / exact.norm(dim=1)
    typical = (rounded - exact).pow(2).mean(dim=1).sqrt() / scale
    together = torch.stack([torch.corrcoef(torch.stack(p))[0, 1] for p in zip(rounded, exact, strict=True)])
    log.info(
        "%s: error %.4f of its length (worst %.4f), %.4f of its largest entry (worst %.4f), correlation %.6f (%.6f)",
        what, error.mean(), error.max(), typical.mean(), typical.max(), together.mean(), together.min(),
    )  # fmt: skip
    assert float(typical.max()) <= LIMIT
    assert float(error.mean()) <= limit
    assert float(together.min()) >= least


@pytest.mark.parametrize("mode", ["weight", "activation"])
def test_a_vision_transformer_runs(mode: str, randomise: Callable[[nn.Module, int], nn.Module]) -> None:
    import torchvision

    model = randomise(torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=5), 1).eval()
    index = ablate.ComponentIndex.from_model(model, ["qkv_neuron", "attention_head", "ffn_hidden", "conv_filter"])
    inputs = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    targets = torch.arange(6) % 5
    keep = ablate.KeepPlan(len(index), 6, 0.2).take(0, 6)
    exact = ablate.Engine(model, index, precision="float64")
    engine = ablate.Engine(model, index, precision="bfloat16", mode=mode)
    _near(engine.outputs(keep, inputs, targets), exact.outputs(keep, inputs, targets))
    gates = keep.astype(np.float64)
    for got, expected in zip(
        engine.gate_gradients(gates, inputs, targets), exact.gate_gradients(gates, inputs, targets), strict=True
    ):
        assert got.dtype == torch.float32
        _near(got, expected)


def _near(got: Tensor, expected: Tensor) -> None:
    assert bool(torch.isfinite(got).all())
    assert float((got - expected).norm() / expected.norm()) < 0.1


def test_norms_that_are_not_folded_and_the_head_stay_in_float32(
    conv_net: nn.Module, images: Tensor, labels: Tensor
) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])
    keep = ablate.KeepPlan(len(index), 6, 0.2).take(0, 6)
    exact = ablate.Engine(conv_net, index, precision="float64").outputs(keep, images, labels)
    for speed in (Speed(), Speed(fold=False, channels_last=False)):
        engine = ablate.Engine(conv_net, index, precision="bfloat16", speed=speed)
        _near(engine.outputs(keep, images, labels), exact)
        _near(engine.gate_gradients(np.ones((7, len(index))), images, labels)[0], _plain(conv_net, images, labels))
    assert engine.explain()["module"].tolist() == ["conv1", "conv2", "fc", "head"]


def _plain(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = ablate.Margin()(model(images), labels)
    return outputs


def test_weights_come_back_bit_for_bit(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])
    engine = ablate.Engine(conv_net, index, precision="bfloat16", mode="weight")
    ones = np.ones((1, len(index)), dtype=bool)
    before = engine.outputs(ones, images, labels)
    engine.outputs(~ones, images, labels)
    engine.gated_outputs(0.3 * ones, images, labels)
    assert torch.equal(engine.outputs(ones, images, labels), before)
