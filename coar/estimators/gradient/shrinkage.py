"""Empirical Bayes: from noisy path estimates of many examples and components to the best guess of each, and its error.

A path estimate (the mean sampled gradient) is unbiased and noisy; the slope at gate 1 is precise and biased. Here
weight = prior + deviation, where the prior is the slope times a factor per component, and deviations are Gaussian,
correlated between examples (alike examples deviate alike) and independent between components. All of the variances
are estimated from the block itself, so nothing has to be set. With more passes the noise falls and the weight tends
to the path estimate.
Sources: empirical Bayes for vectors, Efron and Morris (Biometrika 59, 1972); eigenvalues of sample covariances,
Donoho, Gavish and Johnstone (Annals of Statistics 46, 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coar.estimators.gradient.moments import Moments

Doubles = npt.NDArray[np.float64]

# The variance of a gradient over backgrounds, in units of its variance where its own gate is 1; used where there are
# too few rounds to measure it. Measured over all components: 1.0 and 1.1 on two residual networks, 1.9 on a transformer
# (0.8 to 2.1 by layer). Too high a value takes signal for noise, which is worse than the other way round.
BACKGROUND_RATIO = 1.2
UNSURE_SIGNAL = 0.3  # with one sample each: the share of what examples do not have in common that is taken for signal
LEAST_SIGNAL = 0.02  # no deviation is taken for noise alone: with more passes, the path estimate always wins
MOST_SHARED = 16  # at most so many directions that examples have in common
LEAST_SLANT = 1e-6  # so much of a layer's samples at gate 1/2 more: slants stay determined, and hardly change
TINY = 1e-300


@dataclass(frozen=True)
class Posterior:
    """What is known of the weights, (examples, components): their means and variances."""

    mean: Doubles
    variance: Doubles


class Layers:
    """Sums over the components of a layer."""

    def __init__(self, labels: npt.NDArray[np.int64]) -> None:
        self.of, self.count = labels, int(labels.max(initial=-1)) + 1
        self.sizes = np.bincount(labels, minlength=self.count).astype(np.float64)

    def total(self, values: Doubles) -> Doubles:
        """Returns sums over layers, (layers,) or (rows, layers), of values (components,) or (rows, components)."""
        if values.ndim == 1:
            return np.bincount(self.of, values, self.count).astype(np.float64, copy=False)
        return np.stack([np.bincount(self.of, row, self.count) for row in values])

    def spread(self, values: Doubles) -> Doubles:
        """Returns, for each component, the sum over its layer."""
        return self.total(values)[..., self.of]

    def toward_zero(self, estimates: Doubles, variances: Doubles) -> Doubles:
        """Returns estimates (components,) shrunk by how much of their spread in the layer is noise."""
        signal = np.maximum(self.spread(estimates**2) - self.spread(variances), 0.0) / self.sizes[self.of]
        return signal / (signal + variances + TINY) * estimates


def shrink(moments: Moments, layers: npt.NDArray[np.int64]) -> Posterior:
    """Returns the posterior of all weights of a block of examples. Mutates nothing.

    Args:
      moments: Of the block's gradients.
      layers: The layer's number of every component, (components,).

    Cost: some tens of operations per example and component, and an eigendecomposition of examples x examples.
    """
    m, by_layer = moments, Layers(layers)
    factor, slant = _trend(m, by_layer)
    seen = m.count > 0
    prior = factor * m.slope
    # the gates were not exactly balanced around 1/2: take out what is due to that
    path = np.where(seen, (m.total - slant * m.slope * m.u) / np.maximum(m.count, 1), prior)
    deviation = path - prior
    power = _power(deviation, seen, by_layer)
    for _ in range(3):  # a few examples whose gradients are large must not decide for all which components are
        size = ((deviation**2 / power * seen).sum(axis=1, keepdims=True) + 3) / (seen.sum(axis=1, keepdims=True) + 3)
        power = _power(deviation / np.sqrt(size), seen, by_layer)
    noise = _noise(m, path, slant, by_layer)
    scaled = deviation / np.sqrt(power)
    if noise is None:
        shared, rest = _shared(scaled, seen, None)
        noise = (1 - UNSURE_SIGNAL) * rest[:, None] * power
        own = UNSURE_SIGNAL * rest
    else:
        relative = (noise / power * seen).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
        shared, rest = _shared(scaled, seen, relative)
        own = rest * np.clip(1 - relative.sum() / rest.sum(), LEAST_SIGNAL, 1.0)
    noise = np.where(seen, noise, np.inf)
    mean, variance = _posterior(deviation, noise, shared, own, power)
    return Posterior(prior + mean, variance)


def _trend(m: Moments, by_layer: Layers) -> tuple[Doubles, Doubles]:
    """Returns (factor, slant) per component: gradient ~ factor x slope + slant x slope x (gate - 1/2).

    Least squares over the samples of all examples; per layer first, then each component as far as its samples say
    more than noise.
    """
    x = m.slope
    xx, xu, xuu = (x * x * m.count).sum(axis=0), (x * x * m.u).sum(axis=0), (x * x * m.u_squares).sum(axis=0)
    xg, xug = (x * m.total).sum(axis=0), (x * m.slanted).sum(axis=0)
    a, b, c, p, q = (by_layer.spread(values) for values in (xx, xu, xuu, xg, xug))
    c = c + LEAST_SLANT * a  # with a single sample, all of it is factor
    determinant = a * c - b * b
    factor, slant = _ratio(c * p - b * q, determinant), _ratio(a * q - b * p, determinant)
    missed = np.maximum(
        m.squares
        - 2 * x * (factor * m.total + slant * m.slanted)
        + x * x * (factor**2 * m.count + 2 * factor * slant * m.u + slant**2 * m.u_squares),
        0.0,
    )
    weighted = (x * x * missed).sum(axis=0)
    factor_off = _ratio(xg - factor * xx - slant * xu, xx)
    slant_off = _ratio(xug - factor * xu - slant * xuu, xuu)
    return (
        factor + by_layer.toward_zero(factor_off, _ratio(_ratio(weighted, xx), xx)),
        slant + by_layer.toward_zero(slant_off, _ratio(_ratio(weighted / 12, xuu), xuu)),
    )


def _ratio(above: Doubles, below: Doubles) -> Doubles:
    """Returns above / below, and zero where below is zero: of components whose gradients are all zero."""
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


def _power(deviation: Doubles, seen: npt.NDArray[np.bool_], by_layer: Layers) -> Doubles:
    """Returns each component's mean squared deviation, with three examples' worth of its layer's."""
    squares, count = (deviation**2 * seen).sum(axis=0), seen.sum(axis=0).astype(np.float64)
    usual = by_layer.spread(squares) / np.maximum(by_layer.spread(count), 1)
    power: Doubles = (squares + 3 * usual) / (count + 3) + TINY
    return power


