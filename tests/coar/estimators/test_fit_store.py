"""A fit and its store: found again, refused, replaced, finished after an interruption, and never half done."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from zarr.storage import MemoryStore

import coar
import stores
from stores import AttributionStore, CampaignStore

WriteCampaign = Callable[..., CampaignStore]
Keep = npt.NDArray[np.bool_]
LASSO: dict[str, Any] = {"method": "lasso", "held_out": False}


def _files(path: Path) -> dict[str, tuple[int, bytes]]:
    """Returns the time of last change and content of every file below a folder."""
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def _weights(path: Path) -> npt.NDArray[np.float32]:
    return coar.open_attributions(path).weights[:]


def test_the_result_is_the_same_in_memory_and_on_disk(noisy: CampaignStore, tmp_path: Path) -> None:
    kept, stored = coar.fit(noisy), coar.fit(noisy, tmp_path / "deep" / "a.zarr")
    for name in ("weights", "stderr", "bias"):
        np.testing.assert_array_equal(getattr(stored, name)[:], getattr(kept, name)[:])
    assert stored.quality.equals(kept.quality)
    assert stored.header["identity"]["of"]["model"] == noisy.header["identity"]["model"]
    assert stored.header["spec"] == noisy.header["spec"]
    assert stored.index.hash == noisy.header["identity"]["index"]
    assert stored.examples["id"].tolist() == list(noisy.examples["id"])


def test_the_campaign_may_be_given_by_path(write_campaign: WriteCampaign, planted_keep: Keep, tmp_path: Path) -> None:
    path = tmp_path / "campaign.zarr"
    write_campaign(planted_keep, planted_keep[:, :2], path)
    before = _files(path)
    found = coar.fit(str(path), ridge=0)
    np.testing.assert_allclose(found.weights[:, :3], [[1, 0, 0], [0, 1, 0]], atol=1e-6)
    assert _files(path) == before


def test_the_same_fit_again_touches_nothing(
    noisy: CampaignStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zarr"
    first = coar.fit(noisy, path)
    before = _files(path)
    monkeypatch.setattr(CampaignStore, "read_outputs", None)  # a second computation would fail
    again = coar.fit(noisy, path, overwrite=True, memory=1)  # nothing is computed: no memory is needed
    assert _files(path) == before
    np.testing.assert_array_equal(again.weights[:], first.weights[:])


def test_another_fit_is_refused_with_every_difference(noisy: CampaignStore, tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    coar.fit(noisy, path)
    before = _files(path)
    with pytest.raises(stores.StoreMismatchError) as refused:
        coar.fit(noisy, path, ridge=2.0)
    assert str(refused.value) == (
        f"Attribution store {path} was made from something else. What differs (stored -> now):\n"
        "  ridge: chosen per example -> 2.0\n"
        "Name another store, or replace this one with overwrite=True (`--overwrite`)."
    )
    assert _files(path) == before


def test_a_campaign_that_has_gone_on_is_another_fit(
    write_campaign: WriteCampaign, noisy: CampaignStore, planted_keep: Keep, tmp_path: Path
) -> None:
    campaign = write_campaign(planted_keep, noisy.outputs[:], blocks=range(8))
    coar.fit(campaign, tmp_path / "a.zarr")
    campaign.write_block(8, planted_keep[160:180], noisy.outputs[160:180])
    with pytest.raises(stores.StoreMismatchError) as refused:
        coar.fit(campaign, tmp_path / "a.zarr")
    assert [difference.key for difference in refused.value.differences] == ["campaign", "rows"]
    assert "\n  rows: 160 -> 180\n" in str(refused.value)


def test_overwrite_replaces_another_fit(noisy: CampaignStore, tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    coar.fit(noisy, path, ridge=1e6)
    replaced = coar.fit(noisy, path, ridge=2.0, overwrite=True)
    np.testing.assert_array_equal(replaced.weights[:], coar.fit(noisy, ridge=2.0).weights[:])
    np.testing.assert_array_equal(_weights(path), replaced.weights[:])
    assert os.listdir(tmp_path) == ["a.zarr"]


def test_overwrite_replaces_another_fit_in_a_store_object(noisy: CampaignStore) -> None:
    place = MemoryStore()
    coar.fit(noisy, place, ridge=1e6)
    with pytest.raises(stores.StoreMismatchError, match=r"ridge: 1000000\.0 -> 2\.0"):
        coar.fit(noisy, place, ridge=2.0)
    replaced = coar.fit(noisy, place, ridge=2.0, overwrite=True)
    np.testing.assert_array_equal(replaced.weights[:], coar.fit(noisy, ridge=2.0).weights[:])


@pytest.mark.parametrize("what", ["folder", "file", "campaign"])
def test_overwrite_never_deletes_what_is_no_attribution_store(
    write_campaign: WriteCampaign, planted_keep: Keep, noisy: CampaignStore, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "a.zarr"
    if what == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("years of work")
    elif what == "file":
        path.write_text("years of work")
    else:
        write_campaign(planted_keep, planted_keep[:, :2], path)
    before = _files(tmp_path)
    with pytest.raises(stores.StoreUnreadableError, match=r"is no (attributions store|store of this)|is a file"):
        coar.fit(noisy, path, overwrite=True)
    assert _files(tmp_path) == before


def _stop_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> list[int]:
    """Lets a fit write so many blocks, then fail; returns the numbers of the blocks written from now on."""
    written: list[int] = []
    write = AttributionStore.write_block

    def failing(store: AttributionStore, block: int, values: Any) -> None:
        if len(written) == blocks:
            raise OSError("the disk is full")
        write(store, block, values)
        written.append(block)

    monkeypatch.setattr(AttributionStore, "write_block", failing)
    return written


def test_an_interrupted_fit_is_finished_by_the_same_call(
    noisy: CampaignStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coar.estimators.regression.budget.BLOCK_EXAMPLES", 8)
    path = tmp_path / "a.zarr"
    with monkeypatch.context() as patch:
        assert _stop_after(patch, 1) == []
        with pytest.raises(OSError, match="the disk is full"):
            coar.fit(noisy, path)
    with pytest.raises(stores.UnfinishedStoreError) as refused:
        coar.open_attributions(path)
    assert str(refused.value) == (
        f"{path}: only 1 of 4 blocks of examples are estimated. Run the same again to finish it."
    )
    with pytest.raises(stores.StoreMismatchError, match=r"ridge: chosen per example -> 1\.0"):
        coar.fit(noisy, path, ridge=1.0)
    first = (path / "weights" / "c" / "0" / "0").stat().st_mtime_ns
    written = _stop_after(monkeypatch, 99)
    finished = coar.fit(noisy, path)
    assert written == [1, 2, 3]
    assert (path / "weights" / "c" / "0" / "0").stat().st_mtime_ns == first
    whole = coar.fit(noisy)
    np.testing.assert_allclose(finished.weights[:], whole.weights[:], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(finished.quality, whole.quality, rtol=1e-6)


def test_an_interrupted_fit_is_finished_in_the_stated_memory_or_not_at_all(
    noisy: CampaignStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of the store that was begun must fit, too."""
    path = tmp_path / "a.zarr"
    with monkeypatch.context() as patch:
        _stop_after(patch, 0)
        with pytest.raises(OSError, match="the disk is full"):
            coar.fit(noisy, path)
    with pytest.raises(coar.FitError, match=r"at least ([\d,]+) are needed"):
        coar.fit(noisy, path, memory=32 * 2**20 + 100_000)  # enough for a few examples, not for a block of 30
    assert len(coar.fit(noisy, path)) == 30


