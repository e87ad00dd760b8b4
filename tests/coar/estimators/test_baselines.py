"""Baselines: numbers by hand, the slow way round, and agreement with Captum."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate.ablation import ScaleAblation
from ablate.digits import ResidualCNN
from ablate.engine.activation_paths import conductance
from ablate.engine.gated_model import Speed
from coar.errors import FitError
from coar.estimators.abstract import BlockEstimate
from coar.estimators.registry import estimator_names, get_estimator

Randomise = Callable[[nn.Module, int], nn.Module]
LABELS = [0, 1, 2, 2, 1, 0, 1]


def _estimate(
    engine: ablate.Engine, method: str, inputs: Tensor, targets: list[int], **settings: float
) -> BlockEstimate:
    return get_estimator(method, **settings).estimate(engine, ablate.Examples(inputs, targets), 0, 0)


class Squares(nn.Module):
    """Logits (a^2 + 3 b, 0) of hidden units a = x, b = 2 x + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, 2)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.tensor([[1.0], [2.0]]))
            self.hidden.bias.copy_(torch.tensor([0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.hidden(x).unbind(dim=1)
        return torch.stack([a * a + 3 * b, torch.zeros_like(a)], dim=1)


def test_numbers_by_hand() -> None:
    """At x = 2: a = 2, b = 5, of which 1 is bias; output 4 + 15 = 19. Everything is a polynomial: steps suffice."""
    model = Squares()
    engine = ablate.Engine(model, ablate.ComponentIndex.from_model(model, ["linear_neuron"]), "logit")
    inputs, targets = torch.tensor([[2.0]]), [0]
    expected = {
        "leave_one_out": [4, 12],  # a: 4 - 0; b: 3 * (5 - 1), the bias stays
        "gradient_times_gate": [8, 12],  # d (2 g)^2 / dg = 8 at g = 1
        "integrated_gate_gradients": [4, 12],  # the mean of 8 g
        "internal_influence": [2, 3],  # the mean of 2 a = 4 t
    }
    for method, weights in expected.items():
        found = _estimate(engine, method, inputs, targets)
        np.testing.assert_allclose(found.weights, [weights], rtol=1e-5, err_msg=method)
        np.testing.assert_allclose(found.bias, [19 - sum(weights)], rtol=1e-5, err_msg=method)
        assert not found.stderr.any()
    # conductance by left sums: sum of 2 a(t_k) (a(t_k+1) - a(t_k)) = 8 sum k / n^2 = 4 (n - 1) / n
    for steps in (1, 2, 10):
        found = _estimate(engine, "neuron_conductance", inputs, targets, steps=steps)
        np.testing.assert_allclose(found.weights, [[4 * (steps - 1) / steps, 12]], rtol=1e-5, atol=1e-6)


def test_a_baseline_of_the_path() -> None:
    model = Squares()
    engine = ablate.Engine(model, ablate.ComponentIndex.from_model(model, ["linear_neuron"]), "logit")
    found = _estimate(engine, "neuron_conductance", torch.tensor([[2.0]]), [0], steps=1, baseline=1.0)
    np.testing.assert_allclose(found.weights, [[2, 6]])  # 2 a = 2 at x = 1, times 2 - 1; 3 times 5 - 3
    found = _estimate(engine, "internal_influence", torch.tensor([[2.0]]), [0], steps=1, baseline=1.0)
    np.testing.assert_allclose(found.weights, [[3, 3]])  # 2 a at x = 1.5


def test_passes_are_counted() -> None:
    model = Squares()
    engine = ablate.Engine(model, ablate.ComponentIndex.from_model(model, ["linear_neuron"]), "logit")
    found = {
        m: _estimate(engine, m, torch.ones(2, 1), [0, 1]).passes.tolist() for m in estimator_names() if m != "gradient"
    }
    assert found == {
        "leave_one_out": [3, 3],
        "gradient_times_gate": [1, 1],
        "integrated_gate_gradients": [21, 21],
        "neuron_conductance": [22, 22],
        "internal_influence": [21, 21],
        "random": [1, 1],
    }


def test_leave_one_out_is_ablating_one_at_a_time(conv_net: nn.Module, images: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])
    found = _estimate(ablate.Engine(conv_net, index, batch_size=3), "leave_one_out", images, LABELS)
    keep = np.concatenate([np.ones((1, len(index)), dtype=bool), ~np.eye(len(index), dtype=bool)])
    slow = ablate.reference_outputs(conv_net, index, keep, images, torch.tensor(LABELS)).numpy()
    np.testing.assert_allclose(found.weights, (slow[0] - slow[1:]).T, rtol=1e-4, atol=1e-5)


def test_integrated_gate_gradients_are_complete(conv_net: nn.Module, images: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter"])
    for ablation in ("zero", ScaleAblation(0.5)):
        engine = ablate.Engine(conv_net, index, "logit", precision="float64", ablation=ablation)
        found = _estimate(engine, "integrated_gate_gradients", images, LABELS, steps=400)
        keep = np.array([[True] * len(index), [False] * len(index)])
        full, closed = engine.outputs(keep, images, torch.tensor(LABELS)).numpy()
        np.testing.assert_allclose(found.weights.sum(axis=1), full - closed, atol=0.01 * np.abs(full - closed).max())


def _captum(
    method: str, model: nn.Module, port: object, inputs: Tensor, targets: list[int], steps: int, side: str
) -> npt.NDArray[np.float64]:
    """Returns Captum's attribution of one module in float64, (examples, channels), summed over places."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from captum.attr import InternalInfluence, LayerConductance

        module = model.get_submodule(port.module)  # type: ignore[attr-defined]  # a Port
        target, inside = torch.tensor(targets), side == "in"
        if method == "neuron_conductance":
            found = LayerConductance(model, module).attribute(
                inputs, target=target, n_steps=steps, method="riemann_trapezoid", attribute_to_layer_input=inside
            )
        else:
            found = InternalInfluence(model, module).attribute(
                inputs, target=target, n_steps=steps, attribute_to_layer_input=inside
            )
    if found.ndim == 4:
        return found.sum(dim=(2, 3)).detach().numpy()  # type: ignore[no-any-return]
    return found.reshape(len(found), -1, found.shape[-1]).sum(dim=1).detach().numpy()  # type: ignore[no-any-return]


def _vit() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("test_vit", num_classes=3, img_size=32)
    return model


NETS: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[int, ...]]] = {
    "cnn": (lambda: ResidualCNN((3, 4, 4), 3), ["conv_filter", "linear_neuron"], (1, 16, 16)),
    "vit-neurons": (_vit, ["linear_neuron"], (3, 32, 32)),
    "vit-heads": (_vit, ["attention_head", "ffn_hidden"], (3, 32, 32)),
}


@pytest.mark.parametrize("speed", [None, Speed(fold=False, channels_last=False)], ids=["folded", "as-given"])
@pytest.mark.parametrize("method", ["neuron_conductance", "internal_influence"])
@pytest.mark.parametrize("net", NETS)
def test_agrees_with_captum(net: str, method: str, speed: Speed | None, randomise: Randomise) -> None:
    build, kinds, shape = NETS[net]
    model = randomise(build(), 3).eval()
    index = ablate.ComponentIndex.from_model(model, kinds)
    inputs = torch.randn(5, *shape, generator=torch.Generator().manual_seed(2))
    targets = [0, 1, 2, 2, 1]
    engine = ablate.Engine(model, index, "logit", precision="float64", batch_size=2, speed=speed)
    found = _estimate(engine, method, inputs, targets, steps=6).weights
    double = copy.deepcopy(model).double()
    first = 0
    for port in index.ports:
        expected = _captum(method, double, port, inputs.double(), targets, 6, port.port)
        expected = expected.reshape(len(inputs), port.count, port.width).sum(axis=2)
        assert np.abs(expected).max() > 0, port.module
        got = found[:, first : first + port.count]
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), err_msg=port.module)
        first += port.count


def test_attention_that_never_calls_its_layers_is_seen(randomise: Randomise) -> None:
    """Conductance of the heads of nn.MultiheadAttention adds up to what passes through it; so do its neurons'."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 3, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            mixed = torch.relu_(self.attention(x, x, x, need_weights=False)[0])  # in place, on what was noted
            logits: Tensor = self.head(mixed.mean(dim=1))
            return logits

    model = randomise(Net(), 0).eval()
    inputs = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        passed = (model(inputs) - model(torch.zeros_like(inputs)))[torch.arange(4), torch.tensor([0, 1, 2, 0])].numpy()
    for kinds in (["attention_head"], ["linear_neuron"]):
        index = ablate.ComponentIndex.from_model(model, kinds, exclude=["head"])
        engine = ablate.Engine(model, index, "logit", precision="float64", batch_size=3)
        found = _estimate(engine, "neuron_conductance", inputs, [0, 1, 2, 0], steps=200).weights
        np.testing.assert_allclose(found.sum(axis=1), passed, atol=0.03 * np.abs(passed).max())


def test_random_weights_depend_on_seed_and_position_alone(conv_net: nn.Module, images: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net)
    engine = ablate.Engine(conv_net, index)
    examples = ablate.Examples(images, LABELS)
    method = get_estimator("random")
    whole = method.estimate(engine, examples, 0, 5).weights
    part = method.estimate(engine, examples.take([2, 3]), 2, 5).weights
    assert np.array_equal(whole[2:4], part)
    assert not np.array_equal(whole, method.estimate(engine, examples, 0, 6).weights)
    assert len(np.unique(whole)) == whole.size
    many = np.concatenate([method.estimate(engine, examples, 7 * i, 0).weights.ravel() for i in range(40)])
    assert abs(many.mean()) < 5 / len(many) ** 0.5
    assert abs(many.std() - 1) < 5 / len(many) ** 0.5


def test_tokens_have_no_path(randomise: Randomise) -> None:
    model = randomise(nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3)), 3).eval()
    engine = ablate.Engine(model, ablate.ComponentIndex.from_model(model))
    tokens = torch.arange(12).reshape(4, 3) % 11
    with pytest.raises(ablate.DataError) as caught:
        _estimate(engine, "neuron_conductance", tokens, [0, 1, 2, 0])
    assert str(caught.value) == (
        "Inputs are torch.int64, expected floating numbers: between integers (tokens) there is no path from a "
        "baseline. Use a method without a path of inputs, e.g. 'gradient' or 'integrated_gate_gradients'."
    )


def test_a_model_that_runs_otherwise_at_the_baseline_is_refused() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.hidden(x)
            return y if not x.any() else self.hidden(y)

    model = Sometimes()
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"])
    engine = ablate.Engine(model, index)
    with pytest.raises(ablate.GatingError) as caught:
        conductance(engine, torch.ones(2, 2), torch.tensor([0, 1]), points=[0.0, 1.0])
    assert str(caught.value) == (
        "The weight 'hidden.weight' is used in another way between the baseline and the input: what this model runs "
        "depends on its input. Conductance needs the same activations along the path; use another method."
    )


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("neuron_conductance", {"steps": 0}, "neuron_conductance: steps is 0, expected an integer of at least 1."),
        ("internal_influence", {"steps": 2.5}, "internal_influence: steps is 2.5, expected an integer of at least 1."),
        (
            "neuron_conductance",
            {"baseline": float("nan")},
            "neuron_conductance: baseline is nan, expected one finite number for every value of the input as the "
            "model sees it.",
        ),
        ("leave_one_out", {"steps": 3}, "Method 'leave_one_out' has no setting 'steps'; it takes no settings."),
        (
            "internal_influence",
            {"step": 3, "base": 1},
            "Method 'internal_influence' has no setting 'step', 'base'; it takes steps, baseline.",
        ),
    ],
)
def test_settings_that_a_method_does_not_take(method: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(FitError) as caught:
        get_estimator(method, **settings)
    assert str(caught.value) == message


def test_methods_by_name_or_instance() -> None:
    with pytest.raises(ablate.errors.UnknownNameError) as caught:
        get_estimator("leave_one_in")
    assert str(caught.value) == (
        "No method 'leave_one_in'. Did you mean 'leave_one_out'? Or pass an instance of a subclass of Estimator."
    )
    instance = get_estimator("internal_influence", steps=3)
    assert get_estimator(instance) is instance
    with pytest.raises(FitError) as refused:
        get_estimator(instance, steps=4)
    assert str(refused.value) == (
        "Settings (steps) were given beside an instance of InternalInfluence, which has its own. Give them to its "
        "constructor."
    )
