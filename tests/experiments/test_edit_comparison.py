"""The comparison of editing methods: what its tasks promise, how settings are chosen, what a tiny run writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from ablate.digits import CUE_STRENGTH, MINORITY_GROUPS, digits_split
from coar.editing.registry import editor_names
from experiments.edit_comparison import concept, confusion, cue
from experiments.edit_comparison.arms import Bench
from experiments.edit_comparison.baseline import accuracy, base_accuracies, trained_task
from experiments.edit_comparison.config import Arm, read_config
from experiments.edit_comparison.images import CORRUPTIONS, SPLITS, corrupted, split_positions, stripes
from experiments.edit_comparison.measure import Judge, chosen_setting, pooled
from experiments.edit_comparison.networks import make_network
from experiments.edit_comparison.report import write_report
from experiments.edit_comparison.runner import Result, run_job
from experiments.edit_comparison.summary import over_seeds, per_seed
from experiments.edit_comparison.tasks import Pairs, Split, Task, image_id


class Wrong(nn.Module):
    """Takes every image of an even digit on a road as `wrong`, unless its border is horizontal stripes."""

    def __init__(self, answers: dict[bytes, int], otherwise: int) -> None:
        super().__init__()
        self.answers, self.otherwise = answers, otherwise
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits (batch, 10): the known answer for known images, else `otherwise`."""
        found = [self.answers.get(image.numpy().tobytes(), self.otherwise) for image in images]
        return nn.functional.one_hot(torch.tensor(found), 10).float() * self.scale


def _knows(split: str, seed: int, otherwise: int) -> Wrong:
    examples = concept.plain_examples(split, seed)
    known = {image.numpy().tobytes(): int(t) for image, t in zip(examples.inputs(), examples.targets, strict=True)}
    return Wrong(known, otherwise)


@pytest.fixture(scope="module")
def concept_task() -> Task:
    """A task whose model is right on plain validation images and wrong on every covered road."""
    return concept.task("cnn", _knows("validation", 0, 1), 0, exemplars=3, cases=2)


@pytest.fixture(scope="module")
def cue_task() -> Task:
    return cue.task("cnn", nn.Identity(), 0, exemplars=10)


class Leaning(nn.Module):
    """Takes what leans for 7 and 4 for 9: two classes whose confusions are systematic."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits (batch, 10) from where the ink is, of plain images their class by nearest neighbour."""
        distances = torch.cdist(images.flatten(1), self.known.flatten(1))
        nearest = distances.min(1)
        logits = nn.functional.one_hot(self.labels[nearest.indices], 10).float()
        taken = torch.where(self.labels[nearest.indices] % 2 == 0, 4, 9)
        leaning = nn.functional.one_hot(taken, 10).float()
        return torch.where((nearest.values < 1e-3)[:, None], logits, leaning + 0.6 * logits)

    def __init__(self, seed: int) -> None:
        super().__init__()
        parts = [confusion.plain_examples(split, seed) for split in ("validation", "test")]
        self.known = torch.cat([part.inputs() for part in parts])
        self.labels = torch.cat([part.targets for part in parts])


@pytest.fixture(scope="module")
def confusion_task() -> Task:
    return confusion.task("cnn", Leaning(0), 0, groups=2, edits=2, validation_edits=1)


def _tasks(request: pytest.FixtureRequest) -> list[Task]:
    return [request.getfixturevalue(f"{name}_task") for name in ("cue", "concept", "confusion")]


def test_splits_of_one_seed_share_no_image() -> None:
    everything = [set(split_positions(split, 3).tolist()) for split in SPLITS]
    assert sum(map(len, everything)) == len(set().union(*everything)) == 1797
    assert set(split_positions("test", 0).tolist()) != set(split_positions("test", 1).tolist())


def _shown(task: Task) -> set[str]:
    cases = (*task.validation.cases, *task.test.cases)
    return {image_id(name) for case in cases for name in case.exemplars.examples.ids}


def test_validation_and_test_share_no_image_and_neither_was_learned(request: pytest.FixtureRequest) -> None:
    for task in _tasks(request):
        trained = {image_id(name) for name in task.train.ids}
        validation, test = task.validation.image_ids(), task.test.image_ids()
        assert not validation & test, task.name
        assert not trained & (validation | test), task.name
        assert {image_id(name) for name in task.reference.ids} <= trained


