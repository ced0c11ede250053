"""Criteria and methods from outside, as docs/extending.md shows them: known to every command, and to the laws."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_moe.cli.methods import Method, register_method
from lightning_moe.criteria import register
from lightning_moe.errors import InputError
from tests.helpers.checkpoint import read

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the document, installed."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "my_criteria.py").write_text("\n".join(code for name, code in BLOCKS if name == "my_criteria.py"))
    (folder / "my_criteria-1.0.dist-info").mkdir()
    (folder / "my_criteria-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: my-criteria\n")
    (folder / "my_criteria-1.0.dist-info" / "entry_points.txt").write_text(
        "[lightning_moe]\nmy-criteria = my_criteria\n"
    )
    return folder


def python(package: Path, *args: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{package}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_every_command_knows_them(package: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    data = f"'--model.path', {str(checkpoint)!r}, '--data.path', {str(text)!r}, '--data.seq_len', '32'"
    common = f"[{data}, '--data.samples', '12', '--trainer.accelerator', 'cpu', '--out', {str(tmp_path)!r}]"
    program = (
        "from lightning_moe.cli.main import main\n"
        f"common = {common}\n"
        "main(['score', *common])\n"
        "main(['prune', *common, '--method', 'first', '--ratio', '0.5'])\n"
        "main(['compare', *common, '--methods', '[mean-weight,first]', '--ratios', '[0.25]'])\n"
    )
    done = python(package, "-c", program)
    assert done.returncode == 0, done.stderr
    scored = read(tmp_path / "scores.json")["methods"]
    assert "mean-weight" in scored and "reap" in scored
    assert all(ids == list(range(len(ids))) for ids in read(tmp_path / "plan.json")["keep"].values())
    rows = read(tmp_path / "compare.json")["cells"]
    assert {row["method"] for row in rows} == {"full", "mean-weight", "first"}
    assert all(row["status"] == "done" for row in rows)


def test_a_script_of_ones_own_knows_them(package: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(next(code for name, code in BLOCKS if name == "mine.py"))
    (tmp_path / "my_criteria.py").write_text((package / "my_criteria.py").read_text())
    data = ("--data.path", text, "--data.seq_len", 32, "--data.samples", 12, "--trainer.accelerator", "cpu")
    out = tmp_path / "out"
    args = ("prune", "--model.path", checkpoint, *data, "--method", "mean-weight", "--ratio", "0.5", "--out", out)
    done = python(tmp_path, tmp_path / "mine.py", *args)
    assert done.returncode == 0, done.stderr
    assert read(out / "plan.json")["made_by"]["method"] == "mean-weight"


def test_the_laws_run_over_them(package: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "mean-weight")
    done = python(package, "-m", "pytest", *options, "tests/criteria")
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 5, done.stdout


def test_a_plugin_that_breaks_is_named_in_one_line(package: Path, tmp_path: Path) -> None:
    (tmp_path / "my_criteria.py").write_text("import nowhere_to_be_found\n")
    done = python(tmp_path, "-c", f"import sys; sys.path.append({str(package)!r}); " + MAIN)
    assert done.returncode == 2
    assert done.stderr == (
        "lightning-moe: the plugin my-criteria (my_criteria) cannot be loaded: ModuleNotFoundError: No module named "
        "'nowhere_to_be_found'; mend or uninstall it.\n"
    )


MAIN = "from lightning_moe.cli.main import main; main(['score'])"


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(InputError, match="two criteria named 'ean'"):
        register("ean", drops="min")(lambda stats: stats.count_E)
    with pytest.raises(InputError, match="two methods named 'diep'"):
        register_method(Method("diep", "", lambda job, ratio, seed, folder: None))  # type: ignore[arg-type, return-value]
