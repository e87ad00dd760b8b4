"""Language models of transformers, and examples of text files: a target per token, the next one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ablate.errors import LoadError, UnknownNameError, nearest
from ablate.loading.networks.checkpoints import does_not_fit, load_checkpoint, not_plain_tensors
from ablate.loading.packages import one_line, require
from ablate.logits import logits_of


class LanguageModel(nn.Module):
    """A causal language model of transformers as a plain module: tokens (batch, tokens) to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        config: Any = self.model.config
        return int(config.get_text_config().vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits of the next token, (batch, tokens, vocabulary)."""
        return logits_of(self.model(input_ids=tokens, use_cache=False))


def language_model_from_folder(path: Path, checkpoint: str | None, weights_key: str | None = None) -> LanguageModel:
    """Returns the model in a local folder (config.json, and .safetensors or a weights-only .bin), in float32.

    Raises:
      LoadError: Something is missing, does not fit, or asks for code.
    """
    transformers = require("transformers", "text")
    if not (path / "config.json").is_file():
        raise LoadError(f"No config.json in {path}. Give the folder that the model's save_pretrained(path) wrote.")
    with _quiet(transformers):
        if checkpoint is not None:
            config = _made(
                path,
                lambda: transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False),
            )
            return _with_weights(_from_config(transformers, config, str(path)), checkpoint, weights_key)
        safe = any(path.glob("*.safetensors"))
        model, report = _made(
            path,
            lambda: transformers.AutoModelForCausalLM.from_pretrained(
                path,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True if safe else None,
                weights_only=True,
                ignore_mismatched_sizes=True,  # listed below, with the missing ones
                output_loading_info=True,
                attn_implementation="sdpa",
                dtype=torch.float32,
            ),
        )
    problems = [f"missing: {name}" for name in sorted(report["missing_keys"])]
    problems += [f"unexpected: {name}" for name in sorted(report["unexpected_keys"])]
    problems += [
        f"{name}: shape {tuple(found)}, expected {tuple(expected)}"
        for name, found, expected in sorted(report["mismatched_keys"])
    ]
    if problems:
        raise does_not_fit(str(path), type(model).__name__, problems)
    return LanguageModel(model)


def language_model_from_config(
    config: Mapping[str, Any], checkpoint: str | None, weights_key: str | None = None
) -> LanguageModel:
    """Returns a model of this configuration with a checkpoint's weights, or random ones.

    Raises:
      UnknownNameError: No causal language model of that `model_type`.
      LoadError: A key that the model's configuration does not have, or a value that does not fit.
    """
    transformers = require("transformers", "text")
    values = dict(config)
    model_type = str(values.pop("model_type", ""))
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if model_type not in names:
        raise UnknownNameError("causal language model of transformers", model_type, names)
    with _quiet(transformers):
        defaults = transformers.AutoConfig.for_model(model_type)
        known = {*defaults.to_dict(), *defaults.attribute_map, *type(defaults).attribute_map.values()}
        for key in values:
            if key not in known:  # transformers would keep it, and do nothing with it
                close = nearest(key, known)
                hint = f" Did you mean {close[0]!r}?" if close else " Remove it."
                raise LoadError(f"config: {model_type} has no {key!r}.{hint}")
        made = _made("config", lambda: transformers.AutoConfig.for_model(model_type, **values))
        return _with_weights(_from_config(transformers, made, "config"), checkpoint, weights_key)


def _from_config(transformers: Any, config: Any, where: str) -> LanguageModel:
    return LanguageModel(
        _made(
            where,
            lambda: transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", trust_remote_code=False, dtype=torch.float32
            ),
        )
    )


def _with_weights(model: LanguageModel, checkpoint: str | None, weights_key: str | None) -> LanguageModel:
    if checkpoint is not None:
        load_checkpoint(model.model, checkpoint, weights_key)
    return model


def _made(where: str | Path, make: Any) -> Any:
    try:
        return make()
    except Exception as error:  # transformers raises many types
        if "GLOBAL" in str(error) or type(error).__name__ in ("UnpicklingError", "SafetensorError"):
            raise not_plain_tensors(Path(where), error) from error
        raise LoadError(
            f"transformers cannot make a causal language model of {where}: {type(error).__name__}: {one_line(error)}."
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keeps transformers' reports and progress bars away: what matters of them, our errors say."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
