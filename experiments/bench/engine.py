"""What a keep-vector costs: `python -m experiments.bench.engine [--model digits|resnet18]`.

Three ways, in turn, several rounds; the median time per (keep-vector, example) is quoted as a ratio to the plain
forward of the unablated model in the same run:

- plain: the model as it is, same batches, no keep-vectors;
- engine: `Engine.outputs`, weights gated in place;
- copies: one deep copy of the model per keep-vector with the weights zeroed, as `reference_outputs` does it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ablate import ComponentIndex, Engine, Examples, KeepPlan, reference_outputs
from ablate.digits import digits_model, digits_split
from ablate.loading import TorchvisionModel, load_model

BATCH = 128


def workload(name: str, examples: int) -> tuple[nn.Module, Examples]:
    """Returns a model and its examples: the digits network, or torchvision's resnet18 at 64 px on random images."""
    if name == "digits":
        return digits_model(0, "runs/bench/digits.safetensors"), digits_split("test").take(range(examples))
    model, _ = load_model(TorchvisionModel(source="torchvision", name="resnet18"))
    generator = torch.Generator().manual_seed(0)
    return model, Examples(torch.randn(examples, 3, 64, 64, generator=generator), torch.arange(examples) % 1000)


def plain(model: nn.Module, inputs: Tensor, rows: int) -> None:
    """Runs the unablated model `rows` times over all inputs."""
    with torch.no_grad():
        for _ in range(rows):
            for start in range(0, len(inputs), BATCH):
                model(inputs[start : start + BATCH])


def main() -> None:
    """Prints one line per way: microseconds per keep-vector and example, and the ratio to plain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["digits", "resnet18"], default="digits")
    parser.add_argument("--examples", type=int, default=BATCH, help="one batch, the same for all three ways")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    model, examples = workload(arguments.model, arguments.examples)
    index = ComponentIndex.from_model(model)
    keep = KeepPlan(len(index), arguments.rows, 0.05).take(0, arguments.rows)
    engine = Engine(model, index, batch_size=BATCH)
    inputs, targets = examples.inputs(), examples.targets
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(model, inputs, arguments.rows),
        "engine": lambda: engine.outputs(keep, examples),
        "copies": lambda: reference_outputs(model, index, keep, inputs, targets),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    print(
        f"{arguments.model}: {len(index)} components, {arguments.rows} keep-vectors x {arguments.examples} examples, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {arguments.rounds}"
    )
    base = statistics.median(times["plain"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        each = 1e6 * median / arguments.rows / arguments.examples
        print(f"{name:8} {each:9.1f} us per keep-vector and example   {median / base:5.2f} x plain")


if __name__ == "__main__":
    main()
