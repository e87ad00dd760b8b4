"""Import of attributions: files of the published code and our own exports, checked before they are data."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import ablate
import coar
import stores
from coar.attributions.reload import reload_engine
from coar.interchange import InterchangeError, attribution_files, export, foreign, import_attributions, npz

COMPONENTS, EXAMPLES = 10, 7
_verbatim = partial(import_attributions, standardised=False)  # of files whose numbers have our units


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """What the published regression saves: weight (components, examples) in half precision, bias, lam."""
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(COMPONENTS, EXAMPLES, generator=generator).half(),
        "bias": torch.randn(EXAMPLES, generator=generator),
        "lam": torch.rand(EXAMPLES, generator=generator),
    }


@pytest.fixture
def file(tmp_path: Path, published: dict[str, torch.Tensor]) -> Path:
    """A `.pt` file of the published layout."""
    torch.save(published, tmp_path / "published.pt")
    return tmp_path / "published.pt"


def test_a_published_file_becomes_attributions(file: Path, tmp_path: Path, published: dict[str, torch.Tensor]) -> None:
    found = _verbatim(file, tmp_path / "a.zarr")
    np.testing.assert_array_equal(found.weights[:], published["weight"].T.float().numpy(), strict=True)
    np.testing.assert_array_equal(found.bias[:], published["bias"].numpy(), strict=True)
    np.testing.assert_array_equal(found.stderr[:], np.zeros((EXAMPLES, COMPONENTS), dtype=np.float32), strict=True)
    np.testing.assert_array_equal(found.quality["lam"], published["lam"].numpy())
    assert found.quality["correlation"].isna().all()
    assert not found.quality_measured
    assert found.quality_text() == "not measured"
    assert found.top(0, 3)["z"].isna().all()
    assert found.header["identity"] == {
        "method": "imported",
        "held_out": False,
        "units": "output",
        "imported": {
            "file": "published.pt",
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "true_means": "kept",
        },
        "of": {
            "model": None,
            "data": "not known (imported)",
            "index": found.index.hash,
            "plan": {"algorithm": "not known (imported)", "ablate_fraction": None, "seed": None},
            "output": "margin (imported)",
        },
    }


def test_predictions_are_those_of_the_published_code(
    file: Path, tmp_path: Path, published: dict[str, torch.Tensor]
) -> None:
    keep = np.random.default_rng(1).random((4, COMPONENTS)) < 0.8
    scores = published["weight"].T.float()
    expected = torch.stack([scores[:, torch.from_numpy(row)].sum(dim=1) + published["bias"] for row in keep])
    found = _verbatim(file, tmp_path / "a.zarr")
    np.testing.assert_allclose(found.predict(keep), expected.numpy(), rtol=1e-5, atol=1e-5)
    turned = _verbatim(file, tmp_path / "b.zarr", true_means="ablated")
    expected = torch.stack([scores[:, torch.from_numpy(~row)].sum(dim=1) + published["bias"] for row in keep])
    np.testing.assert_allclose(turned.predict(keep), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_the_folder_of_the_published_regression(tmp_path: Path, published: dict[str, torch.Tensor]) -> None:
    (tmp_path / "coar_attributions.pt" / "final_lambda").mkdir(parents=True)  # a folder, for all its name
    torch.save(published, tmp_path / "coar_attributions.pt" / "datamodels.pt")
    assert len(_verbatim(tmp_path / "coar_attributions.pt", tmp_path / "a.zarr")) == EXAMPLES


@pytest.mark.parametrize("form", ["npz", "old torch", "float64", "bfloat16", "by columns", "no lam", "gradient"])
def test_other_forms_of_the_same_numbers(tmp_path: Path, published: dict[str, torch.Tensor], form: str) -> None:
    path = tmp_path / ("a.npz" if form == "npz" else "a.pt")
    values = dict(published)
    if form == "npz":
        arrays: dict[str, Any] = {name: value.numpy() for name, value in values.items()}
        np.savez_compressed(path, **arrays)
    elif form == "old torch":
        torch.save(values, path, _use_new_zipfile_serialization=False)
    else:
        if form == "no lam":
            del values["lam"]
        elif form == "by columns":
            values["weight"] = values["weight"].T.contiguous().T
        elif form == "gradient":
            values["weight"] = nn.Parameter(values["weight"].float())
        else:
            values["weight"] = values["weight"].to(getattr(torch, form))
        torch.save(values, path)
    found = _verbatim(path, tmp_path / "a.zarr")
    np.testing.assert_array_equal(found.weights[:], values["weight"].detach().float().numpy().T, strict=True)
    assert list(found.quality) == (["correlation"] if form == "no lam" else ["correlation", "lam"])


def test_with_a_model_an_edit_fits(file: Path, tmp_path: Path, conv_net: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter"])
    found = _verbatim(file, tmp_path / "a.zarr", components=index)
    assert found.index == index
    edit = coar.coar_edit(found, [0, 1], [2, 3], k=2)
    edited = edit.apply(conv_net)
    changed = edited.get_parameter("conv1.weight") != conv_net.get_parameter("conv1.weight")
    changed_too = edited.get_parameter("conv2.weight") != conv_net.get_parameter("conv2.weight")
    assert int(changed.flatten(1).any(dim=1).sum() + changed_too.flatten(1).any(dim=1).sum()) == 2


def test_with_a_spec_they_can_be_judged(folder: Path, tmp_path: Path) -> None:
    own = coar.open_attributions(folder / "campaign-attributions.zarr")
    path = export(own, tmp_path / "a.pt")
    found = import_attributions(path, tmp_path / "a.zarr", spec=folder / "spec.toml")
    assert found.header["identity"]["of"]["plan"]["ablate_fraction"] == 0.05
    judged = [coar.evaluate(a, *reload_engine(a), rows=8, seed=5).fractions[0] for a in (own, found)]
    np.testing.assert_allclose(judged[0].correlations, judged[1].correlations, rtol=1e-4)
    np.testing.assert_allclose(judged[0].predicted, judged[1].predicted, rtol=1e-4, atol=1e-4)


def test_reading_in_parts_and_going_on_change_no_number(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _verbatim(file, tmp_path / "whole.zarr")
    monkeypatch.setattr(attribution_files, "MOST_BLOCK_EXAMPLES", 2)
    monkeypatch.setattr(foreign, "SLAB_BYTES", 1)
    original, calls = stores.AttributionStore.write_block, []

    def write_block(store: stores.AttributionStore, block: int, values: Any) -> Any:
        calls.append(block)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(store, block, values)

    monkeypatch.setattr(stores.AttributionStore, "write_block", write_block)
    with pytest.raises(KeyboardInterrupt):
        _verbatim(file, tmp_path / "a.zarr")
    found = _verbatim(file, tmp_path / "a.zarr")
    assert calls == [0, 1, 1, 2, 3]
    np.testing.assert_array_equal(found.weights[:], whole.weights[:], strict=True)
    np.testing.assert_array_equal(found.bias[:], whole.bias[:], strict=True)
    assert found.header["identity"] == whole.header["identity"]


def test_other_attributions_are_replaced_only_when_asked(
    file: Path, tmp_path: Path, published: dict[str, torch.Tensor]
) -> None:
    _verbatim(file, tmp_path / "a.zarr")
    with pytest.raises(stores.StoreMismatchError, match=r"imported\.true_means: kept -> ablated"):
        _verbatim(file, tmp_path / "a.zarr", true_means="ablated")
    found = _verbatim(file, tmp_path / "a.zarr", true_means="ablated", overwrite=True)
    np.testing.assert_array_equal(found.weights[:], -published["weight"].T.float().numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": torch.ones(EXAMPLES, COMPONENTS)},
            "weight has shape (7, 10), bias (7,), expected (components, examples) and (examples,). It seems to be "
            "transposed: store weight.T.",
        ),
        (
            {"bias": torch.ones(3)},
            "weight has shape (10, 7), bias (3,), expected (components, examples) and (examples,). Is it an "
            "attribution file?",
        ),
        (
            {"lam": torch.ones(2)},
            "lam has shape (2,), expected (7,), one penalty per example. Leave it out of the file",
        ),
        (
            {"bias": None},
            "has no tensor 'bias' of floating-point numbers, it has weight, bias, lam. Expected `weight` (components, "
            "examples) and `bias` (examples,).",
        ),
        ({"weight": torch.ones(COMPONENTS, EXAMPLES, dtype=torch.int64)}, "has no tensor 'weight' of floating-point"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, published: dict[str, torch.Tensor], changes: dict[str, Any], message: str
) -> None:
    torch.save({**published, **changes}, tmp_path / "a.pt")
    with pytest.raises(InterchangeError, match=re.escape(f"{tmp_path / 'a.pt'}") + ":? " + re.escape(message)):
        _verbatim(tmp_path / "a.pt", tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize(("name", "at"), [("weight", (3, 5)), ("bias", (5,))])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_named(
    tmp_path: Path, published: dict[str, torch.Tensor], name: str, at: tuple[int, ...], value: float
) -> None:
    spoilt = {key: tensor.clone() for key, tensor in published.items()}
    spoilt[name][at] = value
    torch.save(spoilt, tmp_path / "a.pt")
    where = "weights of example 5, component 3" if name == "weight" else "bias of example 5"
    message = (
        f"{tmp_path / 'a.pt'}: {where} is {value}, expected a finite number; 1 example has such numbers, of 7. "
        "Nothing was imported. on_nan='drop' (`--on-nan drop`) leaves them out, 'keep' keeps their places without an "
        "attribution."
    )
    with pytest.raises(InterchangeError, match=f"^{re.escape(message)}$"):
        _verbatim(tmp_path / "a.pt", tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


class _Evil:
    def __reduce__(self) -> Any:
        return (Path("pickle-was-run").write_text, ("yes",))


@pytest.mark.parametrize("form", ["torch", "pickle", "npz", "header"])
def test_no_code_in_a_file_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: dict[str, torch.Tensor], form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("a.pt" if form in ("torch", "pickle") else "a.npz")
    evil = np.array(_Evil(), dtype=object)
    arrays: dict[str, Any] = {name: value.numpy() for name, value in published.items()}
    if form == "torch":
        torch.save({**published, "bias": _Evil()}, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(_Evil()))
    elif form == "npz":
        np.savez(path, **{**arrays, "bias": evil})
    else:
        np.savez(path, weights=arrays["weight"].T, stderr=arrays["weight"].T, bias=arrays["bias"], header=evil)
    with pytest.raises(InterchangeError, match=re.escape(str(path))) as refused:
        _verbatim(path, tmp_path / "a.zarr")
    if form == "torch":
        assert "which is code. Files that contain code are refused, and none of it ran." in str(refused.value)
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "pickle-was-run").exists()
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("name", ["a.pt", "a.npz"])
@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 and then nothing"])
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InterchangeError, match=re.escape(name)):
        import_attributions(tmp_path / name, tmp_path / "a.zarr")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InterchangeError, match=r"No file at .*none\.pt\. Give a \.pt or \.npz file"):
        import_attributions(tmp_path / "none.pt", tmp_path / "a.zarr")
    with pytest.raises(InterchangeError, match=r"No file at .*datamodels\.pt\. Give"):
        import_attributions(tmp_path, tmp_path / "a.zarr")


@pytest.fixture
def exported(tmp_path: Path, write_attributions: Callable[..., coar.Attributions]) -> Path:
    """An .npz of ours, large enough for several reads."""
    generator = np.random.default_rng(4)
    weights = generator.standard_normal((60, 300))
    return export(write_attributions(weights, stderr=generator.random((60, 300))), tmp_path / "own.npz")


def _rewrite(path: Path, **changes: npt.NDArray[Any] | None) -> None:
    """Writes an .npz again with other arrays in it; None: without that array."""
    with np.load(path, allow_pickle=False) as opened:
        arrays = {**opened, **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


def _with_header(path: Path, change: Callable[[dict[str, Any]], None]) -> npt.NDArray[Any]:
    with np.load(path, allow_pickle=False) as opened:
        header = json.loads(str(opened[npz.HEADER]))
    change(header)
    return np.array(json.dumps(header))


def test_a_compressed_copy_of_an_export_reads_the_same(exported: Path, tmp_path: Path) -> None:
    with np.load(exported, allow_pickle=False) as opened:
        np.savez_compressed(tmp_path / "packed.npz", **opened)
    one = import_attributions(exported, tmp_path / "a.zarr")
    two = import_attributions(tmp_path / "packed.npz", tmp_path / "b.zarr")
    np.testing.assert_array_equal(one.weights[:], two.weights[:], strict=True)
    np.testing.assert_array_equal(one.stderr[:], two.stderr[:], strict=True)


@pytest.mark.parametrize("array", ["weights", "stderr", "bias"])
def test_a_flipped_bit_in_an_export_is_found(exported: Path, tmp_path: Path, array: str) -> None:
    with zipfile.ZipFile(exported) as archive:
        member = archive.getinfo(f"{array}.npy")
        middle = member.header_offset + member.file_size // 2
    content = bytearray(exported.read_bytes())
    content[middle] ^= 1
    exported.write_bytes(content)
    with pytest.raises(InterchangeError, match="Bad CRC-32"):
        import_attributions(exported, tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


def test_a_cut_export_is_refused(exported: Path, tmp_path: Path) -> None:
    exported.write_bytes(exported.read_bytes()[:-100])
    with pytest.raises(InterchangeError, match=r"own\.npz cannot be read as attributions \(BadZipFile"):
        import_attributions(exported, tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stderr": np.ones((60, 3), dtype=np.float32)},
            "weights and stderr have shapes (60, 300) and (60, 3), expe",
        ),
        ({"stderr": None}, "stderr.npy cannot be read"),
        (
            {"weights": np.ones((60, 300), dtype=np.int64)},
            "weights.npy cannot be read: it is int64, row by row, expe",
        ),
        ({"weights": np.ones((60, 300), order="F")}, "weights.npy cannot be read: it is float64, by columns, expected"),
        ({"bias": np.ones(3)}, "bias is float64 of shape (3,), expected floating-point numbers of shape (60,)."),
        ({"example_label": np.array(["a"] * 60)}, "example_label"),
        ({"example_id": None}, "example_id"),
        ({"header": np.array("[]")}, "cannot be read as attributions"),
    ],
)
def test_an_export_whose_arrays_do_not_fit_is_refused(
    exported: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    _rewrite(exported, **changes)
    with pytest.raises(InterchangeError, match=re.escape(message.removeprefix("example_"))):
        import_attributions(exported, tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


def _other_index(header: dict[str, Any]) -> None:
    index = ablate.ComponentIndex([ablate.Port("conv_filter", 0, "c", "c.weight", "out", 0, 3, 1, 9)])
    header["index"] = index.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h: h.update(quality=["correlation", "../../evil"]),
            "its columns of quality are correlation, ../../ev",
        ),
        (lambda h: h.update(quality=["r2"]), "its columns of quality are r2, expected names, and correlation."),
        (lambda h: h["identity"].pop("of"), "its header is not what coar.export writes (KeyError: 'of')."),
        (lambda h: h["identity"]["of"].pop("plan"), "its header is not what coar.export writes (KeyError: 'plan')."),
        (lambda h: h.update(index="{}"), "its header is not what coar.export writes (ModelMismatchError"),
        (lambda h: h.update(identity=3), "its header is not what coar.export writes (TypeError"),
        (_other_index, "its header is about 3 components of a campaign or estimate, its weights are about 300."),
    ],
)
def test_an_export_whose_header_lies_is_refused(
    exported: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    _rewrite(exported, header=_with_header(exported, change))
    with pytest.raises(InterchangeError, match=re.escape(message)):
        import_attributions(exported, tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


def test_a_spec_in_an_export_is_never_loaded(exported: Path, tmp_path: Path) -> None:
    def evil(header: dict[str, Any]) -> None:
        header["spec"]["model"] = {"source": "factory", "factory": "os:abort"}
        header["loadable"] = True

    _rewrite(exported, header=_with_header(exported, evil))
    found = import_attributions(exported, tmp_path / "a.zarr")
    assert found.header["loadable"] is False


def test_an_export_says_itself_what_it_is_about(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InterchangeError, match=r"says itself what it is about\. Leave out output, true_means\."):
        import_attributions(exported, tmp_path / "a.zarr", output="logit", true_means="ablated")


def test_an_unknown_meaning_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ablate.errors.UnknownNameError, match=r"No meaning of True 'on'\. Known: kept, ablated"):
        _verbatim(file, tmp_path / "a.zarr", true_means="on")  # type: ignore[arg-type]
