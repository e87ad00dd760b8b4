"""Open, or explain: the whole text a user reads when a place holds no store this version can read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from stores import (
    AttributionStore,
    CampaignStore,
    Difference,
    StoreError,
    StoreMismatchError,
    StoreNotFoundError,
    StoreUnreadableError,
    content_hash,
    differences,
)
from stores.format.root import DamagedMetadataError, OtherKindError

BROKEN = (
    "Its metadata is damaged or it was not written by this toolkit; restore it from a copy, or delete it and run again."
)


def _nothing(path: Path) -> None:
    pass


def _empty_directory(path: Path) -> None:
    path.mkdir()


def _a_file(path: Path) -> None:
    path.write_text("outputs")


def _some_directory(path: Path) -> None:
    (path / "photos").mkdir(parents=True)


def _garbage(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text("{outputs}")


def _cut_metadata(path: Path) -> None:
    zarr.open_group(str(path), mode="w")
    (path / "zarr.json").write_text("")


def _json_but_no_metadata(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text("[1, 2]")


def _an_array(path: Path) -> None:
    zarr.create_array(str(path), shape=(3,), dtype="float32")


def _foreign_group(path: Path) -> None:
    zarr.open_group(str(path), mode="w", attributes={"made_by": "someone else"})


def _foreign_group_version_2(path: Path) -> None:
    zarr.open_group(str(path), mode="w", zarr_format=2)


def _the_other_kind(path: Path) -> None:
    zarr.open_group(str(path), mode="w", attributes={"format": "attributions", "format_version": 1})


def _later_version(path: Path) -> None:
    zarr.open_group(str(path), mode="w", attributes={"format": "campaign", "format_version": 3})


def _no_version(path: Path) -> None:
    zarr.open_group(str(path), mode="w", attributes={"format": "campaign"})


@pytest.mark.parametrize(
    ("make", "expected", "error"),
    [
        (
            _nothing,
            "No campaign store at PATH: nothing is there. Check the path, or make one first.",
            StoreNotFoundError,
        ),
        (
            _empty_directory,
            "No campaign store at PATH: nothing is there. Check the path, or make one first.",
            StoreNotFoundError,
        ),
        (_a_file, "PATH is a file, expected the directory of a campaign store. Check the path.", StoreUnreadableError),
        (
            _some_directory,
            "PATH exists but is no store of this toolkit: it has no zarr.json. Check the path.",
            StoreUnreadableError,
        ),
        (
            _garbage,
            "PATH cannot be read as a campaign store: zarr.json: JSONDecodeError: Expecting property name enclosed in "
            f"double quotes: line 1 column 2 (char 1). {BROKEN}",
            StoreUnreadableError,
        ),
        (
            _cut_metadata,
            "PATH cannot be read as a campaign store: zarr.json: JSONDecodeError: Expecting value: line 1 column 1 "
            f"(char 0). {BROKEN}",
            StoreUnreadableError,
        ),
        (
            _foreign_group,
            "PATH is no campaign store: it was not written by this toolkit. Check the path.",
            OtherKindError,
        ),
        (
            _foreign_group_version_2,
            "PATH exists but is no store of this toolkit: it has no zarr.json. Check the path.",
            StoreUnreadableError,
        ),
        (
            _the_other_kind,
            "PATH is no campaign store: its format is 'attributions'. Check the path.",
            OtherKindError,
        ),
        (
            _later_version,
            "PATH was written by a newer version of the toolkit (format 3; this version reads up to 2). Upgrade: "
            "pip install --upgrade component-attribution.",
            StoreUnreadableError,
        ),
        (
            _no_version,
            f"PATH/zarr.json has format version None, expected a number. {BROKEN}",
            DamagedMetadataError,
        ),
    ],
)
def test_what_a_user_reads(
    tmp_path: Path, make: Callable[[Path], None], expected: str, error: type[StoreError]
) -> None:
    path = tmp_path / "campaign.zarr"
    make(path)

    for mode in ("r", "r+"):
        with pytest.raises(error) as raised:
            CampaignStore.open(path, mode=mode)
        assert str(raised.value) == expected.replace("PATH", str(path))
        assert type(raised.value) is error


@pytest.mark.parametrize("make", [_json_but_no_metadata, _an_array])
def test_what_zarr_words_is_wrapped(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "campaign.zarr"
    make(path)

    with pytest.raises(
        StoreUnreadableError,
        match=f"^{path}.* (cannot be read as a campaign store: .*{BROKEN}|no group of zarr format 3. Check the path.)$",
    ):
        CampaignStore.open(path)


def test_a_store_of_attributions_explains_itself_too(tmp_path: Path, campaign: CampaignStore) -> None:
    with pytest.raises(StoreUnreadableError) as raised:
        AttributionStore.open(campaign.location)
    assert str(raised.value) == f"{campaign.where} is no attributions store: its format is 'campaign'. Check the path."
    with pytest.raises(StoreNotFoundError) as missing:
        AttributionStore.open(tmp_path / "none")
    assert str(missing.value) == (
        f"No attributions store at {tmp_path / 'none'}: nothing is there. Check the path, or make one first."
    )


def test_an_error_is_also_what_python_calls_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is there"):
        CampaignStore.open(tmp_path / "none")


def test_a_missing_permission_is_not_called_damage(monkeypatch: pytest.MonkeyPatch, campaign: CampaignStore) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", "zarr.json")

    monkeypatch.setattr(zarr, "open_group", refuse)

    with pytest.raises(PermissionError, match=r"Permission denied: 'zarr\.json'"):
        CampaignStore.open(campaign.location)


def test_a_url_is_not_taken_for_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_campaign: Callable[..., CampaignStore]
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = r"Stores can be at s3://, gs://, az://, memory://, file:// or a path, not at s4://\."

    with pytest.raises(StoreError, match=expected):
        CampaignStore.open("s4://bucket/a")
    with pytest.raises(StoreError, match=expected):
        new_campaign("s4://bucket/a")
    assert list(tmp_path.iterdir()) == []


def test_an_array_that_is_gone_is_named(tmp_path: Path) -> None:
    attributes: dict[str, Any] = {"format": "campaign", "format_version": 1, "component_count": 3}
    zarr.open_group(str(tmp_path / "a"), mode="w", attributes=attributes)

    with pytest.raises(StoreError) as raised:
        CampaignStore.open(tmp_path / "a")
    assert str(raised.value) == (f"{tmp_path / 'a' / 'zarr.json'}: the array 'outputs' is missing. {BROKEN}")


def test_every_key_that_differs_is_named() -> None:
    stored = {"model": "aa", "plan": {"rows": 8, "seed": 1}, "same": {"a": [1, 2]}, "gone": 3, "old": {"x": 1}}
    now = {"model": "bb", "plan": {"rows": 9, "seed": 2}, "same": {"a": [1, 2]}, "new": {"deep": {"y": True}}}

    found = differences(stored, now)

    assert list(map(str, found)) == [
        "gone: 3 -> nothing",
        "model: aa -> bb",
        "new.deep.y: nothing -> true",
        "old.x: 1 -> nothing",
        "plan.rows: 8 -> 9",
        "plan.seed: 1 -> 2",
    ]
    assert found[1] == Difference("model", "aa", "bb")


def test_a_branch_that_became_a_leaf_is_one_difference() -> None:
    assert list(map(str, differences({"plan": {"seed": 1}}, {"plan": "none"}))) == ['plan: {"seed": 1} -> none']


def test_long_values_are_cut() -> None:
    (difference,) = differences({"index": "a" * 81}, {"index": "b" * 80})

    assert str(difference) == f"index: {'a' * 77}... -> {'b' * 80}"


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(-9, 9) | st.text(max_size=3)
KEYS = st.sampled_from(["a", "b", "ab"])
TREES = st.recursive(LEAVES, lambda tree: st.dictionaries(KEYS, tree, max_size=3), max_leaves=8)


@given(st.dictionaries(KEYS, TREES, max_size=3))
def test_differences_of_a_tree_with_itself_and_its_json_are_none(tree: dict[str, Any]) -> None:
    again = json.loads(json.dumps(tree))

    assert differences(tree, again) == []
    assert content_hash(tree) == content_hash(dict(reversed(again.items())))


def test_a_mismatch_lists_everything_and_says_what_to_do() -> None:
    error = StoreMismatchError("Campaign runs/a", differences({"a": 1, "b": "x"}, {"a": 2, "b": "y"}), "Do this.")

    assert str(error) == (
        "Campaign runs/a was made from something else. What differs (stored -> now):\n"
        "  a: 1 -> 2\n"
        "  b: x -> y\n"
        "Do this."
    )
    assert [difference.key for difference in error.differences] == ["a", "b"]


@pytest.mark.faults
@pytest.mark.parametrize("column", ["examples/id", "examples/label", "components/name"])
def test_a_damaged_column_is_never_read_as_data(
    tmp_path: Path, new_campaign: Callable[..., CampaignStore], column: str
) -> None:
    store = new_campaign(tmp_path / "a")
    file = tmp_path / "a" / column / "c" / "0"
    good = file.read_bytes()
    flipped = [good[:i] + bytes([good[i] ^ (1 << i % 8)]) + good[i + 1 :] for i in range(len(good))]
    advice = r"Restore the store from a copy, or run again into a new one\.$"

    for data in [b"", good[:-1], good[: len(good) // 2], good + b"\0", *flipped]:
        file.write_bytes(data)
        with pytest.raises(StoreUnreadableError, match=rf"the column {column} is damaged: .*\. {advice}"):
            _ = store.examples, store.components
    file.unlink()
    with pytest.raises(StoreUnreadableError, match=rf"the column {column} is damaged: its file is gone\. {advice}"):
        _ = store.examples, store.components
    file.write_bytes(good)
    assert store.examples["label"].tolist() == [0, 1, 2, 0, 1]
