"""The gradient estimator: exact where the truth is known, better with more passes, and honest about its error."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import ablate
import coar
from ablate.digits import digits_model, digits_split
from coar.errors import FitError
from coar.estimators.abstract import BlockEstimate
from coar.estimators.baselines.gates import GradientTimesGate
from coar.estimators.gradient.design import GateDesign
from coar.estimators.gradient.estimator import FORWARD_SEED, Gradient
from coar.estimators.gradient.moments import GradientSums, Moments
from coar.statistics import correlation

Doubles = npt.NDArray[np.float64]
LABELS = [0, 1, 2, 2, 1, 0, 1, 2]


def _random(model: nn.Module, seed: int) -> nn.Module:
    """Fills a model with weights and biases that all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fresh = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(fresh * (1.5 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.3))
    return model.eval()


def _linear(deep: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 20), nn.Linear(20, 3)) if deep else nn.Sequential(nn.Linear(5, 3))


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("background", ["continuous", "mixed"])
@pytest.mark.parametrize("deep", [False, True])
def test_one_round_recovers_a_linear_network(deep: bool, background: str, precision: str) -> None:
    model = _random(_linear(deep).double(), 1)
    inputs = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"], include=["0"])
    engine = ablate.Engine(model, index, "logit", precision=precision)
    examples = ablate.Examples(inputs, LABELS)
    passes = GateDesign(len(index), 0.1, background, 0).groups
    found = Gradient(passes, 0.1, background).estimate(engine, examples, 0, 0)
    first = model.get_parameter("0.weight").detach()
    second = model.get_parameter("1.weight").detach() if deep else torch.eye(3, dtype=torch.float64)
    expected = ((inputs @ first.T) * second[LABELS]).numpy()
    np.testing.assert_allclose(found.weights, expected, atol=1e-6)
    assert found.stderr.max() < (1e-6 if precision == "float64" else 1e-5)
    keep = np.random.default_rng(0).random((30, len(index))) < 0.6
    predicted = keep @ found.weights.T.astype(np.float64) + found.bias
    np.testing.assert_allclose(predicted, engine.outputs(keep, examples).numpy(), atol=5e-6)
    assert (found.passes == passes).all()


class Enumerated:
    """A network of 12 units, its outputs under all 4,096 keep-vectors, and what follows from them."""

    keep = np.array(list(itertools.product([False, True], repeat=12)))

    def __init__(self, seed: int, activation: type[nn.Module], deep: bool) -> None:
        sizes = [8, 6, 6, 3] if deep else [8, 12, 3]
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(sizes):
            layers += [nn.Linear(wide, narrow), activation()]
        self.model = _random(nn.Sequential(*layers[:-1]).double(), seed)
        generator = torch.Generator().manual_seed(100 + seed)
        self.examples = ablate.Examples(torch.randn(8, 8, generator=generator, dtype=torch.float64), LABELS)
        exclude = [str(2 * len(sizes) - 4)]
        self.index = ablate.ComponentIndex.from_model(self.model, ["linear_neuron"], exclude=exclude)
        assert len(self.index) == 12
        self.engine = ablate.Engine(self.model, self.index, precision="float64")
        self.outputs = self.engine.outputs(self.keep, self.examples).numpy()

    def chance(self, fraction: float) -> Doubles:
        """Returns the probability of every keep-vector, (4096,)."""
        kept = self.keep.sum(axis=1)
        chance: Doubles = (1 - fraction) ** kept * fraction ** (12 - kept)
        return chance

    def effects(self, fraction: float) -> Doubles:
        """Returns E[output | kept] - E[output | ablated], (examples, components)."""
        chance = self.chance(fraction)[:, None]
        kept = (self.keep * chance).T @ self.outputs / (1 - fraction)
        ablated = (~self.keep * chance).T @ self.outputs / fraction
        result: Doubles = (kept - ablated).T
        return result

    def quality(self, weights: npt.NDArray[Any], fraction: float) -> float:
        """Returns the mean over examples of the correlation of predicted with true outputs over all keep-vectors."""
        chance, predicted = self.chance(fraction), self.keep @ weights.T.astype(np.float64)
        x, y = predicted - chance @ predicted, self.outputs - chance @ self.outputs
        return float(((chance @ (x * y)) / np.sqrt((chance @ x**2) * (chance @ y**2))).mean())

    def estimate(self, fraction: float, background: str | None, rounds: int) -> BlockEstimate:
        """Returns the estimate from so many whole rounds."""
        chosen = str(Gradient(2, fraction, background).background)
        passes = rounds * GateDesign(12, fraction, chosen, 0).groups
        return Gradient(passes, fraction, chosen).estimate(self.engine, self.examples, 0, 0)