def _noise(m: Moments, path: Doubles, slant: Doubles, by_layer: Layers) -> Doubles | None:
    """Returns the variance of each path estimate, or None if not nearly all of them have two samples.

    A sampled gradient varies with the others' gates (which is independent between rounds) and with its own (which is
    spread evenly over rounds, so that its part of the mean's variance falls with the square of their number). The two
    are told apart by comparing the scatter of single gradients with the difference between even and odd rounds.
    """
    again = m.count > 1
    freedom = np.where(again, m.count - 1, 0.0)
    if again.mean() < 0.9:
        return None
    x, n = m.slope, np.maximum(m.count, 1)
    scatter = m.squares - 2 * slant * x * m.slanted + (slant * x) ** 2 * m.u_squares - m.count * path**2
    scatter = np.where(again, np.maximum(scatter, 0.0), 0.0)
    single = scatter / np.maximum(freedom, 1)

    even, odd = np.maximum(m.even_count, 1), np.maximum(m.count - m.even_count, 1)
    between = m.even_mean - m.odd_mean - slant * x * (m.u_even / even - m.u_odd / odd)
    halves = np.where(again, between**2 / (1 / even + 1 / odd), 0.0)
    rounds = (n * again).sum() / again.sum()
    evenness = (((1 / even**2 + 1 / odd**2) / (1 / even + 1 / odd)) * again).sum() / again.sum()
    in_single = (rounds + 1) / rounds
    s, h = (by_layer.total((values * again).sum(axis=0)) for values in (single, halves))
    own = np.maximum(s - h, 0.0) / max(in_single - evenness, 0.2)
    others = np.maximum(h - evenness * own, 0.0)
    guess = by_layer.total((m.slope_variance * again).sum(axis=0)) * BACKGROUND_RATIO
    trust = max(rounds - 4, 0) / max(rounds, 4)
    others_share = np.minimum((trust * others + (1 - trust) * guess) / (s + TINY), 1.0)
    own_share = (1 - others_share) / in_single

    # the variance of a single gradient: a factor per example and layer times one per component
    usual = np.ones((len(n), by_layer.count))
    for _ in range(4):
        component = (scatter / usual[:, by_layer.of]).sum(axis=0)
        whole = by_layer.spread(component) / np.maximum(by_layer.spread(freedom.sum(axis=0)), 1)
        component = (component + 3 * whole) / (freedom.sum(axis=0) + 3) + TINY
        usual = (by_layer.total(scatter / component) + 3) / (by_layer.total(freedom) + 3)
    variance: Doubles = component * usual[:, by_layer.of] * (others_share[by_layer.of] + own_share[by_layer.of] / n) / n
    return variance