def test_a_fit_that_fails_leaves_nothing_behind(
    write_campaign: WriteCampaign, planted_keep: Keep, tmp_path: Path
) -> None:
    keep = planted_keep.copy()
    keep[:, 0] = True
    campaign = write_campaign(keep, keep[:, :3])
    with pytest.raises(coar.FitError, match="ridge=0 has no unique solution"):
        coar.fit(campaign, tmp_path / "a.zarr", ridge=0)
    assert os.listdir(tmp_path) == []
    coar.fit(campaign, tmp_path / "a.zarr")


def test_a_fit_that_fails_does_not_delete_what_it_would_replace(
    write_campaign: WriteCampaign, planted_keep: Keep, tmp_path: Path
) -> None:
    keep = planted_keep.copy()
    keep[:, 0] = True
    campaign = write_campaign(keep, keep[:, :3])
    coar.fit(campaign, tmp_path / "a.zarr")
    before = _files(tmp_path)
    with pytest.raises(coar.FitError, match="ridge=0 has no unique solution"):
        coar.fit(campaign, tmp_path / "a.zarr", ridge=0, overwrite=True)
    with pytest.raises(coar.FitError, match="too small"):
        coar.fit(campaign, tmp_path / "a.zarr", ridge=1, overwrite=True, memory=1)
    assert _files(tmp_path) == before