enumerated: Callable[..., Enumerated] = cache(Enumerated)  # nobody changes one


def test_effects_are_those_of_the_best_linear_predictor() -> None:
    """Weighted least squares over all keep-vectors: the reference of this file, checked the other way round."""
    net = enumerated(0, nn.GELU, deep=True)
    root = np.sqrt(net.chance(0.1))[:, None]
    columns = np.concatenate([net.keep, np.ones((4096, 1))], axis=1)
    best = np.linalg.lstsq(root * columns, root * net.outputs, rcond=None)[0]
    np.testing.assert_allclose(net.effects(0.1), best[:-1].T, atol=1e-10)


CASES = [(0.05, nn.ReLU), (0.1, nn.GELU), (0.2, nn.ReLU)]  # an estimator sees no activation, only its gradients


@pytest.mark.slow
@pytest.mark.parametrize(("fraction", "activation"), CASES)
def test_the_exact_background_converges_to_the_enumerated_effects(fraction: float, activation: type[nn.Module]) -> None:
    net = enumerated(1, activation, deep=True)
    effects = net.effects(fraction)
    errors = []
    for rounds in (10, 160):
        found = net.estimate(fraction, "bernoulli", rounds)
        off = found.weights - effects
        errors.append(np.sqrt((off**2).mean()))
    assert errors[1] < 0.4 * errors[0], "sixteen times the passes, at least a quarter of the error nearly"
    assert errors[1] < 0.05 * np.sqrt((effects**2).mean())
    assert np.abs(off / np.maximum(found.stderr, 1e-9)).mean() < 1.2
    assert (np.abs(off) < 4 * found.stderr + 0.005 * np.abs(effects).max()).mean() > 0.97
    assert net.quality(found.weights, fraction) > net.quality(effects, fraction) - 0.003


@pytest.mark.parametrize(("fraction", "activation"), CASES)
def test_regression_converges_to_the_enumerated_effects(
    fraction: float, activation: type[nn.Module], write_campaign: Callable[..., Any], draw_keep: Callable[..., Any]
) -> None:
    net = enumerated(1, activation, deep=True)
    effects, errors = net.effects(fraction), []
    for rows in (2_000, 40_000):
        keep = draw_keep(rows, 12, fraction)
        outputs = net.outputs[keep @ (1 << np.arange(11, -1, -1))]
        campaign = write_campaign(keep, outputs, block_rows=4000, ablate_fraction=fraction)
        fitted = coar.fit(campaign, method="ols")
        off = fitted.weights[:] - effects
        errors.append(np.sqrt((off**2).mean()))
    assert errors[1] < 0.4 * errors[0]
    assert (np.abs(off) < 4 * fitted.stderr[:] + 1e-6).mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("deep", [False, True])
def test_the_default_background_loses_little(deep: bool) -> None:
    """Against the best linear predictor, on one hidden layer of 12 units, and on two of 6, which interact much more."""
    for fraction in (0.05, 0.1, 0.2):
        lost = []
        for activation, seed in ((nn.ReLU, 0), (nn.GELU, 1)):
            net = enumerated(seed, activation, deep)
            found = net.estimate(fraction, None, 150)
            lost.append(net.quality(net.effects(fraction), fraction) - net.quality(found.weights, fraction))
        assert min(lost) > -1e-9, "nothing is better than the best"
        assert np.mean(lost) <= 0.005, f"at ablate fraction {fraction}"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[ablate.Engine, ablate.Examples]:
    """A trained residual CNN and 40 test digits."""
    model = digits_model(cache=tmp_path_factory.mktemp("digits") / "model.safetensors")
    index = ablate.ComponentIndex.from_model(model, ["conv_filter"])
    return ablate.Engine(model, index), digits_split("test").take(range(40))