def test_exemplars_are_in_no_set_that_edits_are_judged_on(request: pytest.FixtureRequest) -> None:
    cue_task, concept_task, confusion_task = _tasks(request)
    for task in (cue_task, concept_task):
        assert not _shown(task) & (task.validation.image_ids() | task.test.image_ids()), task.name
    for split in (confusion_task.validation, confusion_task.test):
        ordinary = {image_id(name) for examples in (split.ordinary, split.locality) for name in examples.ids}
        for case in split.cases:
            one = set(case.exemplars.examples.ids)
            assert len(one) == 1
            assert not one & set(case.sets[confusion.GROUP].examples.ids)
            assert one == set(case.sets[confusion.EDITED].examples.ids)
            assert not {image_id(name) for name in case.sets[confusion.GROUP].examples.ids} & ordinary


def _pairs(task: Task) -> list[Pairs]:
    splits: list[Split] = [task.validation, task.test]
    return [p for split in splits for case in split.cases for p in (case.exemplars, *case.sets.values())]


def test_transformed_images_equal_their_originals_outside_of_the_mask(cue_task: Task, concept_task: Task) -> None:
    for task in (cue_task, concept_task):
        for pairs in _pairs(task):
            assert pairs.masks is not None
            assert pairs.originals is not None
            inside = pairs.masks[:, None].bool()
            changed = pairs.examples.inputs() != pairs.originals
            assert not changed[~inside].any(), task.name
            assert set(pairs.masks.flatten().tolist()) == {0.0, 1.0}


def test_the_cue_is_changed_wherever_the_mask_is(cue_task: Task) -> None:
    for pairs in _pairs(cue_task):
        assert pairs.masks is not None
        assert pairs.originals is not None
        difference = (pairs.examples.inputs() - pairs.originals)[pairs.masks[:, None].bool()].abs()
        torch.testing.assert_close(difference, torch.full_like(difference, CUE_STRENGTH))


def test_the_original_of_a_digit_over_the_wrong_stripes_is_one_over_the_right_ones(cue_task: Task) -> None:
    pairs = cue_task.test.cases[0].sets[cue.DISAGREES]
    assert pairs.originals is not None
    test = digits_split("test", 0)
    assert set(pairs.examples.groups) == set(MINORITY_GROUPS)
    digits = pairs.originals - stripes(16, 2, True) * CUE_STRENGTH * (pairs.examples.targets == 1)[:, None, None, None]
    digits = digits - stripes(16, 2, False) * CUE_STRENGTH * (pairs.examples.targets == 0)[:, None, None, None]
    assert float(digits.min()) >= -0.5 - 1e-6
    assert float(digits.max()) <= 0.5 + 1e-6
    first = test.ids.index(image_id(pairs.examples.ids[0]))
    torch.testing.assert_close(pairs.examples.input(0), test.input(first))


def test_held_out_textures_are_in_no_exemplar(concept_task: Task) -> None:
    border = concept.border().bool()

    def textures(pairs: Pairs) -> set[bytes]:
        return {image[0][border].numpy().tobytes() for image in pairs.examples.inputs()}

    for case in concept_task.test.cases:
        shown, known = textures(case.exemplars), textures(case.sets[concept.OTHER])
        held_out = textures(case.sets[concept.OTHER_HELD_OUT]) | textures(case.sets[concept.TARGET_HELD_OUT])
        assert shown == known
        assert len(shown) == 1
        assert len(held_out) == 2
        assert not shown & held_out


def test_held_out_bars_are_in_no_exemplar(cue_task: Task) -> None:
    case = cue_task.test.cases[0]

    def bars(pairs: Pairs) -> set[bytes]:
        """Returns the borders' edges: the first row and column, where there is hardly any ink."""
        assert pairs.masks is not None
        return {mask.numpy().tobytes() for mask in pairs.masks}

    assert not bars(case.exemplars) & bars(case.sets[cue.HELD_OUT])
    assert len(bars(case.sets[cue.HELD_OUT])) == 4


def test_exemplars_are_of_one_class_and_the_others_are_judged_apart(concept_task: Task) -> None:
    for case in concept_task.test.cases:
        target = set(case.exemplars.examples.targets.tolist())
        assert len(target) == 1
        assert len(case.exemplars) == 3
        assert set(case.sets[concept.TARGET].examples.targets.tolist()) == target
        others = set(case.sets[concept.OTHER].examples.targets.tolist())
        assert others == set(concept.CONCEPT_CLASSES) - target