def _shared(scaled: Doubles, seen: npt.NDArray[np.bool_], noise: Doubles | None) -> tuple[Doubles, Doubles]:
    """Returns what deviations of examples have in common, factors (examples, k), and what they have not, (examples,).

    The covariance of examples over components is shared @ shared.T + diag(rest). Directions are kept whose eigenvalue
    noise alone would not reach; the noise of the covariance is measured from fourth moments, so that a few large
    components do not pass for a direction.

    Args:
      scaled: Deviations of unit variance per component.
      seen: Which of them were observed.
      noise: Mean noise variance per example, or None if it is not known.
    """
    examples = len(scaled)
    together = np.maximum(seen.astype(np.float64) @ seen.T.astype(np.float64), 1)
    covariance = scaled @ scaled.T / together
    total = np.maximum(np.diag(covariance), 1e-12)  # an example whose gradients are all as predicted has none
    if examples < 8:
        return np.zeros((examples, 0)), total
    fourth = scaled**2 @ (scaled**2).T / together**2
    scale = np.clip(noise, 1e-9 * total, total) if noise is not None else total
    factors = np.zeros((examples, 0))
    for _ in range(1 if noise is not None else 6):
        w = 1 / np.sqrt(scale)
        spread = fourth * np.multiply.outer(w**2, w**2)
        aspect = (spread.sum() - np.trace(spread)) / (examples - 1)
        values, vectors = np.linalg.eigh(covariance * np.multiply.outer(w, w))
        values, vectors = values[-MOST_SHARED:], vectors[:, -MOST_SHARED:]
        kept = values > (1 + np.sqrt(aspect)) ** 2
        middle = values[kept] + 1 - aspect
        signal = (middle + np.sqrt(np.maximum(middle**2 - 4 * values[kept], 0.0))) / 2 - 1
        factors = vectors[:, kept] * np.sqrt(signal) / w[:, None]
        if noise is None:
            scale = np.maximum(total - (factors**2).sum(axis=1), 0.2 * total)
    return factors, np.maximum(total - (factors**2).sum(axis=1), 1e-9 * total)


def _posterior(
    deviation: Doubles, noise: Doubles, shared: Doubles, own: Doubles, power: Doubles
) -> tuple[Doubles, Doubles]:
    """Returns means and variances of deviations observed with noise.

    A component's deviations are sqrt(power) x (shared @ z + sqrt(own) x e), z and e standard normal.
    """
    k = shared.shape[1]
    idiosyncratic = own[:, None] * power
    precision = 1 / (idiosyncratic + noise + TINY * 1e10)  # of an observation given z; zero where there is none
    pull = idiosyncratic * precision  # the share of what z leaves that is signal
    mean = pull * deviation
    variance = idiosyncratic * (1 - pull)
    if k:
        pairs = (shared[:, :, None] * shared[:, None, :]).reshape(len(shared), k * k)
        information = ((precision * power).T @ pairs).reshape(-1, k, k) + np.eye(k)
        inverse = np.linalg.inv(information)
        z = np.einsum("nkl,nl->nk", inverse, (precision * deviation).T @ shared * np.sqrt(power)[:, None])
        explained = (shared @ z.T) * np.sqrt(power)
        mean += (1 - pull) * explained
        uncertain = (pairs @ inverse.reshape(-1, k * k).T) * power
        variance += (1 - pull) ** 2 * uncertain
    return mean, variance
