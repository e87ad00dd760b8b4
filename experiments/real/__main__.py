"""How many photos of a folder the packaged networks get right: `python -m experiments.real --photos FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ablate import LoadError, load_model
from ablate.loading import PackagedModel
from experiments.real.photos import WHERE_FROM, find_photos, photo_examples, right_ones, split

NETWORKS = ("mobilenet_v2", "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


def main() -> None:
    """Prints each network's accuracy, over all photos and over both halves; what is not installed is named."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=WHERE_FROM)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    asked = parser.parse_args()
    photos = find_photos(asked.photos)
    halves = {name: {photo.id for photo in part} for name, part in split(photos).items()}
    for name in asked.networks:
        try:
            model, transform = load_model(PackagedModel(source="packaged", name=name))
        except LoadError as error:
            print(error)
            continue
        examples = photo_examples(photos, transform)
        right = {examples.ids[i] for i in right_ones(model, examples)}
        parts = ", ".join(f"{half} {len(right & ids)} of {len(ids)}" for half, ids in halves.items())
        print(f"{name}: {len(right)} of {len(photos)} right, {100 * len(right) / len(photos):.1f} % ({parts})")


if __name__ == "__main__":
    main()
