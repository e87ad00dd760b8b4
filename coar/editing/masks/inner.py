"""The inner problem: how well a model, tuned through a mask to keep its prediction, then keeps it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from coar.editing.masks.layout import MaskLayout
from coar.editing.masks.settings import MetaSettings
from coar.errors import EditError


def distillation(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Returns `temperature**2 * KL(teacher || student)` of softened predictions, (examples,), from logits.

    Its gradient by the student's logits is `temperature * (q - p)`, of softened student minus softened teacher.
    """
    goal = F.log_softmax(teacher / temperature, dim=-1)
    got = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * (goal.exp() * (goal - got)).sum(dim=-1)


class InnerLoop:
    """Tunes copies of the gated tensors, one per sample, by T masked steps of gradient descent.

    `delta(t) = delta(t-1) - rate * gradient at phi(t-1)`, `phi(t) = phi(0) + mask * delta(t)`. The gradient is taken by
    phi(t) itself, so that a mask of zeros is no division by zero.

    Args:
      model: In eval mode, with no parameter that requires a gradient. Never changed.
      layout: Of the mask.
      settings: `inner_steps`, `inner_rate`, `temperature` and `at_once` count.

    Memory: for each of `at_once` samples four copies of the gated tensors (phi, its gradient, delta, mask times delta)
    and the activations from the first gated layer on; at a ViT-B's 57 MB of gated tensors about 0.25 GB per sample.
    """

    def __init__(self, model: nn.Module, layout: MaskLayout, settings: MetaSettings) -> None:
        self._model, self._layout, self._settings = model, layout, settings
        self._base = layout.gated(model)

    def losses(self, parts: Tensor, inputs: Tensor, teacher: Tensor) -> Tensor:
        """Returns each sample's divergence from the teacher after T steps through its mask, (samples,).

        Differentiable by `parts`, to first order: through the last product `mask * delta(T)` only, which for T = 1 is
        the exact gradient.

        Args:
          parts: The masks, (samples, bits): how much each component takes part.
          inputs: (samples, ...): what the tuned model sees.
          teacher: Logits (samples, classes) that it should keep.
        """
        expanded = self._layout.expand(parts, self._base)
        fixed = {name: mask.detach() for name, mask in expanded.items()}
        delta = {name: value.new_zeros(len(inputs), *value.shape) for name, value in self._base.items()}
        for _ in range(self._settings.inner_steps):
            tuned = {name: (self._base[name] + fixed[name] * delta[name]).requires_grad_() for name in delta}
            with torch.enable_grad():
                loss = self._distance(tuned, inputs, teacher).sum()
                gradients = torch.autograd.grad(loss, list(tuned.values()))
            for name, gradient in zip(tuned, gradients, strict=True):
                delta[name].sub_(gradient, alpha=self._settings.inner_rate)
        return self._distance({n: self._base[n] + expanded[n] * delta[n] for n in delta}, inputs, teacher)

    def objective(self, parts: Tensor, inputs: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the losses (samples,), and the gradient (samples, bits) of their sum plus the sparsity term.

        The sparsity term is `sparsity` times the masks' mean over samples and bits, or their sum.

        Raises:
          EditError: A loss that is not finite.
        """
        losses, gradients = [], []
        for start in range(0, len(parts), self._settings.at_once):
            window = slice(start, start + self._settings.at_once)
            mask = parts[window].detach().requires_grad_()
            with torch.enable_grad():
                loss = self.losses(mask, inputs[window], teacher[window])
                gradients.append(torch.autograd.grad(loss.sum(), mask)[0])
            losses.append(loss.detach())
        found = torch.cat(losses)
        if not torch.isfinite(found).all():
            raise EditError(
                f"The divergence of sample {int(torch.nonzero(~torch.isfinite(found))[0])} of a minibatch is not "
                f"finite. Lower inner_rate (now {self._settings.inner_rate:g}), or check the images."
            )
        share = 1 if self._settings.sparsity_norm == "sum" else parts.numel()
        return found, torch.cat(gradients) + self._settings.sparsity / share

    def _distance(self, tuned: Mapping[str, Tensor], inputs: Tensor, teacher: Tensor) -> Tensor:
        return distillation(teacher, self._logits(tuned, inputs), self._settings.temperature)

    def _logits(self, tuned: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Returns logits (samples, classes), each sample's by its own copy of the gated tensors (samples, ...)."""
        if len(inputs) == 1:
            single: Tensor = functional_call(self._model, {name: value[0] for name, value in tuned.items()}, (inputs,))
            return single
        with sdpa_kernel(SDPBackend.MATH):  # the others have no rule for samples side by side
            logits: Tensor = vmap(self._one)(dict(tuned), inputs)
        return logits

    def _one(self, tuned: dict[str, Tensor], example: Tensor) -> Tensor:
        logits: Tensor = functional_call(self._model, tuned, (example[None],))
        return logits[0]
