"""The engine's own copy of a model, made ready: probed, folded, gated, checked against literal zeroing, cast."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ablate.ablation import Ablation, MeanAblation
from ablate.engine.compiling import compile_model
from ablate.engine.folding import add_missing_biases, fold_batch_norms, norm_scale, to_precision
from ablate.errors import DataError, GatingError
from ablate.gating.activation import ActivationGates
from ablate.gating.closeness import gap
from ablate.gating.means import Means, mean_activations
from ablate.gating.probe import ProbeReport, look_again, probe
from ablate.gating.reference import literal_logits
from ablate.gating.selfcheck import TOLERANCE, GateCheck, mixed_gates
from ablate.gating.weights import WeightGates
from ablate.index.components import ComponentIndex, Selection
from ablate.models.copies import cast

ATTENTION = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


GRAPHS = 256  # compiled per block, over all engines of a process
PROBED = 2  # examples in a forward of which the probe knows that none depends on another
COMPARED = 4  # examples of the first batch of a shape, first and last among them, that are also run alone
BATCH_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.25}  # of a logit, alone and in a batch
CHECKS = 2  # forwards of each kind in which a compiled model is compared with itself uncompiled
COMPILED_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1}  # of a logit


@dataclass(frozen=True)
class Speed:
    """How the engine's copy of the model runs; None: the default for the device, which was measured.

    Attributes:
      fold: Fold batch norm into the convolution before it. Default: yes; False makes weight gating at float32 equal
        to literal zeroing bit for bit.
      channels_last: Memory layout of images and convolutions. Default: yes for models with 2-D convolutions.
      compile: `torch.compile`, of the repeated block where there is one: True, False or a mode ("max-autotune",
        "reduce-overhead" for CUDA graphs). Default: on CUDA; on the CPU it takes up to a minute and pays for
        `gate_gradients` and activation gating in long runs.
      attention: Backend of scaled dot-product attention: "math", "flash", "efficient", "cudnn". Default: torch's
        choice, but where gradients are taken in bfloat16 on the CPU the faster of two, by timing.
    """

    fold: bool | None = None
    channels_last: bool | None = None
    compile: bool | str | None = None
    attention: str | None = None


class GatedModel:
    """A model that runs under gates.

    Args:
      original: The engine's copy, in eval mode, frozen, that has not run yet; copied, never changed.
      index: Its components.
      inputs: Two examples, prepared, floating ones in float64.
      check: Raises if the logits for them are not what the output needs.
      reference: For mean ablation: yields prepared batches of the reference set in a dtype.
      self_check: Compare literal zeroing, weight gating and activation gating on the two examples.

    Raises:
      GatingError: The model is random, mixes examples, or its gates do not give what literal zeroing gives.
      DataError: The model fails on the inputs.
    """

    def __init__(
        self,
        original: nn.Module,
        index: ComponentIndex,
        inputs: Tensor,
        *,
        device: torch.device,
        dtype: torch.dtype,
        ablation: Ablation,
        speed: Speed,
        check: Callable[[Any], None],
        reference: Callable[[torch.dtype], Iterator[Tensor]] | None,
        self_check: bool,
    ) -> None:
        self.index, self.device, self.dtype, self.speed = index, device, dtype, speed
        model = copy.deepcopy(original).to(device)
        self.model = model
        self.report, wide, inputs = _probed(model, index, inputs.to(device), dtype, check)
        sample = sample_rows(index)
        literal = None
        if self_check:
            literal = literal_logits(original, index, sample, inputs, wide, ablation.closed)
        has_convolutions = any(isinstance(module, nn.Conv2d) for module in model.modules())
        self.channels_last = has_convolutions if speed.channels_last is None else speed.channels_last
        self.shared = _shared(model, index)
        self.folded_into: dict[str, str] = {}
        self.norm_scales = {conv: norm_scale(model.get_submodule(norm)) for conv, norm in self.report.folds}
        if speed.fold is not False:
            self.folded_into = fold_batch_norms(model, self.report.folds, {port.parameter for port in index.ports})
        means: Means | None = None
        if isinstance(ablation, MeanAblation) and reference is not None:
            add_missing_biases(model, index)
            means = mean_activations(model, index, reference(wide))
        self.activation = ActivationGates(model, index, self.report)
        self._looked_at: tuple[int, ...] = tuple(inputs.shape[1:])
        self._looks = {self._looked_at: self.report}
        if literal is not None:
            self._self_check(sample, inputs, literal, ablation.closed, means, wide)
        to_precision(model, device, dtype, self.report.head)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        self.weights = WeightGates(model, index, means)
        if means is not None:
            self.activation.use_means(means, dtype)
        wanted = device.type == "cuda" if speed.compile is None else speed.compile
        self.compiled: str | None = None
        if wanted:
            whole = self.activation.functional is not None
            self.compiled = compile_model(model, wanted if isinstance(wanted, str) else None, whole)
        self._batches: set[tuple[str, tuple[int, ...]]] = set()  # whose examples were compared with themselves alone
        self._compiled_checks = {"plain": CHECKS, "gated": CHECKS}
        self.attention = speed.attention

    def _self_check(
        self, sample: Tensor, inputs: Tensor, literal: Tensor, closed: float, means: Means | None, dtype: torch.dtype
    ) -> None:
        """Raises, naming the module, unless weight and activation gating give what literal zeroing gives."""
        tolerance = TOLERANCE[dtype]
        gates = torch.where(sample.to(self.device), 1.0, closed).to(dtype)
        check = GateCheck(self._single, self.activation, WeightGates(self.model, self.index), inputs, dtype)
        by_weights = check.by_weights(*gates)
        self._require_equal("weight gating", by_weights, literal, tolerance)
        if self.activation.problems:
            return
        check.values(gates[1], by_weights[1:])
        if means is not None and not self.activation.problems:
            self.activation.use_means(means, dtype)
            with_means = WeightGates(self.model, self.index, means)
            check = GateCheck(self._single, self.activation, with_means, inputs, dtype)
            check.values(gates[1], check.by_weights(gates[1], first=1))
        if not self.activation.problems:
            check.gradients(self.report.cuts)

    def _require_equal(self, what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
        found = gap(got, expected, tolerance)
        if found is not None:
            raise GatingError(
                f"{what.capitalize()} of this {type(self.model).__name__} does not give what zeroing the weights by "
                f"hand gives: logits differ by {found} on two examples. Nothing was computed. "
                "Index fewer modules to find the one (include=[...]), and report it."
            )

    @property
    def layout(self) -> torch.memory_format:
        """The memory layout of images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def bytes(self) -> int:
        """Bytes of weights and buffers, and of the originals kept for weight gating."""
        tensors = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(t.numel() * t.element_size() for t in tensors.values()) + self.weights.masters

    def plain(self, inputs: Tensor) -> Tensor:
        """Returns the logits of prepared inputs under the weights as they are set."""
        logits = self.unchecked(inputs)
        with self._once("weight", inputs) as new:
            if new:
                self._require_own(logits, lambda i: self._single(inputs[i : i + 1]))
        return logits

    def seen(self, inputs: Tensor) -> None:
        """Compares the first batch of every shape with its examples alone, as `plain` does."""
        if ("weight", tuple(inputs.shape)) not in self._batches:
            self.plain(inputs)

    def unchecked(self, inputs: Tensor) -> Tensor:
        """Returns what `plain` returns: one forward and no other, for batches of a shape that `plain` has seen."""
        return self._run("plain", self._paired(inputs), self.attention)[: len(inputs)]

    def gated(self, inputs: Tensor, gates: Tensor, attention: str | None = None) -> Tensor:
        """Returns the logits of prepared inputs, each under its own gates (examples, components); within `active`."""
        return self.gated_by(inputs, self.activation.split(gates), attention)

    def gated_by(self, inputs: Tensor, parts: Sequence[Tensor], attention: str | None = None) -> Tensor:
        """Returns what `gated` returns, of gates by port as `activation.split` gives them."""
        self.look(inputs)
        parts = [part.to(self.dtype) for part in parts]
        if not self.activation.alone:
            return self._by_parts(inputs, parts, attention)
        each = [self._by_parts(inputs[i : i + 1], [p[i : i + 1] for p in parts], attention) for i in range(len(inputs))]
        return torch.cat(each)

    def _by_parts(self, inputs: Tensor, parts: Sequence[Tensor], attention: str | None) -> Tensor:
        with self._once("activation", inputs) as new:
            if new:
                self._require_own_gates(inputs)
        self.activation.set(parts)
        return self._run("gated", self._paired(inputs), attention or self.attention)[: len(inputs)]

    @contextmanager
    def _once(self, gating: str, inputs: Tensor) -> Iterator[bool]:
        """Tells whether no batch of this shape has passed the block yet; the probe knows those of one and two."""
        shape = (gating, tuple(inputs.shape))
        yield len(inputs) > PROBED and shape not in self._batches
        self._batches.add(shape)

    def _require_own_gates(self, inputs: Tensor) -> None:
        """Raises unless examples of a batch answer to gates of their own as they do alone, each under other gates."""
        rows = [mixed_gates(len(self.index), i, self.device, self.dtype) for i in range(len(inputs))]
        parts = self.activation.split(torch.stack(rows))

        def single(i: int) -> Tensor:
            self.activation.set([part[i : i + 1] for part in parts])
            return self._single(inputs[i : i + 1])

        with torch.no_grad(), self._eagerly():
            self.activation.set(parts)
            self._require_own(self._single(inputs), single)

    def _require_own(self, logits: Tensor, single: Callable[[int], Tensor]) -> None:
        """Raises unless some examples of a batch give the logits that each gives alone.

        Some models mix examples, or put them elsewhere, only where there are many.
        """
        chosen = sorted({round(i) for i in np.linspace(0, len(logits) - 1, COMPARED)})
        with torch.no_grad(), self._eagerly():
            alone = torch.cat([single(i) for i in chosen])
        if alone.shape[1:] != logits.shape[1:]:
            return  # no logits per example: told where they are measured
        found = gap(logits.detach()[chosen], alone, BATCH_TOLERANCE[self.dtype])
        if found is not None:
            raise GatingError(
                f"The examples of a batch influence each other in a batch of {len(logits)}, though not in one of two: "
                f"logits differ by {found} from those of the same examples alone. Give batch_size={PROBED}, or wrap "
                "the model so that each example's logits depend on that example alone."
            )

    def _eagerly(self) -> Any:
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def look(self, inputs: Tensor) -> None:
        """Finds out where the examples are on inputs of this shape, unless the last ones had it, too."""
        shape = tuple(inputs.shape[1:])
        if shape == self._looked_at:
            return
        if shape not in self._looks:
            two = inputs[:2] if len(inputs) > 1 else torch.cat([inputs, inputs])
            with torch.no_grad(), self._eagerly():
                self.activation.set(None)
                self._looks[shape] = look_again(self.model, self.index, two)
        self.activation.look(self._looks[shape], shape)
        self._looked_at = shape

    def tapped(self, inputs: Tensor, gates: Tensor) -> Tensor:
        """Returns what `gated` returns, never compiled: taps are lists. Of one example where places are not known."""
        self.look(inputs)
        self.activation.set(self.activation.split(gates.to(self.dtype)))
        with self._attention(self.attention), self._eagerly():
            result: Tensor = self.model(self._paired(inputs))
        return result[: len(inputs)]

    def _single(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(self._paired(inputs))
        return logits[: len(inputs)]

    def _paired(self, values: Tensor) -> Tensor:
        """Returns values (examples, ...), a single one twice where the model cannot take it alone.

        Its gates stay one row, which acts on all that there is.
        """
        return values.repeat(2, *[1] * (values.ndim - 1)) if self.report.in_pairs and len(values) == 1 else values

    def _run(self, what: str, inputs: Tensor, attention: str | None) -> Tensor:
        with self._attention(attention), _compiler() if self.compiled else nullcontext():
            result: Tensor = self.model(inputs)
            if self.compiled and self._compiled_checks[what]:
                self._compiled_checks[what] -= 1
                self._check_compiled(what, result, inputs)
        return result

    def _check_compiled(self, what: str, got: Tensor, inputs: Tensor) -> None:
        """Raises unless the compiled model sees the weights or gates as they are set now; run on the first few."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), self.activation.detached():
            expected = self.model(inputs)
        found = gap(got.detach(), expected, COMPILED_TOLERANCE[self.dtype])
        if found is not None:
            raise GatingError(
                f"The compiled {type(self.model).__name__} gives other logits than the same model uncompiled ({what} "
                f"forward, {found}). Nothing was kept. Use speed=Speed(compile=False)."
            )

    @contextmanager
    def active(self) -> Iterator[None]:
        """Lets `gated` run; raises GatingError where a module cannot be gated per example."""
        with self.activation.active():
            yield

    def _attention(self, name: str | None) -> Any:
        return sdpa_kernel(ATTENTION[name]) if name is not None and self.report.attention else nullcontext()


@contextmanager
def _compiler() -> Iterator[None]:
    """Gives compilation room, and silences what its own look at gates that are slices of one tensor warns of.

    Engines of one architecture share the code of their blocks, and torch counts graphs per code: with its limit of 8 a
    third engine would run uncompiled without a word. Its cache of traced graphs does not ask which attention backend
    they were traced for, so it is not used.
    """
    from torch._dynamo import config as dynamo  # slow to import, and there by now
    from torch._functorch import config as functorch

    room = dynamo.patch(recompile_limit=GRAPHS)
    with warnings.catch_warnings(), room, functorch.patch(enable_autograd_cache=False):
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        yield


def _probed(
    model: nn.Module, index: ComponentIndex, inputs: Tensor, dtype: torch.dtype, check: Callable[[Any], None]
) -> tuple[ProbeReport, torch.dtype, Tensor]:
    """Returns what the probe found, in float64, or in float32 for a model that cannot run in float64."""
    try:
        return probe(cast(model, inputs.device, torch.float64), index, inputs, check), torch.float64, inputs
    except DataError:
        inputs = inputs.float() if inputs.is_floating_point() else inputs
        return probe(cast(model, inputs.device, torch.float32), index, inputs, check), torch.float32, inputs


def _shared(model: nn.Module, index: ComponentIndex) -> dict[str, list[str]]:
    """Returns, per indexed module, the other names under which the model holds its weight."""
    parameters = dict(model.named_parameters())
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = {port.module: names[id(parameters[port.parameter])] for port in index.ports}
    return {module: others[1:] for module, others in found.items() if len(others) > 1}


def some_of_all(index: ComponentIndex) -> Selection:
    """Returns a fifth of the components, some of every port, but only half of those that are all that a port has."""
    keep = sample_rows(index).all(dim=0)
    for number, (port, first, stop) in enumerate(index.spans()):
        keep[first:stop] |= port.count == 1 and number % 2 == 1
    return index.select(torch.nonzero(~keep).flatten().tolist())


def sample_rows(index: ComponentIndex) -> Tensor:
    """Returns two keep-vectors, (2, components): a tenth of the components closed, and some of every port in one."""
    keep = np.stack([np.random.Philox(key=[2718, row]).random_raw(len(index)) >= 2**64 // 10 for row in range(2)])
    for number, (port, first, stop) in enumerate(index.spans()):
        keep[number % 2, first + number % port.count] = False
        keep[1 - number % 2, first:stop] |= port.count == 1  # else every branch is closed, and nothing left
    return torch.from_numpy(keep)