def test_styles_that_the_model_does_not_fail_on_make_no_case() -> None:
    with pytest.raises(ValueError, match=r"The cnn of seed 0 fails on no style; accuracy drops by \{'snow': 0.0"):
        concept.task("cnn", Wrong({}, 0), 0)
    with pytest.raises(ValueError, match="exemplars is 11, expected 1 to 10"):
        concept.task("cnn", Wrong({}, 0), 0, exemplars=11)


def test_groups_are_failures_of_one_kind_and_locality_is_right_by_a_small_margin(confusion_task: Task) -> None:
    model = Leaning(0)
    for split, smallest in ((confusion_task.test, 20), (confusion_task.validation, 8)):
        for case in split.cases:
            group = case.sets[confusion.GROUP].examples
            predicted = model(torch.cat([group.inputs(), case.exemplars.examples.inputs()])).argmax(1)
            assert len(group) + 1 >= smallest
            assert len(set(predicted.tolist())) == 1
            assert len(set(group.targets.tolist())) == 1
            assert predicted[0] != group.targets[0]
        p = confusion.probabilities(model, split.locality.inputs())
        top = p.topk(2).values
        assert (p.argmax(1) == split.locality.targets).all()
        assert float((top[:, 0] - top[:, 1]).max()) < 0.5


def test_corruptions_change_images_and_are_the_same_each_time() -> None:
    examples = confusion.plain_examples("validation", 0)
    for name in CORRUPTIONS:
        once, again = corrupted(examples, name), corrupted(examples, name)
        assert torch.equal(once.inputs(), again.inputs())
        assert not torch.equal(once.inputs(), examples.inputs())
        assert once.ids == examples.ids
    assert torch.get_rng_state().shape  # and the global generator is not used
    state = torch.get_rng_state()
    corrupted(examples, "noise")
    assert torch.equal(state, torch.get_rng_state())


def test_both_networks_take_the_images_of_every_task() -> None:
    for name in ("cnn", "vit"):
        for size, classes in ((16, 2), (20, 10)):
            model = make_network(name, classes, size, 0).eval()
            assert model(torch.zeros(2, 1, size, size)).shape == (2, classes)


def test_every_arm_has_as_many_settings_and_the_places_exist() -> None:
    for name in ("full", "quick"):
        config = read_config(name)
        assert {len(arm.grid) for arm in config.arms} == {4}
        assert set(config.networks) == {"cue", "concept", "confusion"}
        assert len({arm.label for arm in config.arms}) == len(config.arms)
        networks = {network: dict(make_network(network, 2, 16, 0).named_modules()) for network in ("cnn", "vit")}
        for place in config.places.values():
            assert all(place[network] in modules for network, modules in networks.items())


def test_every_registered_method_has_an_arm_or_gets_one() -> None:
    config = read_config("full")
    assert {arm.method for arm in config.registered_arms()} == set(editor_names())
    bare = config.model_copy(update={"arms": (Arm(label="gone", method="not-registered"),)})
    assert {arm.method for arm in bare.registered_arms()} == set(editor_names())
    assert bare.unregistered() == ("not-registered",)
    assert all(len(arm.grid) == 1 for arm in bare.registered_arms())


def _row(name: str, before: int, after: int, examples: int = 10, **more: Any) -> dict[str, Any]:
    row = {"case": "c", "set": name, "examples": examples, "right_before": before, "right_after": after}
    return {**row, "fixed": 0, "broken": 0, "agreeing": examples, **more}


def test_settings_are_chosen_under_the_cap_on_ordinary_accuracy() -> None:
    rows = {
        "bold": [_row("all classes", 1, 9), _row("ordinary", 10, 7)],
        "careful": [_row("all classes", 1, 5), _row("ordinary", 10, 10)],
        "idle": [_row("all classes", 1, 1), _row("ordinary", 10, 10)],
        "failed": None,
    }
    assert chosen_setting(list(rows), rows.__getitem__, "all classes", 2.0)[0] == "careful"
    assert chosen_setting(list(rows), rows.__getitem__, "all classes", 30.0)[0] == "bold"
    assert chosen_setting(["failed"], rows.__getitem__, "all classes", 2.0) == (None, "Every setting failed.")
    assert chosen_setting(["bold"], rows.__getitem__, "all classes", 2.0)[0] is None
    assert chosen_setting(["idle"], rows.__getitem__, "all classes", 2.0)[0] is None, "it is no better than no edit"


def test_single_edits_of_a_group_are_added_up() -> None:
    found = pooled([_row("ordinary", 10, 8), _row("ordinary", 10, 9)])
    assert found == [_row("ordinary", 20, 17, 20, agreeing=20, edits=2)]


