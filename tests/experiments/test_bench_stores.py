"""The store benchmark runs, measures what it says, and checks what it reads."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from experiments.bench import stores as bench
from experiments.bench.store_campaigns import Campaign, result, start
from experiments.bench.store_layouts import BLOCK, Matrix, Size, attributions_part, campaign_part
from experiments.bench.store_timing import cold_and_warm, files_of, markdown

SMALL = Size(examples=600, components=40, rows=130, questions=2)


def _numbers(lines: list[str], first: str) -> list[float]:
    """Returns the numbers in the line of a table that begins with a text."""
    (line,) = [line for line in lines if line.startswith(f"| {first} |")]
    return [float(cell.replace(",", "")) for cell in line.split("|")[2:-1] if re.fullmatch(r" *[\d.,]+ *", cell)]


def test_rows_and_columns_of_the_made_up_matrix_are_those_of_its_blocks() -> None:
    matrix = Matrix(7, BLOCK)
    whole = np.concatenate([matrix.rows(0, BLOCK), matrix.rows(BLOCK, BLOCK + 3)])

    np.testing.assert_array_equal(matrix.row(BLOCK + 1), whole[BLOCK + 1])
    np.testing.assert_array_equal(matrix.column(3, len(whole)), whole[:, 3])
    assert not np.array_equal(whole[0], whole[BLOCK])


def test_attributions_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    lines = attributions_part(tmp_path, SMALL)

    files, *times = _numbers(lines, "blocks, as written")
    assert files > 3 * (7 + 1), "blocks of seven arrays, their marks, and metadata"
    assert len(times) == 6
    assert min(times) >= 0
    assert _numbers(lines, "numpy memmap, C order")[-2:] == [1.0, 1.0]
    assert list(tmp_path.iterdir()) == []


def test_campaigns_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    lines = campaign_part(tmp_path, Size(examples=1_100, components=40, rows=130, questions=2))

    assert len(_numbers(lines, "with a column copy")) == 7
    assert _numbers(lines, "numpy memmap")[0] == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_is_compared_with_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Matrix, "column", lambda self, j, rows: np.zeros(rows, dtype=np.float32))

    with pytest.raises(AssertionError, match="not equal"):
        attributions_part(tmp_path, SMALL)


def test_cold_and_warm_call_every_reader(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    calls: list[int] = []

    cold, warm = cold_and_warm([lambda: calls.append(1), lambda: calls.append(2)], tmp_path)

    assert calls == [1, 1, 1, 2, 2]
    assert min(cold, warm) >= 0
    assert files_of(tmp_path) == files_of(tmp_path / "a") == [tmp_path / "a"]
    assert markdown(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | ---: |", "| 1 | 2 |", ""]


def test_too_small_a_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage())

    with pytest.raises(SystemExit, match=r"has 0 GiB free, 0 are needed\. Name another --folder\."):
        bench.main(["--quick", "--folder", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_tells_what_it_did(tmp_path: Path) -> None:
    campaign = Campaign(rows=3, examples=4, pixels=32, block_rows=2, batch=4)

    run = result(start(campaign, tmp_path / "c.zarr", 1))
    again = result(start(campaign, tmp_path / "c.zarr", 1))

    assert (run.rows, again.rows) == (3, 0)
    assert 0 < run.computing < run.seconds < 100
    assert run.peak > 50 * 2**20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quick_benchmark_runs_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "stores.md"

    bench.main(["--quick", "--folder", str(tmp_path), "--output", str(output)])

    text = output.read_text(encoding="utf-8")
    assert capsys.readouterr().out == text + "\n"
    assert [line for line in text.splitlines() if line.startswith("## ")][2:] == [
        "## What the store costs a campaign: resnet18 at 32 px",
        "## Two workers beside one: resnet18 at 32 px",
        "## Cost as a campaign grows: resnet18 at 32 px",
    ]
    assert "the same bytes" in text
    assert [path.name for path in tmp_path.iterdir()] == ["stores.md"]