@pytest.fixture(scope="module")
def digits_truth(digits: tuple[ablate.Engine, ablate.Examples]) -> tuple[npt.NDArray[np.bool_], Doubles]:
    """300 keep-vectors that ablate 5 %, and the digits' outputs under them."""
    engine, examples = digits
    keep = ablate.KeepPlan(len(engine.index), 300, 0.05, 99).take(0, 300)
    return keep, engine.outputs(keep, examples).double().numpy()


def _quality(found: BlockEstimate, truth: tuple[npt.NDArray[np.bool_], Doubles]) -> float:
    keep, outputs = truth
    return float(np.nanmean(correlation(keep.astype(np.float64) @ found.weights.T, outputs)))


@pytest.mark.slow
def test_more_passes_predict_better(
    digits: tuple[ablate.Engine, ablate.Examples], digits_truth: tuple[npt.NDArray[np.bool_], Doubles]
) -> None:
    slopes = _quality(GradientTimesGate().estimate(*digits, 0, 0), digits_truth)
    found = [_quality(Gradient(passes).estimate(*digits, 0, 0), digits_truth) for passes in (2, 5, 10, 20, 50)]
    assert found[0] > slopes
    assert (np.diff(found) > -0.005).all(), found
    assert found[-1] > 0.9


@pytest.mark.slow
def test_intervals_cover_an_independent_long_run(digits: tuple[ablate.Engine, ablate.Examples]) -> None:
    """The long run is the plain mean of sampled gradients, which no shrinkage has touched, with its own error."""
    engine, examples = digits
    design = GateDesign(len(engine.index), 0.05, "continuous", 77).passes(range(len(examples)))
    sums = GradientSums(len(examples), len(engine.index), torch.float32)
    halves: list[Doubles] = []
    for _ in range(2):
        before = (sums.even + sums.odd).double().numpy()
        for _ in range(200):
            one = design.next()
            sums.add(one, *engine.gate_gradients(one.gates().astype(np.float32), examples))
        halves.append(((sums.even + sums.odd).double().numpy() - before) / 20)
    moments = Moments.of(sums, design.start)
    path = moments.total / moments.count
    path_variance = ((halves[0] - halves[1]) ** 2 / 4).mean(axis=0)  # of a component, over examples
    for passes in (20, 50):
        found = Gradient(passes).estimate(engine, examples, 0, 0)
        error = np.sqrt(found.stderr.astype(np.float64) ** 2 + path_variance)
        living = moments.squares.sum(axis=0) > 0
        covered = (np.abs(found.weights - path) < 1.96 * error)[:, living].mean()
        assert 0.93 < covered < 0.97, (passes, covered)


