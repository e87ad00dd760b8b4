"""open_clip: the visual tower, or a zero-shot classifier whose classes are texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.errors import LoadError, UnknownNameError
from ablate.loading.networks.checkpoints import load_checkpoint
from ablate.loading.packages import one_line, require, untouched_logging
from ablate.loading.transforms import Transform


class ZeroShotClassifier(nn.Module):
    """CLIP's visual tower, and one fixed text embedding per class: logits are scaled cosine similarities.

    Args:
      visual: Images to embeddings (batch, width).
      text: Embeddings of the classes, (classes, width), of length 1.
      scale: The factor of the cosines, `exp(logit_scale)` of the CLIP model. (SigLIP's constant bias is left out: it
        moves all logits alike.)
    """

    text: Tensor
    scale: Tensor

    def __init__(self, visual: nn.Module, text: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("text", text.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits, (batch, classes)."""
        features = self.visual(images)
        if isinstance(features, tuple):  # CoCa: embedding and tokens
            features = features[0]
        return self.scale * F.normalize(features, dim=-1) @ self.text.T


def clip_model(
    name: str,
    checkpoint: str | None,
    texts: Sequence[Sequence[str]],
    tokenizer: str | None,
    key: str | None = None,
) -> tuple[nn.Module, Transform]:
    """Returns the visual tower (no texts) or a ZeroShotClassifier, and how its images are prepared.

    Args:
      name: One of `open_clip.list_models()`.
      checkpoint: The weights of the whole CLIP model, both towers; None: random.
      texts: For each class, its texts; the class is the mean of their embeddings.
      tokenizer: A local folder with the tokenizer, for a model whose own does not ship with open_clip.
      key: Which weights of a checkpoint that holds several.
    """
    open_clip = require("open_clip", "clip")
    names = open_clip.list_models()
    if name not in names:
        raise UnknownNameError("open_clip model", name, names, "open_clip.list_models() lists all.")
    config = open_clip.get_model_config(name).get("text_cfg", {})
    if "hf_model_name" in config:
        raise LoadError(
            f"open_clip's {name} takes the configuration of its text tower, {config['hf_model_name']}, from the "
            "network, and nothing is downloaded here. Choose a model whose text tower is open_clip's own."
        )
    with untouched_logging():
        try:
            model, _, transform = open_clip.create_model_and_transforms(name, pretrained=None, pretrained_text=False)
        except Exception as error:  # e.g. a timm without that tower
            raise LoadError(f"open_clip cannot make {name}: {type(error).__name__}: {one_line(error)}.") from error
        if checkpoint is not None:
            load_checkpoint(model, checkpoint, key)
        model.eval()
        if not texts:
            return model.visual, transform
        embeddings = _embed(model, texts, _tokenizer(open_clip, name, config, tokenizer))
    return ZeroShotClassifier(model.visual, embeddings, model.logit_scale.exp()), transform


def _embed(model: Any, texts: Sequence[Sequence[str]], tokenizer: Any) -> Tensor:
    """Returns one embedding per class, of length 1: the mean over its texts, as open_clip's own classifier has it."""
    with torch.no_grad():
        means = [model.encode_text(tokenizer(list(own)), normalize=True).mean(dim=0) for own in texts]
        return F.normalize(torch.stack(means), dim=-1)


def _tokenizer(open_clip: Any, name: str, config: dict[str, Any], folder: str | None) -> Any:
    context = config.get("context_length", 77)
    if folder is not None:
        if not Path(folder).is_dir():
            raise LoadError(f"No folder at {folder}. tokenizer names a local folder with the files of the tokenizer.")
        require("transformers", "text")
        try:
            return open_clip.tokenizer.HFTokenizer(
                os.fspath(Path(folder).absolute()),
                context_length=context,
                tokenizer_mode=config.get("tokenizer_mode"),
                **config.get("tokenizer_kwargs", {}),
            )
        except Exception as error:  # whatever transformers raises
            raise LoadError(f"{folder} holds no tokenizer: {type(error).__name__}: {one_line(error)}.") from error
    if "hf_tokenizer_name" in config or "siglip" in name.lower():
        needed = config.get("hf_tokenizer_name", "that of SigLIP")
        raise LoadError(
            f"open_clip's {name} needs a tokenizer that does not ship with it, {needed}, and nothing is downloaded "
            "here. Give tokenizer = a local folder with its files."
        )
    return open_clip.get_tokenizer(name)
