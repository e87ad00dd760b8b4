"""Runs one job: one task with one network and seed, all arms, the masks at every density, and the curves."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coar.editing.edits.edit import Edit
from coar.editing.masks import MetaSettings, train_hypernetwork
from coar.editing.methods.interpolation import interpolation_curve
from coar.editing.registry import editor_names
from coar.editing.where.defaults import last_feed_forward_blocks
from coar.errors import CoarError
from experiments.edit_comparison.arms import Bench
from experiments.edit_comparison.baseline import base_accuracies, trained_task
from experiments.edit_comparison.config import Arm, Config
from experiments.edit_comparison.measure import Judge, Row, chosen_setting, edit_facts, pooled
from experiments.edit_comparison.tasks import Case

MASKS = {"hypernetwork-mask": "learned", "random-mask": "random", "mean-mask": "mean"}


@dataclass
class Result:
    """What a job found: tables as lists of rows, JSON-able."""

    job: dict[str, Any]
    base: list[Row] = field(default_factory=list)
    edits: list[Row] = field(default_factory=list)
    choices: list[Row] = field(default_factory=list)
    curves: list[Row] = field(default_factory=list)
    masks: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the result as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.draft")
        draft.write_text(json.dumps(self.__dict__), encoding="utf-8")
        os.replace(draft, path)

    @classmethod
    def load(cls, path: Path) -> Result:
        """Returns the result in a file that `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def run_job(
    config: Config, task: str, network: str, seed: int, cache: Path, say: Callable[[str], None] | None = None
) -> Result:
    """Returns everything that is measured on one task with one network and seed. Trains what the cache has not."""
    torch.set_num_threads(1)
    tell = say or (lambda text: None)
    started, processor = time.perf_counter(), time.process_time()
    model, made = trained_task(task, network, seed, cache, **config.options[task])
    result = Result({"task": task, "network": network, "seed": seed, "digest": config.digest(), "notes": _plain(made)})
    result.base = [_tidy(row) for row in base_accuracies(model, made).to_dict("records")]
    result.seconds["network"] = time.perf_counter() - started
    bench = Bench(model, made, config.places, _hypernetwork(config, model, made, cache))
    result.seconds["hypernetwork"] = time.perf_counter() - started - result.seconds["network"]
    job = _Job(config, bench, result)
    for arm in config.registered_arms():
        began = time.perf_counter()
        if bench.applies(arm):
            job.run_arm(arm)
            result.seconds[arm.label] = time.perf_counter() - began
            tell(f"{task} {network} seed {seed}: {arm.label}, {time.perf_counter() - began:.1f} s")
    began = time.perf_counter()
    job.run_masks()
    result.seconds["masks at all densities"] = time.perf_counter() - began
    result.seconds |= {"all": time.perf_counter() - started, "processor": time.process_time() - processor}
    return result


class _Job:
    def __init__(self, config: Config, bench: Bench, result: Result) -> None:
        self.config, self.bench, self.result = config, bench, result
        task = bench.task
        self.single = task.kept == "locality"  # edits of single examples: each has exemplars of its own
        self.validation = Judge(bench.model, task, task.validation, shifted=False)
        self.test = Judge(bench.model, task, task.test, shifted=not self.single)
        self.edits: dict[tuple[str, str, int], Edit | None] = {}
        self.errors: dict[tuple[str, str], str] = {}

    def run_arm(self, arm: Arm) -> None:
        """Chooses the arm's setting for each kind of case on validation images, and judges it on test images."""
        for name in dict.fromkeys(case.name for case in self.bench.task.test.cases):
            self._run_kind(arm, name)

    def _run_kind(self, arm: Arm, kind: str) -> None:
        chosen = self._choose(arm, kind)
        rows: list[Row] = []
        facts: list[Any] = []
        for i, case in _of_kind(self.bench.task.test.cases, kind):
            edit = None if chosen is None else self._edit(arm, chosen, case, i)
            rows += self.test.rows(case, edit)
            if edit is not None:
                facts.append(edit_facts(edit))
                if len(facts) == 1 and facts[0]["stop"] != "noop":
                    self._curve(arm, case, edit)
        counted = ("steps", "seconds", "components", "alpha") if facts else ()
        means = {f"mean_{key}": float(np.mean([fact[key] for fact in facts])) for key in counted}
        setting = "" if chosen is None else json.dumps(chosen, sort_keys=True)
        about = {"arm": arm.label, "method": arm.method, "setting": setting, "no_edit": chosen is None, **means}
        self.result.edits += [{**about, **row} for row in pooled(rows)]

    def _choose(self, arm: Arm, kind: str) -> dict[str, Any] | None:
        """Returns the best admissible setting on the validation images of one kind of case; None: no edit."""
        task = self.bench.task
        cases = _of_kind(task.validation.cases, kind)
        names = {json.dumps(setting, sort_keys=True): setting for setting in arm.grid}

        def rows_of(name: str) -> list[Row] | None:
            edits = [(case, self._edit(arm, names[name], case, i)) for i, case in cases]
            if any(edit is None for _, edit in edits):
                return None
            return [row for case, edit in edits for row in self.validation.rows(case, edit)]

        first = next(iter(cases[0][1].sets))
        chosen, protocol = chosen_setting(list(names), rows_of, first, self.config.cap[task.name])
        failed = {name: text for (label, name), text in self.errors.items() if label == arm.label}
        about = {"arm": arm.label, "method": arm.method, "case": kind, "chosen": chosen}
        self.result.choices.append({**about, "protocol": protocol, "failed": failed})
        return None if chosen is None else names[chosen]

    def _edit(self, arm: Arm, setting: dict[str, Any], case: Case, seed: int) -> Edit | None:
        """Returns an edit, made once per setting and exemplars; None where the method fails."""
        key = arm.label, json.dumps(setting, sort_keys=True), id(case.exemplars)
        if key not in self.edits:
            try:
                self.edits[key] = self.bench.edit(arm, setting, case, 1000 * self.bench.task.seed + seed)
            except CoarError as error:
                self.edits[key] = None
                self.errors[key[:2]] = str(error)
        return self.edits[key]

    def _curve(self, arm: Arm, case: Case, edit: Edit) -> None:
        task = self.bench.task
        sets = {"original": task.test.ordinary, "edited": case.sets[task.success].examples}
        alphas = np.linspace(0, 1, self.config.alphas)
        curve = interpolation_curve(self.bench.model, edit, sets, alphas.tolist(), batch_size=256)
        mean = (curve.values("original") + curve.values("edited")) / 2
        self.result.curves.append(
            {
                "arm": arm.label,
                "case": case.name,
                "alphas": alphas.tolist(),
                "original": curve.values("original").tolist(),
                "edited": curve.values("edited").tolist(),
                "moves": bool(np.ptp(curve.values("original")) + np.ptp(curve.values("edited")) > 0),
                "best_alpha": float(alphas[int(mean.argmax())]),
                "gain_at_best": float(mean.max() - max(mean[0], mean[-1])),
            }
        )

    def run_masks(self) -> None:
        """Compares learned, random and mean masks, all else equal, over densities."""
        masks, task = self.config.masks, self.bench.task
        if self.bench.hypernetwork is None:
            return
        for method, kind in MASKS.items():
            if method not in editor_names():
                continue
            fixed: dict[str, Any] = {"rate": masks.rate, "steps": masks.steps}
            if kind != "random":
                fixed["hypernetwork"] = self.bench.hypernetwork
            arm = Arm(label=kind, method=method, fixed=fixed)
            for density in masks.densities:
                rows: list[Row] = []
                for i, case in enumerate(task.test.cases):
                    edit = self._edit(arm, {"density": density}, case, i)
                    rows += self.test.rows(case, edit)
                keep = (task.success, "ordinary", "locality", "the edited image")
                about = {"mask": kind, "density": density}
                self.result.masks += [{**about, **row} for row in pooled(rows) if row["set"] in keep]


def _of_kind(cases: Sequence[Case], kind: str) -> list[tuple[int, Case]]:
    return [(i, case) for i, case in enumerate(cases) if case.name == kind]


def _hypernetwork(config: Config, model: torch.nn.Module, task: Any, cache: Path) -> str | None:
    """Returns the file of the network's mask hypernetwork, trained where it is not there yet."""
    if not set(MASKS) & set(editor_names()):
        return None
    name = f"masks-{task.name}-{task.network}-seed{task.seed}-{config.masks.training['iterations']}.safetensors"
    path = cache / name
    settings = MetaSettings.preset("code", seed=task.seed, **config.masks.training)
    cache.mkdir(parents=True, exist_ok=True)
    train_hypernetwork(model, last_feed_forward_blocks(model, 3), task.train.inputs(), settings, store=path)
    return str(path)


def _plain(task: Any) -> dict[str, Any]:
    return {
        **task.notes,
        "title": task.title,
        "success": task.success,
        "kept": task.kept,
        "held_out": list(task.held_out),
    }


def _tidy(row: dict[Any, Any]) -> Row:
    """Returns a row with None for NaN, as JSON has it."""
    return {str(k): None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()}