class Quadratic(nn.Module):
    """Logits (sum of squares of hidden units, 0): effects and gradients by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        squares = (self.hidden(x) ** 2).sum(dim=1)
        return torch.stack([squares, torch.zeros_like(squares)], dim=1)


def test_effects_of_squares_by_hand() -> None:
    """Without interactions the effect of unit i is its square, at any ablate fraction; the slope at 1 is twice that."""
    model = Quadratic()
    engine = ablate.Engine(model, ablate.ComponentIndex.from_model(model, ["linear_neuron"]), "logit")
    inputs = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, 4.0]])
    for background in ("continuous", "mixed", "bernoulli"):
        found = Gradient(120, 0.2, background).estimate(engine, ablate.Examples(inputs, [0, 0]), 0, 0)
        np.testing.assert_allclose(found.weights, inputs.numpy() ** 2, rtol=0.02, atol=1e-3)
        assert (np.abs(found.weights - inputs.numpy() ** 2) <= 5 * found.stderr + 1e-5).all()


class Listening(ablate.Engine):
    """Remembers the keep-vectors and gates that it is asked for."""

    def outputs(self, keep: Any, inputs: Any, targets: Any = None) -> Tensor:
        self.__dict__.setdefault("keeps", []).append(keep)
        return super().outputs(keep, inputs, targets)

    def gate_gradients(self, gates: Any, inputs: Any, targets: Any = None) -> tuple[Tensor, Tensor]:
        self.__dict__.setdefault("gates", []).append(gates)
        return super().gate_gradients(gates, inputs, targets)


def test_what_an_example_samples_does_not_depend_on_its_block(mlp: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(mlp, ["linear_neuron"])
    examples = ablate.Examples(torch.randn(12, 4, generator=torch.Generator().manual_seed(3)), [0, 1, 2] * 4)

    def gates(span: range, first: int, seed: int = 0) -> npt.NDArray[Any]:
        engine = Listening(mlp, index)
        Gradient(20, 0.1).estimate(engine, examples.take(span), first, seed)
        return np.stack([np.asarray(asked) for asked in engine.__dict__["gates"][-20:]])

    whole = gates(range(12), 0)
    np.testing.assert_array_equal(gates(range(5, 9), 5), whole[:, 5:9])
    assert not np.array_equal(gates(range(5, 9), 0), whole[:, 5:9])
    assert not np.array_equal(gates(range(12), 0, seed=1), whole)


def test_forward_rows_are_those_of_no_campaign(conv_net: nn.Module, images: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter"])
    engine = Listening(conv_net, index)
    Gradient(5, 0.2, forward_rows=30).estimate(engine, ablate.Examples(images, LABELS[:7]), 0, 4)
    asked = engine.__dict__["keeps"][-1]
    np.testing.assert_array_equal(asked, ablate.KeepPlan(10, 30, 0.2, 4 ^ FORWARD_SEED).take(0, 30))
    assert not np.array_equal(asked, ablate.KeepPlan(10, 30, 0.2, 4).take(0, 30))


@pytest.mark.parametrize("passes", [1, 0, -3, True, 2.5, "many", 2**15])
def test_passes_that_make_no_sense(passes: Any) -> None:
    with pytest.raises(FitError) as caught:
        Gradient(passes)
    assert str(caught.value) == f"passes is {passes!r}, expected an integer from 2 to 32,767, or 'auto'."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0}, "tolerance is 0, expected a number between 0 and 1."),
        ({"tolerance": float("nan")}, "tolerance is nan, expected a number between 0 and 1."),
        ({"most_passes": 7}, "most_passes is 7, expected 8 to 32,767."),
        ({"forward_rows": 9}, "forward_rows is 9, expected 0 (none), or 10 to 10,000."),
        ({"forward_rows": -1}, "forward_rows is -1, expected 0 (none), or 10 to 10,000."),
        ({"background": "both"}, "background is 'both', expected one of continuous, mixed, bernoulli."),
        (
            {"ablate_fraction": 0.6},
            "ablate_fraction is 0.6, expected a number above 0 and at most 0.5 for estimates from gradients. For more, "
            "run a campaign and fit it (coar.fit).",
        ),
    ],
)
def test_other_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError) as caught:
        Gradient(**settings)
    assert str(caught.value) == message


def test_auto_stops_by_its_tolerance(conv_net: nn.Module, images: Tensor, untouched: Any) -> None:
    engine = ablate.Engine(conv_net, ablate.ComponentIndex.from_model(conv_net, ["conv_filter"]))
    examples = ablate.Examples(images, LABELS[:7])

    def taken(tolerance: float, most: int = 200) -> float:
        found = Gradient("auto", 0.1, tolerance=tolerance, most_passes=most).estimate(engine, examples, 0, 0)
        assert len(set(found.passes.tolist())) == 1
        return float(found.passes[0])

    with untouched(conv_net, images):
        counts = [taken(tolerance) for tolerance in (0.5, 0.05, 0.01, 1e-9)]
    assert counts == sorted(counts)
    assert counts[0] == 8 < counts[2]
    assert counts[3] == 200
    assert taken(1e-9, most=31) == 31


@pytest.mark.slow
def test_autos_predicted_error_is_near_the_true_one(digits: tuple[ablate.Engine, ablate.Examples]) -> None:
    engine, examples = digits
    reference = Gradient(300).estimate(engine, examples, 0, 5).weights.astype(np.float64)
    found = Gradient("auto", tolerance=0.2).estimate(engine, examples, 0, 0)
    predicted = (found.stderr.astype(np.float64) ** 2).sum(axis=1) / (reference**2).sum(axis=1)
    true = ((found.weights - reference) ** 2).sum(axis=1) / (reference**2).sum(axis=1)
    assert predicted.mean() == pytest.approx(true.mean(), rel=0.3)
    assert true.mean() < 0.3
