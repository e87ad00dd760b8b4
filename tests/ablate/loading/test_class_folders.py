"""The labels of folders of images: never 0, 1, ... by chance of the folders' names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ablate
import stores
from ablate.loading import ImageFolderData, TimmModel
from ablate.loading.datasets.class_folders import folder_labels
from ablate.loading.imagenet import imagenet_classes

HERE = Path("pets")


def _write(path: Path, *folders: str, file: str = "x.png") -> Path:
    for name in folders:
        (path / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(path / name / file)
    return path


def _spec(path: Path, count: int, **data: Any) -> ablate.CampaignSpec:
    return ablate.CampaignSpec(
        model={"source": "timm", "name": "test_resnet", "classes": count},
        data={"source": "imagefolder", "path": str(path), **data},
        rows=2,
        ablate_fraction=0.1,
    )


def _labels(path: Path, count: int, **data: Any) -> dict[str, int]:
    _, examples = _spec(path, count, **data).load()
    return dict(zip(examples.groups, examples.targets.tolist(), strict=True))


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    names = [str(i) for i in range(12)]
    assert _labels(_write(tmp_path, *names), 12) == {name: int(name) for name in names}
    assert _labels(tmp_path, 12, classes="folders") == {name: int(name) for name in names}


def test_other_names_are_sorted_as_texts() -> None:
    assert folder_labels(HERE, ["c10", "c2", "B"], None, 3) == {"B": 0, "c10": 1, "c2": 2}
    assert folder_labels(HERE, ["10", "9", "other"], "folders", 3) == {"9": 0, "10": 1, "other": 2}


def test_hidden_folders_and_files_are_none(tmp_path: Path) -> None:
    _write(tmp_path, "a", "b", ".ipynb_checkpoints", ".git")
    _write(tmp_path / "a", ".ipynb_checkpoints", "more")
    (tmp_path / "b" / "._x.png").write_bytes(b"\0\5\x16\7")
    _, examples = _spec(tmp_path, 2).load()
    assert examples.ids == ("a/x.png", "a/more/x.png", "b/x.png")
    assert examples.targets.tolist() == [0, 0, 1]


def test_the_order_of_examples_is_torchvisions(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for file in ("b.png", "a.PNG", "10.jpg", "9.jpg"):
        _write(tmp_path / file.replace(".", "-"), "a-b", "a/b", "c", file=file)
        folder = ImageFolder(str(tmp_path / file.replace(".", "-")))
        _, examples = _spec(Path(folder.root), 3).load()
        assert [str(Path(folder.root) / name) for name in examples.ids] == [name for name, _ in folder.samples]


IMAGENET = ("n01440764", "n03888257")  # tench 0, parachute 701


def test_a_part_of_imagenet(tmp_path: Path) -> None:
    _write(tmp_path, *IMAGENET)
    with pytest.raises(ablate.DataError) as caught:
        _spec(tmp_path, 1000).load()
    assert str(caught.value) == (
        f"{tmp_path} has 2 folders, and the model has 1,000 classes: which class each folder is cannot be known. Say "
        'it in the table of the data with classes = "imagenet", as the folders are classes of ImageNet; or a list, or '
        "a file, of the names of the model's 1,000 classes in their order; or "
        '"folders", if the labels are 0 to 1 in the order of the names.'
    )
    assert _labels(tmp_path, 1000, classes="imagenet") == {"n01440764": 0, "n03888257": 701}
    assert _labels(tmp_path, 1000, classes="folders") == {"n01440764": 0, "n03888257": 1}


def test_choices_are_those_that_fit() -> None:
    with pytest.raises(
        ablate.DataError, match=r'classes = "index", if the folders\' names .*; or a list.*"folders", if'
    ):
        folder_labels(HERE, ["3", "7"], None, 10)
    with pytest.raises(
        ablate.DataError, match=r"has 3 folders, and the model has 2 classes: there is none for some of"
    ):
        folder_labels(HERE, ["a", "b", "c"], None, 2)


def test_the_names_of_all_classes_of_imagenet_in_another_order() -> None:
    table = imagenet_classes(None)
    assert table is not None
    assert folder_labels(HERE, table.wordnet, None, 1000)["n03888257"] == 701
    names = [table.names[i] if table.knows(table.names[i]) else table.wordnet[i] for i in range(1000)]
    with pytest.raises(ablate.DataError, match=r"names of ImageNet's classes, but their order is another: which class"):
        folder_labels(HERE, names, None, 1000)
    assert list(folder_labels(HERE, names, "imagenet", 1000).values()) == list(range(1000))


@pytest.mark.parametrize(
    ("folder", "label"),
    [("n02012849", 134), ("crane bird", 134), ("Tinca tinca", 0), ("great_white_shark", 2), ("701", 701), ("007", 7)],
)
def test_a_class_of_imagenet_by_id_index_or_name(folder: str, label: int) -> None:
    assert folder_labels(HERE, [folder], "imagenet", 1000) == {folder: label}


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (
            "crane",
            "Folder 'crane' may be class 134 (n02012849, crane bird) or class 517 (n03126707, crane) of ImageNet.",
        ),
        (
            "maillot",
            "Folder 'maillot' may be class 638 (n03710637, maillot) or class 639 (n03710721, maillot tank suit)",
        ),
        ("goldfsh", "No class of ImageNet 'goldfsh'. Did you mean 'goldfish'"),
        ("1000", "Folder '1000' is no index of ImageNet's 1,000 classes."),
    ],
)
def test_what_is_no_one_class_of_imagenet(folder: str, message: str) -> None:
    with pytest.raises(ablate.AblateError, match=re.escape(message)):
        folder_labels(HERE, [folder], "imagenet", 1000)


def test_larger_sets_of_imagenet_go_by_the_number_of_classes() -> None:
    table = imagenet_classes(11821)
    assert table is not None
    name = table.wordnet[11820]
    assert folder_labels(HERE, [name], "imagenet", 11821) == {name: 11820}
    with pytest.raises(ablate.DataError, match='classes is "imagenet", but the model has 10 classes, and ImageNet has'):
        folder_labels(HERE, ["n01440764"], "imagenet", 10)


def test_indices() -> None:
    assert folder_labels(HERE, ["11", "2"], "index", 12) == {"11": 11, "2": 2}
    for folders, message in {
        ("cat",): "folder 'cat' is no class index",
        ("12",): "folder '12' is class 12, but the model has classes 0 to 11",
        ("7", "07"): "folders '7' and '07' are both class 7",
    }.items():
        with pytest.raises(ablate.DataError, match=message):
            folder_labels(HERE, folders, "index", 12)


CLASSES = ["ship", "dog", "bird", "cat"]


@pytest.mark.parametrize("form", ["list", "lines", "json"])
def test_names_of_the_models_classes(form: str, tmp_path: Path) -> None:
    _write(tmp_path / "pets", "cat", "dog")
    classes: Any = CLASSES
    if form != "list":
        file = tmp_path / "classes.txt"
        file.write_text("\n".join(CLASSES) + "\n" if form == "lines" else json.dumps(CLASSES))
        classes = str(file)
    assert _labels(tmp_path / "pets", 4, classes=classes) == {"cat": 3, "dog": 1}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "dog"], "classes names 2 classes, and the model has 4."),
        (["ship", "dog", "bird", "caat"], "No class in classes for the folder 'cat'. Did you mean 'caat'?"),
        (["cat", "dog", "cat", "bird"], "classes names the class 'cat' twice."),
        ("ship\n\ndog\ncat", ": line 2 is empty, expected the name of a class in every line."),
        ('{"cat": 3}', " holds JSON, but no list of texts"),
        ("[1, 2", " is no JSON: "),
    ],
)
def test_names_that_do_not_fit(classes: Any, message: str, tmp_path: Path) -> None:
    if isinstance(classes, str):
        (tmp_path / "classes.txt").write_text(classes)
        classes = str(tmp_path / "classes.txt")
    with pytest.raises(ablate.AblateError, match=re.escape(message)):
        folder_labels(HERE, ["cat", "dog"], classes, 4)


def test_a_file_of_names_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("chat\nchât\n".encode("latin-1"))
    with pytest.raises(ablate.LoadError, match=r"classes\.txt' is not UTF-8 text\. Save it as UTF-8\.$"):
        folder_labels(HERE, ["cat", "dog"], str(tmp_path / "classes.txt"), 4)


def test_a_misspelt_word_is_no_file() -> None:
    with pytest.raises(
        ablate.LoadError, match=r"'imagnet', and there is no such file .*Did you mean 'imagenet'\? Give f"
    ):
        folder_labels(HERE, ["cat", "dog"], "imagnet", 2)


def test_without_a_model_nothing_is_checked(tmp_path: Path) -> None:
    _, transform = ablate.load_model(TimmModel(source="timm", name="test_resnet"))
    source = ImageFolderData(source="imagefolder", path=str(_write(tmp_path, *IMAGENET)))
    assert ablate.load_data(source, transform).targets.tolist() == [0, 1]


def test_an_old_campaign_with_other_labels_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _spec(_write(tmp_path / "images", *map(str, range(12))), 12)
    with monkeypatch.context() as old:
        old.setattr("ablate.loading.datasets.class_folders.numbers_first", lambda name: name)
        ablate.run(spec, str(tmp_path / "c.zarr"), progress=False)
    with pytest.raises(stores.StoreMismatchError) as caught:
        ablate.run(_spec(tmp_path / "images", 12), str(tmp_path / "c.zarr"), progress=False)
    assert (
        "The examples are the same by their ids, but 10 of 12 labels differ: that of '10/x.png' was 2 and is 10. "
        "Labels of folders of images depend on `classes` in the table of the data."
    ) in str(caught.value)
