"""What `Attributions.nearest` costs on a large store: `python -m experiments.bench.nearest [--examples N] ...`.

Writes a store of that size with planted clusters (weights and standard errors, 8 bytes per pair), then asks: the first
question makes the projection, later ones use it, and each is compared with the exhaustive answer.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

import coar
from ablate import ComponentIndex, Port
from coar.attributions.similarity import DIMENSIONS
from stores import AttributionStore

BLOCK = 256
LAYERS = 16


def write_store(path: Path, examples: int, components: int, cluster: int, seed: int = 0) -> None:
    """Writes attributions of examples in clusters: heavy-tailed centres, and noise of the same length around them.

    Cosines inside a cluster are about one half, and between clusters about zero.
    """
    sizes = [components // LAYERS + (layer < components % LAYERS) for layer in range(LAYERS)]
    ports = [
        Port("linear_neuron", i, f"layer{i}", f"layer{i}.weight", "out", 0, size, 1, 1) for i, size in enumerate(sizes)
    ]
    index = ComponentIndex(ports)
    store = AttributionStore.create(
        path,
        header={
            "identity": {"method": "synthetic", "of": {"index": index.hash}},
            "index": index.to_json(),
            "loadable": False,
        },
        components=index.columns,
        examples={
            "id": np.array([f"e{i}" for i in range(examples)], dtype=object),
            "label": np.arange(examples) // cluster,
            "group": np.array([f"g{i // cluster}" for i in range(examples)], dtype=object),
        },
        block_examples=BLOCK,
    )
    for block in store.missing_blocks():
        span = store.span(block)
        weights = np.stack([_weights(i, cluster, components, seed) for i in range(span.start, span.stop)])
        column = np.ones(len(weights), dtype=np.float32)
        values = {"weights": weights, "stderr": np.full_like(weights, 0.1), "bias": column}
        store.write_block(block, values | {f"quality/{name}": column for name in store.quality_names})


def _weights(example: int, cluster: int, components: int, seed: int) -> npt.NDArray[np.float32]:
    centre, noise = (
        np.random.default_rng(key).standard_normal(components, dtype=np.float32)
        for key in ((seed, 0, example // cluster), (seed, 1, example))
    )
    return np.asarray(centre * np.abs(centre) + noise * np.abs(noise), dtype=np.float32)


def seconds(call: Callable[[], object]) -> float:
    """Returns how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def resident() -> float:
    """Returns the largest memory this process has had so far, in MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Prints the measurements as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--components", type=int, default=5_000)
    parser.add_argument("--cluster", type=int, default=10, help="examples of one kind: the more, the harder")
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--folder", default=None, help="where the store is written, and deleted again; default: temp")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        place = Path(folder) / "attributions.zarr"
        written = seconds(lambda: write_store(place, arguments.examples, arguments.components, arguments.cluster))
        rows = measure(coar.open_attributions(place), arguments.k, arguments.questions)
    gib = 4 * arguments.examples * arguments.components / 2**30
    print(f"{arguments.examples:,} examples x {arguments.components:,} components, {gib:.2f} GiB of weights")
    print(f"(and as much of standard errors, written in {written:.0f} s); {DIMENSIONS} dimensions, k = {arguments.k},")
    print(f"clusters of {arguments.cluster}\n")
    print("| what | value |\n| --- | --- |")
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))


def measure(attributions: coar.Attributions, k: int, questions: int) -> dict[str, str]:
    """Returns what the first and later questions cost, and how many of the true neighbours they find."""
    asked = np.random.default_rng(0).choice(len(attributions), questions, replace=False).tolist()
    before = resident()
    first = seconds(lambda: attributions.nearest(asked[0], k, exact=False))
    projecting = resident()
    later = [seconds(lambda i=i: attributions.nearest(i, k, exact=False)) for i in asked]  # type: ignore[misc]
    asking = resident()
    exhaustive = [seconds(lambda i=i: attributions.nearest(i, k, exact=True)) for i in asked[:3]]  # type: ignore[misc]
    found = 0
    for i in asked:
        true = set(attributions.nearest(i, k, exact=True)["example"])
        found += len(true & set(attributions.nearest(i, k, exact=False)["example"]))
    return {
        "first question (makes the projection), s": f"{first:.2f}",
        "later questions, median, s": f"{statistics.median(later):.3f}",
        "exhaustive question, median, s": f"{statistics.median(exhaustive):.2f}",
        f"true neighbours found, of {k * questions}": str(found),
        "projection, MiB": f"{4 * len(attributions) * DIMENSIONS / 2**20:.0f}",
        "peak resident memory before, MiB": f"{before:.0f}",
        "... after the projection, MiB": f"{projecting:.0f}",
        "... after the questions, MiB": f"{asking:.0f}",
    }


if __name__ == "__main__":
    main()