def test_blocks_finished_during_the_fit_are_not_used(
    write_campaign: WriteCampaign, noisy: CampaignStore, planted_keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A campaign may be running: what a fit uses is what was finished when it began."""
    expected = coar.fit(write_campaign(planted_keep, noisy.outputs[:], blocks=[0, 1, 2, 3]))
    campaign = write_campaign(planted_keep, noisy.outputs[:], blocks=[0, 1, 2, 3])
    read_block, read_outputs, to_do = CampaignStore.read_block, CampaignStore.read_outputs, [4, 5, 6]

    def go_on() -> None:
        if to_do:
            span = campaign.span(to_do[0])
            campaign.write_block(to_do.pop(0), planted_keep[span], noisy.outputs[span])

    def read_block_while_running(store: CampaignStore, block: int) -> Any:
        if len(to_do) > 1:
            go_on()
        return read_block(store, block)

    def read_outputs_while_running(store: CampaignStore, block: int, examples: slice) -> Any:
        go_on()
        return read_outputs(store, block, examples)

    monkeypatch.setattr(CampaignStore, "read_block", read_block_while_running)
    monkeypatch.setattr(CampaignStore, "read_outputs", read_outputs_while_running)
    found = coar.fit(campaign)
    assert to_do == []
    np.testing.assert_array_equal(found.weights[:], expected.weights[:])
    assert found.quality.equals(expected.quality)
    assert found.header["identity"] == expected.header["identity"]


def test_too_few_rows(write_campaign: WriteCampaign, planted_keep: Keep, tmp_path: Path) -> None:
    campaign = write_campaign(planted_keep[:30], planted_keep[:30, :2], tmp_path / "c.zarr", block_rows=19, blocks=[0])
    with pytest.raises(coar.FitError) as refused:
        coar.fit(campaign)
    assert str(refused.value) == (
        f"{tmp_path}/c.zarr has 19 finished rows; a fit needs at least 20 (and as a rule several times as many as "
        "there are components). Run more of the campaign first."
    )


def test_no_finished_rows(write_campaign: WriteCampaign, planted_keep: Keep) -> None:
    campaign = write_campaign(planted_keep, planted_keep[:, :2], blocks=[])
    with pytest.raises(coar.FitError, match="has 0 finished rows; a fit needs at least 20"):
        coar.fit(campaign)


def test_rows_none_of_which_can_measure_quality(write_campaign: WriteCampaign, planted_keep: Keep) -> None:
    campaign = write_campaign(planted_keep, planted_keep[:, :2], block_rows=5, blocks=range(0, 40, 2))
    with pytest.raises(coar.FitError, match="has 100 finished rows, none of them one to hold out; a fit needs"):
        coar.fit(campaign)
    assert coar.fit(campaign, held_out=False).quality["correlation"].isna().all()
    with pytest.raises(coar.FitError, match="none of them one to choose a penalty with; a fit needs"):
        coar.fit(write_campaign(planted_keep, planted_keep[:, :2], block_rows=4, blocks=[0, 5, 10, 15, 20]), **LASSO)


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_a_penalty_that_is_none(noisy: CampaignStore, ridge: float) -> None:
    with pytest.raises(coar.FitError) as refused:
        coar.fit(noisy, ridge=ridge)
    assert str(refused.value) == (
        f"ridge is {ridge}, expected a finite number >= 0, or None to choose one per example."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ridgy"}, "method is 'ridgy', expected one of ridge, ols, lasso."),
        ({"method": "lasso", "ridge": 2.0}, "ridge=2.0 is given beside method='lasso'. Give one of the two."),
        ({"method": "ols", "ridge": 0.0}, "ridge=0.0 is given beside method='ols'. Give one of the two."),
        ({"device": "gpu"}, "device is 'gpu', expected cpu, cuda or cuda:0, cuda:1, ...."),
        ({"device": "meta"}, "device is 'meta', expected cpu, cuda or cuda:0, cuda:1, ...: float64 is needed."),
    ],
)
def test_options_that_cannot_be(noisy: CampaignStore, options: dict[str, Any], message: str) -> None:
    with pytest.raises(coar.FitError) as refused:
        coar.fit(noisy, **options)
    assert str(refused.value) == message


def test_the_store_says_how_it_was_fitted(noisy: CampaignStore, tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    identity = coar.fit(noisy, path, method="ols").header["identity"]
    assert {key: identity[key] for key in ("method", "ridge", "held_out", "ablate_fraction", "rows")} == {
        "method": "ols",
        "ridge": 0.0,
        "held_out": True,
        "ablate_fraction": None,
        "rows": 200,
    }
    assert coar.fit(noisy, path, ridge=0).header["identity"] == identity
    assert coar.fit(noisy, path, ridge=0, ablate_fraction=0.3).header["identity"] == identity  # it has no other
    with pytest.raises(stores.StoreMismatchError) as refused:
        coar.fit(noisy, path, method="lasso", held_out=False)
    lines = str(refused.value).splitlines()[1:-1]
    assert sorted(lines) == [
        "  held_out: true -> false",
        "  lasso: nothing -> chosen per example",
        "  method: ols -> lasso",
        "  ridge: 0.0 -> nothing",
    ]


def test_an_interrupted_lasso_is_finished_by_the_same_call(
    noisy: CampaignStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coar.estimators.regression.budget.BLOCK_EXAMPLES", 8)
    path = tmp_path / "a.zarr"
    with monkeypatch.context() as patch:
        _stop_after(patch, 1)
        with pytest.raises(OSError, match="the disk is full"):
            coar.fit(noisy, path, method="lasso")
    finished, whole = coar.fit(noisy, path, method="lasso"), coar.fit(noisy, method="lasso")
    np.testing.assert_allclose(finished.weights[:], whole.weights[:], rtol=1e-6, atol=1e-7)
    assert list(finished.quality) == ["correlation", "r2", "lasso", "nonzero", "residual_sd"]
    np.testing.assert_allclose(finished.quality, whole.quality, rtol=1e-5)


def test_no_campaign_there(tmp_path: Path) -> None:
    with pytest.raises(stores.StoreNotFoundError) as refused:
        coar.fit(tmp_path / "none.zarr")
    assert str(refused.value) == (
        f"No campaign store at {tmp_path}/none.zarr: nothing is there. Check the path, or make one first."
    )


def test_progress_is_shown_on_stderr_when_asked(noisy: CampaignStore, capsys: pytest.CaptureFixture[str]) -> None:
    coar.fit(noisy)
    assert capsys.readouterr() == ("", "")
    coar.fit(noisy, progress=True)
    out, shown = capsys.readouterr()
    assert not out
    assert "fit" in shown
    assert "30/30" in shown


def test_a_damaged_store_can_be_overwritten(noisy: CampaignStore, tmp_path: Path) -> None:
    path = tmp_path / "attributions.zarr"
    expected = coar.fit(noisy, path).weights[:]
    (path / "bias" / "c" / "0").unlink()
    with pytest.raises(stores.DamagedBlockError, match="'bias'"):
        coar.fit(noisy, path)
    np.testing.assert_array_equal(coar.fit(noisy, path, overwrite=True).weights[:], expected)
