"""The loops: keep-vectors times examples through a machine, by weight gating or activation gating, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ablate.arguments import check_labels, check_logits, measured
from ablate.machine import Machine
from ablate.memory import MemoryPlan, fitting_batch, per_example
from ablate.outputs import Output
from ablate.placing import Placed
from ablate.ticks import BACKWARD, ran
from ablate.timing import faster, smallest_good_batch

AUTO_BATCHES = (64, 128, 256, 512, 1024)


@dataclass
class Runner:
    """Runs a machine on placed examples.

    Attributes:
      machine: The model under gates.
      output: What is measured of the logits.
      closed: The gate of an ablated component.
      batch_size, gradient_batch_size: Examples per forward, without and with gradients.
    """

    machine: Machine
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
        return torch.float64 if self.machine.dtype == torch.float64 else torch.float32

    def rows_by_weights(self, rows: Tensor, placed: Placed, result: Tensor, first: int) -> None:
        """Fills `result` (rows, examples): the weights are set once per row, then the forward is the plain one."""
        for r, row in enumerate(rows):
            if row.dtype == torch.bool and self.closed == 0.0:
                self.machine.weights.set_keep(row)
            else:
                self.machine.weights.set_gates(self.as_gates(row))
            for start, inputs, targets in placed.batches(self.batch_size):
                logits = self.machine.plain(self.padded(inputs, self.batch_size))[: len(targets)]
                result[r, start : start + len(targets)] = self.measure(logits, targets, first + start)

    def rows_by_gates(self, rows: Tensor, placed: Placed, result: Tensor, first: int, total: int) -> None:
        """Fills `result` (rows, examples): several rows per forward where all examples together leave room for them."""
        stack = max(1, self.batch_size // total)
        layout = placed.layout
        with self.machine.active():
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
        with self.machine.active(), torch.set_grad_enabled(slopes is not None):
            for start, inputs, targets in placed.batches(size):
                span = slice(start, start + len(targets))
                own = gates[span].to(inputs.device, self.dtype, copy=True).requires_grad_(slopes is not None)
                attention = None if slopes is None else self._attention_for_gradients(inputs, own)
                logits = self._gated(inputs, own, size, attention)[: len(targets)]
                values = self.measure(logits, targets, first + start)
                if slopes is not None:
                    slopes[span] = _slopes(values, own)
                    ran(BACKWARD * len(targets))
                result[span] = values.detach()

    def _gated(self, inputs: Tensor, gates: Tensor, size: int, attention: str | None = None) -> Tensor:
        inputs = self.padded(inputs, size)
        missing = len(inputs) - len(gates)
        if missing:
            gates = torch.cat([gates, gates.new_ones((missing, gates.shape[1]))])
        return self.machine.gated(inputs, gates, attention)

    def padded(self, inputs: Tensor, size: int) -> Tensor:
        """Returns the inputs filled up to a whole batch where the model is compiled for that shape alone."""
        missing = size - len(inputs)
        if not self.machine.compiled or missing <= 0:
            return inputs
        return torch.cat([inputs, inputs[-1:].expand(missing, *inputs.shape[1:])])

    def as_gates(self, rows: Tensor) -> Tensor:
        """Returns real gates on the device: those given, or what the ablation makes of keep-vectors."""
        rows = rows.to(self.machine.device)
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
        machine = self.machine
        matters = machine.device.type == "cpu" and machine.dtype == torch.bfloat16 and machine.report.attention
        if machine.speed.attention is not None or not matters:
            return machine.speed.attention
        if self._gradient_attention is None:

            def step(backend: str) -> None:
                logits = machine.gated(inputs, gates, backend)
                torch.autograd.grad(logits.float().sum(), gates)

            with torch.compiler.set_stance("force_eager"):  # the backends differ alike, and each would compile anew
                self._gradient_attention = faster({"flash": lambda: step("flash"), "math": lambda: step("math")})
        return self._gradient_attention

    def forward_memory(self, inputs: Tensor, targets: Tensor) -> tuple[int, int]:
        """Returns (fixed, per example) bytes of a plain forward, measured on a few repeats of these examples."""

        def run(count: int) -> None:
            few, labels = _repeated(inputs, count), _repeated(targets, count)
            with torch.no_grad():
                self.output(self.machine.plain(few).to(self.dtype), labels)

        return per_example(run)

    def gradient_memory(self, inputs: Tensor, targets: Tensor) -> tuple[int, int]:
        """Returns (fixed, per example) bytes of a forward and backward for gate gradients."""

        def run(count: int) -> None:
            few, labels = _repeated(inputs, count), _repeated(targets, count)
            gates = torch.ones((count, len(self.machine.index)), dtype=self.dtype, device=few.device)
            with self.machine.active(), torch.enable_grad():
                logits = self.machine.gated(few, gates.requires_grad_(), self.machine.speed.attention)
                _slopes(self.output(logits.to(self.dtype), labels), gates)

        return per_example(run)

    def plan(self, inputs: Tensor, targets: Tensor) -> MemoryPlan:
        """Returns how much memory this machine takes, measured on a few repeats of these examples."""
        forward = self.forward_memory(inputs, targets)
        gradient = (0, 0) if self.machine.activation.problems else self.gradient_memory(inputs, targets)
        each = inputs[:1].numel() * inputs.element_size()
        return MemoryPlan(self.machine.bytes, *forward, *gradient, each, self.batch_size, self.gradient_batch_size)

    def fit(self, budget: int | None, inputs: Tensor, targets: Tensor, measure_batch: bool) -> None:
        """Chooses batches: by measuring if asked, and never more than fit into a budget in bytes."""
        if budget is None and not measure_batch:
            return
        plan = self.plan(inputs, targets)
        if measure_batch:
            room = budget if budget is not None else _free_memory(self.machine.device)
            fits = [b for b in AUTO_BATCHES if plan.model + plan.forward_fixed + b * plan.forward_each <= room // 2]

            def run(size: int) -> None:
                with torch.no_grad():
                    self.machine.plain(_repeated(inputs, size))

            self.batch_size = smallest_good_batch(fits or [1], run, self.machine.device)
            self.gradient_batch_size = self.batch_size
        if budget is not None:
            # half of what the model leaves is for activations, so that inputs need not trickle in batch by batch
            half = plan.model + (budget - plan.model) // 2
            self.batch_size = fitting_batch(half, self.batch_size, plan.model, *plan.forward)
            if plan.gradient_each:
                self.gradient_batch_size = fitting_batch(half, self.gradient_batch_size, plan.model, *plan.gradient)
            self.data_room = budget - half


def _slopes(values: Tensor, gates: Tensor) -> Tensor:
    """Returns the gradient of each value with respect to its gates: zero for gates that reach no output."""
    if not values.requires_grad:
        return torch.zeros_like(gates)
    return torch.autograd.grad(values.sum(), gates, materialize_grads=True)[0]


def _repeated(values: Tensor, count: int) -> Tensor:
    return values[torch.arange(count, device=values.device) % len(values)]


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 8 * 2**30
