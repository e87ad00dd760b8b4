# ruff: noqa: E501  # a mistake is a line
"""Do the tests notice mistakes? Puts 60 of them into a copy of the packages, one at a time, and runs the nearest tests.

    python -m experiments.mutants                 # this tree's tests
    python -m experiments.mutants --tests ../old  # those of another tree, on the same mistakes
    python -m experiments.mutants weights ridge   # only mistakes whose name begins so

A mistake is found by its text, wherever the file lies; tests by their file names, wherever they lie. A mistake is
killed if a test fails. Prints a table; ends with 1 if a mistake survives.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
REWRITE = "ignore::pytest.PytestAssertRewriteWarning"  # of what is imported before, to start faster
PACKAGES = ("stores", "ablate", "coar")
HEAVY = ("torch", "torchvision", "timm", "zarr", "pandas", "scipy.stats", "sklearn.datasets", "numba",
         "pytest", "matplotlib.pyplot", "tensorstore", "typer")  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A mistake: what it is called, the text it replaces (there once in all packages), by what, and who should see."""

    name: str
    old: str
    new: str
    tests: str  # names of test files without `test_` and `.py`


MUTANTS = [
    # which components are ablated
    Mutant("plan: boundary", "np.asarray(words >= threshold)", "np.asarray(words > threshold + np.uint64(2**62))", "keep_plan"),
    Mutant("plan: row of the key", "[self.seed, i], dtype", "[self.seed, 0], dtype", "keep_plan"),
    Mutant("plan: fraction in turn", "self.fractions[i % len(self.fractions)]", "self.fractions[0]", "keep_plan"),
    Mutant("plan: seed not told", '"seed": int(self.seed),', '"seed": 0,', "keep_plan campaign_spec"),
    # weight gating
    Mutant("weights: rows left closed", "if self.closed is not None and len(self.closed):", "if False:", "weight_gates engine_invariance engine_exact"),
    Mutant("weights: width of a component", "closed[:, None] * port.width +", "closed[:, None] +", "weight_gates component_kinds"),
    Mutant("weights: the bias stays", "bias = bias * branch if self.out_mean", "bias = bias if self.out_mean", "weight_gates exactness_uses"),
    Mutant("weights: mean inside", "(1 - inside) * self.in_mean", "inside * self.in_mean", "ablations weight_gates"),
    Mutant("weights: mean outside", "torch.lerp(plain if self.out_mean is None else self.out_mean, bias, outside)", "torch.lerp(plain, bias, outside)", "ablations weight_gates"),
    Mutant("weights: owner of a component", "bisect_right(self._firsts, component) - 1", "bisect_right(self._firsts, component) - 2", "replay weight_gates"),
    Mutant("weights: nothing restored", "            finally:\n                loops.gated_model.weights.restore()", "            finally:\n                pass", "engine_invariance weight_gates untouched engine_exact gating"),
    # the engine
    Mutant("engine: padding kept", "inputs, self.batch_size))[: len(targets)]", "inputs, self.batch_size))[-len(targets) :]", "engine_exact engine_invariance"),
    Mutant("engine: rows beside each other", "gates.repeat_interleave(each, dim=0)", "gates.repeat(each, 1)", "engine_exact engine_property"),
    Mutant("engine: short stack", "values[: stack - short]", "values[short:]", "engine_exact engine_property"),
    Mutant("engine: auto is weights", 'by_gates |= self.mode == "activation"', 'by_gates |= self.mode == "activations"', "engine_exact gating activation_gating"),
    Mutant("engine: fold without epsilon", "torch.rsqrt(norm.running_var + norm.eps)", "torch.rsqrt(norm.running_var)", "exactness_uses speed engine_exact gating"),
    Mutant("engine: normalised twice", "self.examples.normalize is not None and not self.inputs.is_floating_point()", "self.examples.normalize is not None", "image_data examples_data engine_exact"),
    Mutant("engine: chunk of a budget", "max(1, fitting // batch_size) * batch_size", "max(1, fitting)", "many_examples engine_invariance"),
    Mutant("engine: finite is not asked", "return finite_outputs(result.cpu(), examples)\n\n    def _per_example", "return result.cpu()\n\n    def _per_example", "engine_errors stopped_by_errors"),
    Mutant("engine: memory unasked", "fitting = budget // each", "fitting = 2 * budget // each", "many_examples"),
    # outputs
    Mutant("output: margin of the others", "own - others.amax(dim=1, keepdim=True)", "own - others.mean(dim=1, keepdim=True)", "outputs"),
    Mutant("output: sign of the one logit", "torch.where(targets == 1, logit, -logit)", "torch.where(targets == 0, logit, -logit)", "outputs single_outputs"),
    Mutant("output: likelihood", "return -F.cross_entropy(class_logits(logits), targets", "return F.cross_entropy(class_logits(logits), targets", "outputs"),
    Mutant("output: unscored tokens", "scored = targets >= 0", "scored = targets > 0", "outputs pixels_and_tokens"),
    # stores
    Mutant("store: digest without names", 'hasher.update(f"{name}:{value.dtype.str}:{value.shape};".encode())', "pass", "campaign_store attribution_store old_format"),
    Mutant("store: digest unread", "if _digest(values) != mark.tobytes():", "if False:", "damage campaign_store"),
    Mutant("store: mark is not flushed", "objects.flush(self.store, [key])", "pass", "kill campaign_store creating"),
    Mutant("store: zeros are a mark", "if found is not None and not any(found):", "if False:", "damage campaign_store kill"),
    Mutant("store: empty file unseen", "        if size == 0:\n            raise self._damaged", "        if False:\n            raise self._damaged", "damage campaign_store"),
    Mutant("store: forgets the mark only", "        for name in self.arrays:\n            objects.delete(self.store, self._file(name, block))\n", "", "repair maintenance damage campaign_store"),
    Mutant("store: copy of other blocks", 'or mark.get("source") != source or', "or", "compact damage untrusted"),
    Mutant("store: copy that costs more", "if costs[best] * WORTH_IT >", "if costs[best] * WORTH_IT <", "compact layout"),
    Mutant("store: slice of positions", "np.arange(positions[0], positions[0] + len(positions))):", "np.sort(positions)):", "reading campaign_store views"),
    Mutant("store: partial files are names", 'if not name.endswith(".partial") and not is_foreign(name)', "if not is_foreign(name)", "foreign_files kill creating worklog"),
    Mutant("store: way out of the store", 'if any(part in ("", ".", "..") for part in key.split("/"))', "if False", "untrusted places worklog"),
    Mutant("network: give up at once", "if not fault.may_pass or passed + pause > self.server.patience:", "if True:", "network_faults places"),
    Mutant("network: a lost answer is an error", "                if await there(key):\n                    return\n", "", "network_faults object_storage places"),
    Mutant("network: credentials shown", 'redact(str(error)).partition("\\n\\nDebug source:")[0]', 'str(error).partition("\\n\\nDebug source:")[0]', "object_storage places"),
    # work
    Mutant("work: lease of the living", "if holder != self.id and self._is_stale(holder):", "if holder != self.id:", "worklog queue workers"),
    Mutant("work: lease never stale", "return now - since > record.lease_seconds", "return False", "worklog queue clocks workers"),
    Mutant("work: releases any lease", "        if self._holder(key) == self.id:\n            objects.delete", "        if True:\n            objects.delete", "worklog queue"),
    Mutant("work: tries not counted", "tries >= self.sharing.most_failures or isinstance", "isinstance", "queue workers stopped_by_errors campaign_run"),
    Mutant("work: goes on without being asked", "if not self.sharing.keep_going or nothing_works:", "if nothing_works:", "stopped_by_errors campaign_run"),
    Mutant("work: failure remembered", "self.log.forget_failure(block)", "pass", "queue workers worklog cli_workers"),
    # estimators
    Mutant("ridge: penalty", "1.0 - missed / np.where(constant, 1.0, total)", "1.0 + missed / np.where(constant, 1.0, total)", "regression fit_store estimate"),
    Mutant("ridge: freedom", "np.sqrt(residual / np.maximum(spectrum.freedom", "np.sqrt(residual * np.maximum(spectrum.freedom", "regression ridge"),
    Mutant("ridge: first of several", "chosen[undecided] = count - 1 - np.argmin(errors[::-1], axis=0)", "chosen[undecided] = np.argmax(errors, axis=0)", "ridge regression"),
    Mutant("lasso: threshold", "np.sign(pull) * max(abs(pull) - penalty, 0.0) / G[j, j]", "np.sign(pull) * max(abs(pull) - penalty / 2, 0.0) / G[j, j]", "lasso"),
    Mutant("gradient: closed share", "(self.ablate_fraction - in_s / 2) / (1 - in_s)", "self.ablate_fraction - in_s / 2", "gate_design gradient"),
    Mutant("gradient: the same gates again", "(start + round_number * GOLDEN) % 1.0", "start % 1.0", "gate_design gradient"),
    Mutant("gradient: slope", "np.where(kept_count > 0, kept, total) / np.maximum", "total / np.maximum", "gradient gradient_sums shrinkage"),
    Mutant("gradient: shrinks all the way", "signal / (signal + variances + TINY) * estimates", "0.0 * estimates", "shrinkage gradient"),
    Mutant("gradient: odd and even", "between**2 / (1 / even + 1 / odd)", "between**2 / (1 / even)", "shrinkage gradient"),
    Mutant("evaluation: undefined counted", "int((~np.isfinite(self.correlations)).sum())", "0", "evaluate"),
    # edits
    Mutant("edit: half an ablation", "weight * (1.0 - alpha), weight)", "weight * alpha, weight)", "operations edit"),
    Mutant("edit: scale of all weights", "torch.lerp(exact, exact * self.factor, alpha).to(weight.dtype), weight)", "torch.lerp(exact, exact * self.factor, alpha).to(weight.dtype), exact.to(weight.dtype) * self.factor)", "operations edit"),
    Mutant("edit: a mask of no use", "weight.grad = _gradient(weight) * mask", "weight.grad = _gradient(weight)", "training finetune mask_editor"),
    Mutant("edit: a schedule of no use", 'group["lr"] = plan.rate * plan.schedule(step)', 'group["lr"] = plan.rate', "training schedules"),
    # the command line
    Mutant("command line: exit code", "_fail(error, MISMATCH)", "_fail(error, BAD_INPUT)", "cli cli_campaign"),
    Mutant("command line: notes unsaid", '*getattr(error, "__notes__", [])', "", "cli cli_campaign cli_workers"),
]  # fmt: skip