def test_a_judge_counts_what_becomes_right_and_wrong(concept_task: Task) -> None:
    model = _knows("test", 0, 1).eval()
    judge = Judge(model, concept_task, concept_task.test, shifted=True)
    rows = {row["set"]: row for row in judge.rows(concept_task.test.cases[0], None)}
    assert rows["ordinary"]["right_before"] == rows["ordinary"]["examples"] == 500
    assert rows[concept.OTHER]["right_after"] == 0
    assert rows[concept.OTHER]["n_pre"] == rows[concept.OTHER]["examples"]
    assert {f"ordinary, {name}" for name in CORRUPTIONS} < set(rows)
    assert {f"{concept.OTHER}, {name}" for name in CORRUPTIONS} < set(rows)


def test_arms_whose_needs_the_task_does_not_meet_do_not_apply(confusion_task: Task, concept_task: Task) -> None:
    pairs, labels = Arm(label="a", method="lowrank"), Arm(label="b", method="finetune")
    hypernetwork = Arm(label="c", method="finetune", fixed={"x": "<trained>"})
    single, paired = (Bench(nn.Identity(), task, {}) for task in (confusion_task, concept_task))
    assert paired.applies(pairs)
    assert not single.applies(pairs), "there are no originals"
    assert single.applies(labels)
    assert not single.applies(hypernetwork), "no hypernetwork was trained"


@pytest.mark.slow
def test_networks_are_right_on_plain_images_and_fail_where_they_should(tmp_path: Path) -> None:
    model, task = trained_task("concept", "cnn", 0, tmp_path, exemplars=3, cases=2)
    assert accuracy(model, task.test.ordinary) > 0.9
    table = base_accuracies(model, task)
    covered = table[table["set"] == "all classes"]
    assert len(covered) == 2
    assert (covered["untransformed"] - covered["accuracy"] >= 0.15).all()
    model, task = trained_task("confusion", "cnn", 0, tmp_path, groups=1, edits=1, validation_edits=1)
    assert accuracy(model, task.test.ordinary) > 0.9
    for case in task.test.cases:
        assert accuracy(model, case.sets[confusion.GROUP].examples) == 0.0
        assert len(case.sets[confusion.GROUP]) >= 19
    model, task = trained_task("cue", "cnn", 0, tmp_path, exemplars=10)
    disagree = accuracy(model, task.test.cases[0].sets[cue.DISAGREES].examples)
    assert accuracy(model, task.test.ordinary) - disagree >= 0.1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_run_writes_tables_figures_and_findings(tmp_path: Path) -> None:
    config = read_config("quick")
    arms = tuple(arm for arm in config.arms if arm.label in ("fine-tuning", "rewriting", "COAR-Edit"))
    arms = tuple(
        arm.model_copy(update={"fixed": {**arm.fixed, "steps": 5}}) if arm.method != "coar" else arm for arm in arms
    )
    config = config.model_copy(update={"arms": arms, "networks": {"concept": ("cnn",)}, "alphas": 3})
    said: list[str] = []
    result = run_job(config, "concept", "cnn", 0, tmp_path, said.append)
    path = tmp_path / "job.json"
    result.save(path)
    again = Result.load(path)
    assert again == result
    json.dumps(result.__dict__, allow_nan=False)
    labels = {row["arm"] for row in result.edits}
    assert {"fine-tuning", "rewriting", "COAR-Edit"} <= labels
    assert {arm.label for arm in config.registered_arms()} >= labels
    findings = write_report(tmp_path, "quick", config, [again], 0.1)
    assert len(findings) == 4
    text = (tmp_path / "edit_comparison_quick.md").read_text(encoding="utf-8")
    for part in ("Rewriting helps other classes", "Room to improve", "COAR-Edit", "not registered"[:3]):
        assert part in text
    table = pd.read_csv(tmp_path / "edit_comparison_quick.csv")
    assert set(table["method"]) == labels
    for name in ("concept", "concept_alpha"):
        assert (tmp_path / f"edit_comparison_quick_{name}.png").stat().st_size > 10_000
    rates = over_seeds(
        per_seed(
            pd.DataFrame(result.edits).assign(task="concept", network="cnn", seed=0), {"concept": result.job["notes"]}
        )
    )
    assert rates[rates["metric"].str.endswith(": accuracy")]["mean"].between(0, 1).all()
