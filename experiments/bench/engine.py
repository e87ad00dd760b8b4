"""What a keep-vector costs: `python -m experiments.bench.engine [--model NAME] [--device cuda] [--precision bfloat16]`.

Every way runs in turn, several rounds, in one process; the median time per (keep-vector, example) is quoted as a ratio
to the best plain forward of the unablated model in the same precision. docs/benchmarks.md says how to read the table
that this writes to docs/benchmarks/.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from ablate import ComponentIndex, Engine, Examples, KeepPlan, Speed
from ablate.digits import digits_model, digits_split
from ablate.loading import load_model
from ablate.loading.sources import TimmModel, TorchvisionModel
from experiments.bench.incumbent import published_loop

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FEW = 40  # examples of the "few examples, many keep-vectors" rows
FOLDER = Path("docs/benchmarks")


@dataclass
class Workload:
    """A model, examples, kinds of components and a sensible batch."""

    model: nn.Module
    examples: Examples
    kinds: list[str]
    pixels: int


@dataclass
class Way:
    """Something to time: a call, and for how many (keep-vector, example) pairs it counts."""

    call: Callable[[], object]
    pairs: int


def workload(name: str, examples: int) -> Workload:
    """Returns a benchmark's model and examples; random weights and images but for the digits network."""
    if name == "digits":
        data = digits_split("test").take([i % 400 for i in range(min(examples, 400))])
        return Workload(digits_model(0, "runs/bench/digits.safetensors"), data, ["conv_filter"], 16)
    pixels = {"resnet18": 64, "vit_small": 96}.get(name, 224)
    if name.startswith("vit"):
        model, _ = load_model(TimmModel(source="timm", name=f"{name}_patch16_224", image_size=pixels))
    else:
        model, _ = load_model(TorchvisionModel(source="torchvision", name=name))
    images = torch.randn(examples, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    kinds = ["linear_neuron"] if name.startswith("vit") else ["conv_filter"]
    return Workload(model, Examples(images, torch.arange(examples) % 1000), kinds, pixels)


def plain_ways(work: Workload, engine: Engine, batch: int, compiled: bool) -> dict[str, Way]:
    """Returns the plain forwards, without any keep-vector, in the engine's precision: as it is, and made fast."""
    device, dtype = engine.device, DTYPES[engine.precision]
    inputs = work.examples.inputs().to(device, dtype)
    as_it_is = copy.deepcopy(work.model).to(device, dtype)
    engine.check(work.examples)
    if engine._gated_model is None:  # after a check there is one
        raise RuntimeError("The engine has no model of its own yet.")
    fast = copy.deepcopy(engine._gated_model.model)  # folded, laid out, cast: what the engine runs
    laid_out = inputs.contiguous(memory_format=torch.channels_last)

    def forward(model: nn.Module, images: Tensor) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for start in range(0, len(images), batch):
                    model(images[start : start + batch])

        return run

    ways = {
        "plain eager, as it is": Way(forward(as_it_is, inputs), len(inputs)),
        "plain eager, folded, channels-last": Way(forward(fast, laid_out), len(inputs)),
    }
    if compiled:
        ways["plain compiled"] = Way(forward(compiled_copy(fast), laid_out), len(inputs))
    return ways


def compiled_copy(model: nn.Module) -> nn.Module:
    """Returns a compiled copy of a model."""
    result = copy.deepcopy(model)
    result.compile(dynamic=False)
    return result


def engine_ways(
    work: Workload, index: ComponentIndex, keep: npt.NDArray[np.bool_], arguments: argparse.Namespace
) -> tuple[Engine, dict[str, Way]]:
    """Returns the engine's ways, and the engine that gates weights."""
    few = work.examples.take(range(min(FEW, len(work.examples))))
    gates = torch.from_numpy(keep[:1]).float().expand(len(work.examples), -1)
    pairs, ways = len(work.examples), dict[str, Way]()

    def engine(mode: str, compile_it: bool, batch: int = arguments.batch) -> Engine:
        return Engine(
            work.model,
            index,
            device=arguments.device,
            precision=arguments.precision,
            mode=mode,
            batch_size=batch,
            speed=Speed(compile=compile_it),
        )

    first = engine("weight", False)
    for compile_it in (False, True) if arguments.compile else (False,):
        note = ", compiled" if compile_it else ""
        by_weight = engine("weight", compile_it) if compile_it else first
        by_gates = engine("activation", compile_it)
        ways[f"weight gating{note}"] = _rows(by_weight, keep, work.examples)
        ways[f"activation gating{note}"] = _rows(by_gates, keep, work.examples)
        ways[f"gate gradient{note}"] = Way(partial(by_gates.gate_gradients, gates, work.examples), pairs)
    many = KeepPlan(len(index), 4 * len(keep), 0.05, seed=1).take(0, 4 * len(keep))
    stacked = 2 * len(few) if arguments.device == "cpu" else arguments.batch
    for compile_it in (False, True) if arguments.compile else (False,):
        note = ", compiled" if compile_it else ""
        ways[f"{len(few)} examples, weight gating{note}"] = _rows(engine("weight", compile_it, len(few)), many, few)
        by_gates = engine("activation", compile_it, stacked)
        ways[f"{len(few)} examples, activation gating{note}"] = _rows(by_gates, many, few)
    return first, ways


def _rows(engine: Engine, keep: npt.NDArray[np.bool_], examples: Examples) -> Way:
    return Way(lambda: engine.outputs(keep, examples), len(keep) * len(examples))


def incumbent_way(
    work: Workload, index: ComponentIndex, keep: npt.NDArray[np.bool_], arguments: argparse.Namespace
) -> Way:
    """Returns the published loop on the same keep-vectors and examples, in float32 and its own autocast."""
    loader = DataLoader(TensorDataset(work.examples.inputs(), work.examples.targets), arguments.batch)
    components = {port.parameter: port.count for port in index.ports}
    device = torch.device(arguments.device)
    model = work.model.float()
    return Way(
        lambda: [published_loop(model, components, row, loader, device) for row in keep],
        len(keep) * len(work.examples),
    )


def measured(ways: dict[str, Way], rounds: int, device: str) -> dict[str, float]:
    """Returns the median seconds per (keep-vector, example) of every way, run in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way.call()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append((time.perf_counter() - start) / way.pairs)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def matrix_peak(dtype: torch.dtype) -> float:
    """Returns the FLOP/s of a large matrix product on the card: what its hardware reaches in this precision."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def flops_per_example(work: Workload) -> int:
    """Returns the floating-point operations of one example's plain forward."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work.model(work.examples.inputs(0, 1))
    return int(counter.get_total_flops())


def table(times: dict[str, float], base: float, flops: int, peak: float | None) -> list[str]:
    """Returns the Markdown rows; with a matrix peak (FLOP/s), each way's share of it."""
    header = ["way", "ms per keep-vector and example", "ratio to best plain", "examples/s"]
    header += [] if peak is None else ["share of matrix peak"]
    rows = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for name, seconds in times.items():
        cells = [name, f"{1e3 * seconds:.3f}", f"{seconds / base:.2f}", f"{1 / seconds:,.0f}"]
        if peak is not None:
            passes = 2 if name.startswith("gate gradient") else 1  # forward, and backward to activations alone
            cells.append(f"{passes * flops / seconds / peak:.0%}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Prints the table and writes it to docs/benchmarks/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["digits", "resnet18", "resnet50", "vit_small", "vit_base"]
    parser.add_argument("--model", choices=names, default="digits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=list(DTYPES), default="float32")
    parser.add_argument("--batch", type=int, default=128, help="examples per forward")
    parser.add_argument("--examples", type=int, default=None, help="default: one batch")
    parser.add_argument("--rows", type=int, default=4, help="keep-vectors")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave the compiled ways out")
    parser.add_argument("--incumbent", action="store_true", help="with the published loop, always in float32")
    parser.add_argument("--output", type=Path, default=None, help="default: docs/benchmarks/engine_MODEL_DEVICE....md")
    arguments = parser.parse_args()

    work = workload(arguments.model, arguments.examples or arguments.batch)
    index = ComponentIndex.from_model(work.model, work.kinds)
    keep = KeepPlan(len(index), arguments.rows, 0.05).take(0, arguments.rows)
    flops = flops_per_example(work)
    engine, ours = engine_ways(work, index, keep, arguments)
    plain = plain_ways(work, engine, arguments.batch, arguments.compile)
    ways = {**plain, **ours}
    if arguments.precision != "float32":  # beside the base, which is of this precision
        full = Engine(work.model, index, device=arguments.device, batch_size=arguments.batch)
        ways["plain eager in float32"] = list(plain_ways(work, full, arguments.batch, False).values())[-1]
        ways["weight gating in float32"] = _rows(full, keep, work.examples)
    if arguments.incumbent:
        ways["published loop (float32)"] = incumbent_way(work, index, keep, arguments)
    times = measured(ways, arguments.rounds, arguments.device)
    base = min(times[name] for name in plain)
    peak = matrix_peak(DTYPES[arguments.precision]) if arguments.device == "cuda" else None
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    text = [
        f"# {arguments.model} at {work.pixels} px, {arguments.precision}, {where}",
        "",
        f"{len(index):,} components, {len(keep)} keep-vectors x {len(work.examples)} examples, batch "
        f"{arguments.batch}, torch {torch.__version__}, medians of {arguments.rounds} rounds.",
        "",
        *table(times, base, flops, peak),
        "",
    ]
    threads = "" if arguments.device == "cuda" else f"_{torch.get_num_threads()}threads"
    name = f"engine_{arguments.model}_{arguments.device}{threads}_{arguments.precision}.md"
    path = arguments.output or FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
