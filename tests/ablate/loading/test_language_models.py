"""Causal language models of transformers, from a folder or a configuration: their own logits, as a plain tensor."""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ablate
from ablate.loading import LanguageModel, TransformersModel

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 12}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}

pytestmark = pytest.mark.usefixtures("no_network")


def _load(**values: Any) -> LanguageModel:
    model, transform = ablate.load_model(TransformersModel(**{"source": "transformers"} | values))
    assert isinstance(model, LanguageModel)
    assert transform is None
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as save_pretrained writes it, without its progress bar."""
    model: Any = _load(config=GPT2, seed=5).model
    model.config.save_pretrained(tmp_path / "gpt2")
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}  # tied: once
    save_file(weights, tmp_path / "gpt2" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "gpt2"


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_configuration_gives_transformers_own_model(config: dict[str, Any], tokens: Tensor) -> None:
    transformers: Any = pytest.importorskip("transformers")
    model = _load(config=config, seed=3)
    torch.manual_seed(3)
    made = transformers.AutoConfig.for_model(**config)
    expected = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa").eval()
    assert ablate.model_hash(model.model) == ablate.model_hash(expected)
    assert not any(module.training for module in model.modules())
    assert model.vocabulary == 50
    with torch.no_grad():
        logits = model(tokens)
        assert type(logits) is Tensor
        assert torch.equal(logits, expected(tokens).logits)
        torch.testing.assert_close(copy.deepcopy(model)(tokens), logits)


def test_random_by_seed_and_nothing_else_changes(untouched: Callable[..., AbstractContextManager[None]]) -> None:
    import transformers

    library = transformers.utils.logging
    before = library.get_verbosity(), library.is_progress_bar_enabled(), logging.root.handlers[:]
    with untouched():
        hashes = [ablate.model_hash(_load(config=GPT2, seed=seed)) for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert (library.get_verbosity(), library.is_progress_bar_enabled(), logging.root.handlers[:]) == before


def test_a_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = _load(path=str(folder))
    assert ablate.model_hash(model) == ablate.model_hash(_load(config=GPT2, seed=5))
    assert capfd.readouterr() == ("", ""), "no reports, no progress bars"


def test_weights_of_half_precision_become_float32(folder: Path) -> None:
    weights = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert {parameter.dtype for parameter in _load(path=str(folder)).parameters()} == {torch.float32}


def test_a_folder_with_plain_tensors_of_pytorch(folder: Path) -> None:
    expected = ablate.model_hash(_load(path=str(folder)))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert ablate.model_hash(_load(path=str(folder))) == expected


def test_a_checkpoint_beside_the_configuration(folder: Path) -> None:
    expected = ablate.model_hash(_load(path=str(folder)))
    checkpoint = folder / "model.safetensors"
    checkpoint.rename(folder / "other.safetensors")
    found = _load(config=GPT2, checkpoint=str(folder / "other.safetensors"))
    assert ablate.model_hash(found) == expected
    found = _load(path=str(folder), checkpoint=str(folder / "other.safetensors"))
    assert ablate.model_hash(found) == expected
    assert found.model.get_parameter("lm_head.weight") is found.model.get_parameter("transformer.wte.weight")


def test_a_folder_that_does_not_fit_lists_every_problem(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["extra"] = torch.zeros(2)
    del weights["transformer.h.0.ln_1.bias"]
    weights["transformer.ln_f.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ablate.LoadError) as caught:
        _load(path=str(folder))
    assert str(caught.value) == (
        f"{folder} does not fit a GPT2LMHeadModel:\n"
        "  missing: transformer.h.0.ln_1.bias\n"
        "  unexpected: extra\n"
        "  transformer.ln_f.weight: shape (3,), expected (16,)"
    )


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_folder_is_refused_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": torch.zeros(2), "extra": Malicious(proof)}, folder / "pytorch_model.bin")
    with pytest.raises(ablate.LoadError, match=r"gpt2 is no checkpoint of plain tensors: "):
        _load(path=str(folder))
    assert not proof.exists()


def test_a_folder_with_code_of_its_own_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ablate.LoadError, match=r"^transformers cannot make a causal language model of .*gpt2: "):
        _load(path=str(folder))


def test_folders_that_cannot_be(folder: Path) -> None:
    with pytest.raises(ablate.LoadError) as caught:
        _load(path=str(folder / "nothing"))
    assert str(caught.value) == (
        f"No config.json in {folder}/nothing. Give the folder that the model's save_pretrained(path) wrote."
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ablate.LoadError, match=rf"^transformers cannot make a causal language model of {folder}: OSErr"
    ):
        _load(path=str(folder))
    (folder / "model.safetensors").write_bytes(b"noise")
    with pytest.raises(ablate.LoadError, match=r"gpt2 is no checkpoint of plain tensors: it is damaged"):
        _load(path=str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ablate.LoadError, match=r"^transformers cannot make a causal language model of .*gpt2: "):
        _load(path=str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2 | {"n_layers": 3}, "config: gpt2 has no 'n_layers'. Did you mean 'n_layer'?"),
        (GPT2 | {"zzz": 3}, "config: gpt2 has no 'zzz'. Remove it."),
        (GPT2 | {"model_type": "gpt-2"}, "No causal language model of transformers 'gpt-2'. Did you mean 'gpt2'"),
        (GPT2 | {"model_type": "vit"}, "No causal language model of transformers 'vit'."),
        (GPT2 | {"n_head": 3}, "transformers cannot make a causal language model of config: ValueError: "),
    ],
)
def test_configurations_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ablate.AblateError) as caught:
        _load(config=config)
    assert str(caught.value).startswith(message)


def test_transformers_own_names_of_keys_are_known() -> None:
    same = {"model_type": "gpt2", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    same |= {"vocab_size": 50, "max_position_embeddings": 12}
    assert ablate.model_hash(_load(config=same)) == ablate.model_hash(_load(config=GPT2))


def test_tokens_that_the_model_does_not_know_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("!!!!!!z!")
    spec = ablate.CampaignSpec(
        model={"source": "transformers", "config": GPT2},
        data={"source": "text", "path": str(tmp_path / "notes.txt"), "length": 4},
        rows=2,
        ablate_fraction=0.1,
        output="token_margin",
    )
    with pytest.raises(ablate.DataError) as caught:
        spec.load()
    assert str(caught.value) == (
        "Token 2 of example 'notes.txt:1' is 122, expected 0 to 49: the model knows 50 tokens. Give the tokenizer that "
        "belongs to the model."
    )


def test_a_campaign_on_text(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("to be, or not to be: that is the question.")
    config = GPT2 | {"vocab_size": 256}
    spec = ablate.CampaignSpec(
        model={"source": "transformers", "config": config},
        data={"source": "text", "path": str(tmp_path / "notes.txt"), "length": 12},
        rows=3,
        ablate_fraction=0.1,
        output="token_margin",
        components={"preset": "coar-gpt2"},
    )
    store = ablate.run(spec, tmp_path / "text.zarr", progress=False)
    assert store.outputs[:].shape == (3, 4)
    model, examples = spec.load()
    engine = spec.make_engine(model, spec.make_index(model))
    whole = engine.outputs(torch.ones(1, len(engine.index), dtype=torch.bool), examples)[0]
    with torch.no_grad():
        expected = ablate.TokenMeanMargin()(model(examples.inputs()), examples.targets)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for values in ({"config": GPT2}, {"path": "x"}):
        with pytest.raises(ablate.LoadError, match=r"Install it: pip install 'component-attribution\[text\]'$"):
            _load(**values)