def _copy(place: Path, tests: Path) -> None:
    """Makes a tree of this one's packages and of the tests of `tests`."""
    for name in (*PACKAGES, "experiments", "docs"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tests / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, place / name)


def _source(place: Path, mutant: Mutant) -> Path:
    """Returns the one file that has the mutant's text."""
    files = [file for package in PACKAGES for file in sorted((place / package).rglob("*.py"))]
    found = [file for file in files for _ in range(file.read_text(encoding="utf-8").count(mutant.old))]
    if len(found) != 1:
        raise SystemExit(f"{mutant.name}: its text is there {len(found)} times: {mutant.old!r}")
    return found[0]


def _tests(place: Path, mutant: Mutant) -> list[Path]:
    """Returns the test files of a mutant, in its order; a name that no file has is left out."""
    return [file for name in mutant.tests.split() for file in sorted((place / "tests").rglob(f"test_{name}.py"))]


def _run(place: Path, files: list[Path]) -> int:
    """Runs pytest in a forked process, which need not import what does not change; returns its exit code."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        log = os.open(place / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(place)
        os.environ["PYTHONPATH"] = str(place)
        sys.path[:] = [str(place), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
        try:
            pytest = importlib.import_module("pytest")
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", REWRITE, *map(str, files)]))
        except BaseException:  # else this copy of the process would go on as its parent
            traceback.print_exc()
            code = 3
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _judge(place: Path, mutant: Mutant) -> tuple[str, float]:
    """Returns what became of a mutant, and the seconds that took."""
    source = _source(place, mutant)
    before = source.read_text(encoding="utf-8")
    source.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    began = time.monotonic()
    try:
        code = _run(place, _tests(place, mutant))
    finally:
        source.write_text(before, encoding="utf-8")
    verdicts = {0: "survived", 1: "killed"}
    return verdicts.get(
        code, f"killed (exit code {code})" if code < 0 else f"no verdict ({code})"
    ), time.monotonic() - began


def main() -> None:
    """Judges the mutants and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only mutants whose name begins so")
    parser.add_argument("--tests", type=Path, default=ROOT, help="the tree whose tests are run")
    parser.add_argument("--check", action="store_true", help="only find their texts and tests")
    given = parser.parse_args()
    chosen = [m for m in MUTANTS if not given.names or m.name.startswith(tuple(given.names))]
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True  # a changed file must not be taken for the one before it
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        place = Path(folder)
        _copy(place, given.tests)
        for mutant in chosen:
            print(f"{mutant.name:38} {_source(place, mutant).relative_to(place)}") if given.check else None
        if given.check:
            return
        for name in HEAVY:
            importlib.import_module(name)
        survived = 0
        for mutant in chosen:
            verdict, seconds = _judge(place, mutant)
            survived += not verdict.startswith("killed")
            tests = ", ".join(file.stem.removeprefix("test_") for file in _tests(place, mutant))
            print(f"| {mutant.name} | {verdict} | {seconds:.0f} s | {tests} |", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} killed")
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()
