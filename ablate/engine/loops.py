"""The loops: keep-vectors times examples through a machine, by weight gating or activation gating, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ablate.engine.checks import check_labels, check_logits, measured
from ablate.engine.gated_model import GatedModel
from ablate.engine.memory import MemoryPlan, fitting_batch, per_example
from ablate.engine.placing import Placed
from ablate.engine.ticks import BACKWARD, ran
from ablate.engine.timing import faster, smallest_good_batch
from ablate.errors import NoGradientError
from ablate.outputs import Output

AUTO_BATCHES = (64, 128, 256, 512, 1024)
CUT_OFF = "the model or the output goes on without autograd (torch.no_grad(), .detach(), an argmax, numpy)"


@dataclass
class Loops:
    """Runs a machine on placed examples.

    Attributes:
      gated_model: The model under gates.
      output: What is measured of the logits.
      closed: The gate of an ablated component.
      batch_size, gradient_batch_size: Examples per forward, without and with gradients.
    """

    gated_model: GatedModel
    output: Output
    closed: float
    batch_size: int
    gradient_batch_size: int
    data_room: int | None = None  # bytes left for inputs under a memory budget
    checked: set[int] = field(default_factory=set)  # first examples of batches whose labels were looked at
    _gradient_attention: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of outputs and gradients."""
        return torch.float64 if self.gated_model.dtype == torch.float64 else torch.float32

    @property
    def _modules(self) -> Iterable[str]:
        return dict.fromkeys(port.module for port in self.gated_model.index.ports)

    def rows_by_weights(self, rows: Tensor, placed: Placed, result: Tensor, first: int) -> None:
        """Fills `result` (rows, examples): the weights are set once per row, then the forward is the plain one."""
        for r, row in enumerate(rows):
            if row.dtype == torch.bool and self.closed == 0.0:
                self.gated_model.weights.set_keep(row)
            else:
                self.gated_model.weights.set_gates(self.as_gates(row))
            for start, inputs, targets in placed.batches(self.batch_size):
                logits = self.gated_model.plain(self.padded(inputs, self.batch_size))[: len(targets)]
                result[r, start : start + len(targets)] = self.measure(logits, targets, first + start)

    def rows_by_gates(self, rows: Tensor, placed: Placed, result: Tensor, first: int, total: int) -> None:
        """Fills `result` (rows, examples): several rows per forward where all examples together leave room for them."""
        stack = max(1, self.batch_size // total)
        layout = placed.layout
        with self.gated_model.active():
            for r in range(0, len(rows), stack):
                chosen = rows[r : r + stack]
                short = stack - len(chosen)
                if short:  # the last rows run in as large a forward as all others: equal shapes, equal rounding
                    chosen = torch.cat([chosen, chosen[-1:].expand(short, -1)])
                gates = self.as_gates(chosen)
                for start, inputs, targets in placed.batches(self.batch_size):
                    each = len(targets)
                    if stack > 1:
                        inputs = inputs.repeat(stack, *[1] * (inputs.ndim - 1))
                        inputs = inputs.contiguous(memory_format=layout) if inputs.ndim == 4 else inputs
                    own = gates.repeat_interleave(each, dim=0)
                    logits = self._gated(inputs, own, self.batch_size)[: stack * each]
                    labels = targets.repeat(stack, *[1] * (targets.ndim - 1))
                    values = self.measure(logits, labels, first + start).view(stack, each)
                    result[r : r + stack, start : start + each] = values[: stack - short]

    def per_example(self, gates: Tensor, placed: Placed, result: Tensor, slopes: Tensor | None, first: int) -> None:
        """Fills `result` (examples,) and `slopes` (examples, components): every example under its own gates."""
        size = self.batch_size if slopes is None else self.gradient_batch_size
        self.gated_model.look(next(placed.batches(2))[1])
        if self.gated_model.activation.alone:  # a backward may run parts of the forward again, under the gates set last
            size = 1
        if slopes is not None:
            self.gated_model.activation.require_gradients()
        with self.gated_model.active(), torch.set_grad_enabled(slopes is not None):
            for start, inputs, targets in placed.batches(size):
                span = slice(start, start + len(targets))
                own = gates[span].to(inputs.device, self.dtype, copy=True).requires_grad_(slopes is not None)
                attention = None if slopes is None else self._attention_for_gradients(inputs, own)
                parts = self.gated_model.activation.split(own)
                logits = self._gated_by(inputs, parts, size, attention)[: len(targets)]
                values = self.measure(logits, targets, first + start)
                if slopes is not None:
                    found = gate_slopes(values, parts, self._modules)
                    self._require_unread([i for i, one in enumerate(found) if one is None], inputs, targets, parts)
                    slopes[span] = _together(found, parts)
                    ran(BACKWARD * len(targets))
                result[span] = values.detach()

    def _gated(self, inputs: Tensor, gates: Tensor, size: int) -> Tensor:
        return self._gated_by(inputs, self.gated_model.activation.split(gates), size)

    def _gated_by(self, inputs: Tensor, parts: Sequence[Tensor], size: int, attention: str | None = None) -> Tensor:
        inputs = self.padded(inputs, size)
        missing = len(inputs) - len(parts[0])
        if missing:
            parts = [torch.cat([part, part.new_ones((missing, part.shape[1]))]) for part in parts]
        return self.gated_model.gated_by(inputs, parts, attention)

    def _require_unread(self, blind: Sequence[int], inputs: Tensor, targets: Tensor, parts: Sequence[Tensor]) -> None:
        """Raises NoGradientError if gates that no gradient reaches, by their position, change outputs all the same."""
        if not blind:
            return
        parts = [part.detach() for part in parts]

        def outputs(moved: Sequence[int]) -> Tensor:
            now = [0.5 - part if i in moved else part for i, part in enumerate(parts)]
            logits = self._gated_by(inputs, now, len(inputs))[: len(targets)]
            return self.output(logits.to(self.dtype), targets)

        with torch.no_grad():
            before = outputs([])
            room = 1e-6 * before.abs().max()

            def matter(moved: Sequence[int]) -> bool:
                return bool(((outputs(moved) - before).abs() > room).any())

            if not matter(blind):
                return
            ports = self.gated_model.index.ports
            names = [ports[i].module for i in blind if matter([i])] or [ports[i].module for i in blind]
        raise NoGradientError(dict.fromkeys(names), CUT_OFF)

    def padded(self, inputs: Tensor, size: int) -> Tensor:
        """Returns the inputs filled up to a whole batch where the model is compiled for that shape alone."""
        missing = size - len(inputs)
        if not self.gated_model.compiled or missing <= 0:
            return inputs
        return torch.cat([inputs, inputs[-1:].expand(missing, *inputs.shape[1:])])

    def as_gates(self, rows: Tensor) -> Tensor:
        """Returns real gates on the device: those given, or what the ablation makes of keep-vectors."""
        rows = rows.to(self.gated_model.device)
        if rows.dtype != torch.bool:
            return rows.to(self.dtype)
        return torch.where(rows, torch.ones((), dtype=self.dtype, device=rows.device), self.closed)

    def measure(self, logits: Tensor, targets: Tensor, first: int) -> Tensor:
        """Returns the outputs (batch,) of a batch; looks at its labels the first time, which waits for the device."""
        if first not in self.checked:
            check_logits(logits, len(targets), self.output)
            check_labels(logits, targets, first, self.output)
            self.checked.add(first)
        ran(len(targets))
        return measured(self.output, logits.to(self.dtype), targets)

    def _attention_for_gradients(self, inputs: Tensor, gates: Tensor) -> str | None:
        """Returns the attention backend that is faster with gradients, by timing one batch where it is known to matter.

        Torch's own choice on the CPU is flash attention, whose backward in bfloat16 can be several times slower.
        """
        gated_model = self.gated_model
        matters = (
            gated_model.device.type == "cpu" and gated_model.dtype == torch.bfloat16 and gated_model.report.attention
        )
        if gated_model.speed.attention is not None or not matters:
            return gated_model.speed.attention
        if self._gradient_attention is None:

            def step(backend: str) -> None:
                logits = gated_model.gated(inputs, gates, backend)
                torch.autograd.grad(logits.float().sum(), gates)

            with torch.compiler.set_stance("force_eager"):  # the backends differ alike, and each would compile anew
                self._gradient_attention = faster({"flash": lambda: step("flash"), "math": lambda: step("math")})
        return self._gradient_attention

    def forward_memory(self, inputs: Tensor, targets: Tensor) -> tuple[int, int]:
        """Returns (fixed, per example) bytes of a plain forward, measured on a few repeats of these examples."""

        def run(count: int) -> None:
            few, labels = _repeated(inputs, count), _repeated(targets, count)
            with torch.no_grad():
                self.output(self.gated_model.plain(few).to(self.dtype), labels)

        return per_example(run)

    def gradient_memory(self, inputs: Tensor, targets: Tensor) -> tuple[int, int]:
        """Returns (fixed, per example) bytes of a forward and backward for gate gradients."""

        def run(count: int) -> None:
            few, labels = _repeated(inputs, count), _repeated(targets, count)
            gates = torch.ones((count, len(self.gated_model.index)), dtype=self.dtype, device=few.device)
            with self.gated_model.active(), torch.enable_grad():
                parts = self.gated_model.activation.split(gates.requires_grad_())
                logits = self.gated_model.gated_by(few, parts, self.gated_model.speed.attention)
                gate_slopes(self.output(logits.to(self.dtype), labels), parts, self._modules)

        return per_example(run)

    def plan(self, inputs: Tensor, targets: Tensor) -> MemoryPlan:
        """Returns how much memory this machine takes, measured on a few repeats of these examples."""
        forward = self.forward_memory(inputs, targets)
        activation = self.gated_model.activation
        without = activation.problems or activation.no_gradient
        gradient = (0, 0) if without else self.gradient_memory(inputs, targets)
        each = inputs[:1].numel() * inputs.element_size()
        return MemoryPlan(self.gated_model.bytes, *forward, *gradient, each, self.batch_size, self.gradient_batch_size)

    def fit(self, budget: int | None, inputs: Tensor, targets: Tensor, measure_batch: bool) -> None:
        """Chooses batches: by measuring if asked, and never more than fit into a budget in bytes."""
        if budget is None and not measure_batch:
            return
        plan = self.plan(inputs, targets)
        if measure_batch:
            room = budget if budget is not None else _free_memory(self.gated_model.device)
            fits = [b for b in AUTO_BATCHES if plan.model + plan.forward_fixed + b * plan.forward_each <= room // 2]

            def run(size: int) -> None:
                with torch.no_grad():
                    self.gated_model.plain(_repeated(inputs, size))

            self.batch_size = smallest_good_batch(fits or [1], run, self.gated_model.device)
            self.gradient_batch_size = self.batch_size
        if budget is not None:
            # half of what the model leaves is for activations, so that inputs need not trickle in batch by batch
            half = plan.model + (budget - plan.model) // 2
            self.batch_size = fitting_batch(half, self.batch_size, plan.model, *plan.forward)
            if plan.gradient_each:
                self.gradient_batch_size = fitting_batch(half, self.gradient_batch_size, plan.model, *plan.gradient)
            self.data_room = budget - half


def gate_slopes(values: Tensor, wanted: Sequence[Tensor], modules: Iterable[str]) -> list[Tensor | None]:
    """Returns the gradient of the sum of values with respect to some tensors, None where autograd has no way there.

    Raises NoGradientError, which names the modules, where autograd fails.
    """
    if not values.requires_grad:
        return [None] * len(wanted)
    try:
        return list(torch.autograd.grad(values.sum(), wanted, allow_unused=True))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of autograd or a function's own backward
        reason = (str(error).splitlines() or ["no message"])[0].rstrip(".")
        raise NoGradientError(modules, f"autograd fails with {type(error).__name__}: {reason}") from error


def _together(slopes: Sequence[Tensor | None], parts: Sequence[Tensor]) -> Tensor:
    """Returns slopes by port as (examples, components): zero for gates that reach no output."""
    return torch.cat([torch.zeros_like(p) if s is None else s for s, p in zip(slopes, parts, strict=True)], dim=1)


def _repeated(values: Tensor, count: int) -> Tensor:
    return values[torch.arange(count, device=values.device) % len(values)]


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 8 * 2**30
