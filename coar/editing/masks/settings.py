"""The settings of meta-training, with two presets: what the paper's text says, and what its published code does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import Field

from coar.editing.settings import Count, CountFromZero, FromZero, Positive, problems_of
from coar.errors import EditError

Preset = Literal["paper", "code"]
SHARE = "a share of the area"  # 1: no crop


@dataclass(frozen=True, kw_only=True)
class MetaSettings:
    """How a mask hypernetwork is built and trained. The defaults are the preset `code`.

    Where paper and code differ, `(code | paper)` says what the presets hold. Where the paper says nothing, its preset
    takes the code's value, but for the cropping of images and the schedule, which it leaves out.

    Attributes:
      iterations: Minibatches (10 000 | 7 000).
      batch: Pairs of images in one.
      rate: Of RMSprop on the hypernetwork.
      cosine_period: Iterations in which the rate falls to 0 along a cosine (20 000 | None: constant).
      inner_steps, inner_rate: Of gradient descent on the gated tensors, T and alpha.
      temperature: Of the divergence between the two predictions, times its square (5 | 1).
      sparsity: Weight of the mask's l1 norm (1; the paper gives none).
      sparsity_norm: `mean` over samples and bits, `sum` over both.
      decoupled: Fit free masks first and the hypernetwork to them; False: back through the hypernetwork directly.
      free_steps, free_rate: Of the optimiser of free masks.
      free_optimizer: `rmsprop` or `adam` (rmsprop | adam): ten steps under a constant gradient move by 5.06 or 1.00.
      free_slope: A free mask is sigmoid(free_slope * z).
      label_slope: What the hypernetwork is fitted to is sigmoid(label_slope * z) (3 | 10: the free mask itself).
      slope: The hypernetwork's mask is sigmoid(slope * logit) (3 | 10).
      divergence: `forward`: binary cross-entropy, KL(label || mask) but for a constant; `reverse`: KL(mask || label).
      regression_steps, regression_weight: Updates of the hypernetwork per minibatch, and the factor of their loss.
      blocks: Of the transformer (3, as its published commands do | 5).
      attention_heads: At most so many, and a divisor of the width (6 | None: as the model's attentions, else 8).
      ffn_ratio: Width of its feed-forward networks over its own (1 | None: as in the model, else 4).
      shared_head: One output layer for all rows instead of one for each (False | True).
      width: Of the transformer; None: that of the feature. Another one puts a linear layer before it.
      feature_site: Name of the module whose input is the feature; None: the classifier head's (in a ViT the normalised
        class token, and nothing else; in a CNN the pooled vector).
      patch_smallest, patch_largest: Sides of the pasted rectangle as a share of the image's.
      alignment: Of the rectangle: to `patches` (a ViT's), to `pixels`, or `auto`.
      reach_edge: Whether it may cover the last row and column (False: the code's off-by-one | True).
      crop_smallest: Images are first cropped to a random share of their area, at least this one (0.25 | 1: not at all).
      at_once: Samples whose copies of the gated tensors are in memory at a time.
      save_every: Iterations between two savings of the training's state.
      seed: Of everything drawn.
    """

    iterations: Count = 10_000
    batch: Count = 8
    rate: Positive = 1e-4
    cosine_period: Count | None = 20_000
    inner_steps: Count = 5
    inner_rate: Positive = 1e-3
    temperature: Positive = 5.0
    sparsity: FromZero = 1.0
    sparsity_norm: Literal["mean", "sum"] = "mean"
    decoupled: bool = True
    free_steps: Count = 10
    free_rate: Positive = 0.1
    free_optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    free_slope: Positive = 10.0
    label_slope: Positive = 3.0
    slope: Positive = 3.0
    divergence: Literal["forward", "reverse"] = "forward"
    regression_steps: Count = 4
    regression_weight: Positive = 0.1
    blocks: Count = 3
    attention_heads: Count | None = 6
    ffn_ratio: Positive | None = 1.0
    shared_head: bool = False
    width: Count | None = None
    feature_site: str | None = None
    patch_smallest: float = 3 / 14
    patch_largest: float = 8 / 14
    alignment: Literal["auto", "patches", "pixels"] = "auto"
    reach_edge: bool = False
    crop_smallest: Annotated[float, Field(gt=0, le=1, description=SHARE)] = 0.25
    at_once: Count = 8
    save_every: Count = 500
    seed: CountFromZero = 0

    def __post_init__(self) -> None:
        problems = problems_of(self, self._between)
        if problems:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            listing = "\n".join(f"  {i}. {problem}." for i, problem in enumerate(problems, 1))
            raise EditError(f"The settings of the hypernetwork's training: {count}\n{listing}")

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> MetaSettings:
        """Returns the settings `paper` or `code`, with changes. Raises EditError for an unknown preset or setting."""
        if name not in PRESETS:
            raise EditError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}.")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise EditError(
                f"The hypernetwork's training has no setting {unknown[0]!r}. Known: {', '.join(sorted(known))}."
            )
        return cls(**{**PRESETS[name], **changes})

    def rate_at(self, iteration: int) -> float:
        """Returns the learning rate of an iteration, counted from 0."""
        if self.cosine_period is None:
            return self.rate
        return self.rate * 0.5 * (1 + math.cos(math.pi * iteration / self.cosine_period))

    def describe(self) -> dict[str, Any]:
        """Returns all settings, JSON-able."""
        return asdict(self)

    def _between(self) -> list[str]:
        found = []
        if not 0 < self.patch_smallest <= self.patch_largest < 1:
            found.append(
                f"patch_smallest and patch_largest are {self.patch_smallest:g} and {self.patch_largest:g}, expected "
                "shares of the image's side: above 0, below 1, the smallest first"
            )
        if self.cosine_period is not None and 1 <= self.cosine_period < self.iterations:
            found.append(f"cosine_period is {self.cosine_period}, below the {self.iterations} iterations")
        return found


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "code": {},
    "paper": {
        "iterations": 7_000,
        "cosine_period": None,
        "temperature": 1.0,
        "free_optimizer": "adam",
        "label_slope": 10.0,
        "slope": 10.0,
        "regression_weight": 1.0,
        "blocks": 5,
        "attention_heads": None,
        "ffn_ratio": None,
        "shared_head": True,
        "reach_edge": True,
        "crop_smallest": 1.0,
    },
}
