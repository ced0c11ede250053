"""The shape of the project: what is installed, which room imports which, and that every config is parsed."""

from __future__ import annotations

import ast
import importlib
import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_moe.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_moe"

# A room imports from those before it. Rooms in one line do not know each other.
ROOMS: list[set[str]] = [
    {"version", "errors", "files"},
    {"moe"},
    {"strategies"},
    {"data"},
    {"stats"},
    {"criteria"},
    {"pruning"},
    {"modules"},
    {"search"},
    {"callbacks"},
    {"evaluation", "report"},
    {"reference"},
    {"cli"},
]


def sources() -> Iterator[Path]:
    """Every Python file of the package; the callbacks are found through their link."""
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        yield from (Path(folder) / name for name in sorted(files) if name.endswith(".py"))


def room_of(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and name of all that is imported, wherever in the file it stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def level(room: str) -> int:
    return next(number for number, rooms in enumerate(ROOMS) if room in rooms)


def test_every_package_on_disk_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {".".join(file.parent.relative_to(ROOT).parts) for file in sources() if file.name == "__init__.py"}
    assert sorted(settings["packages"]) == sorted(on_disk)
    assert settings["package-dir"] == {"lightning_moe.callbacks": "callbacks"}
    folders = {file.parent for file in sources()}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_callbacks_have_one_name() -> None:
    link = PACKAGE / "callbacks"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "callbacks"
    assert not Path(os.readlink(link)).is_absolute()  # noqa: PTH115 - the link as it is written
    module = importlib.import_module("lightning_moe.callbacks.hf_checkpoint")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / "callbacks" / "hf_checkpoint.py"
    assert module.HFCheckpoint.__module__ == "lightning_moe.callbacks.hf_checkpoint"
    for file in [
        *sources(),
        *(ROOT / "callbacks").glob("*.py"),
        *ROOT.glob("*.py"),
        *(ROOT / "configs").rglob("*.yaml"),
    ]:
        text = file.read_text()
        assert "from callbacks" not in text
        assert "class_path: callbacks." not in text


@pytest.mark.parametrize("file", sorted(sources()), ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(file: Path) -> None:
    room = room_of(file)
    for line, name in imports(file):
        first, *rest = name.split(".")
        assert first != "tests", f"{file}:{line}: the package imports its tests"
        if first != "lightning_moe" or not rest:
            continue
        other = rest[0]
        if room == "__init__":
            assert other in {"moe", "version"}, f"{file}:{line}: importing the package must stay cheap"
            continue
        if other == room:
            continue
        assert level(other) < level(room), f"{file}:{line}: {room} imports {other}"


@pytest.mark.parametrize("room", ["callbacks", "moe", "stats", "criteria", "pruning"])
def test_guests_need_no_text_and_no_evaluation(room: str) -> None:
    for file in sources():
        if room_of(file) == room:
            for line, name in imports(file):
                assert not name.startswith(("lightning_moe.data", "lightning_moe.evaluation")), f"{file}:{line}"


def test_modelling_file_needs_us_not() -> None:
    """It travels with non-uniform checkpoints."""
    for _, name in imports(PACKAGE / "moe" / "non_uniform.py"):
        assert name.split(".")[0] in {*sys.stdlib_module_names, "torch"}, name


def test_train_py_is_a_few_lines() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) < 15


def test_console_script() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["lightning-moe"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


def test_files_have_one_idea() -> None:
    for file in sources():
        assert file.name not in {"utils.py", "helpers.py", "common.py", "misc.py"}
        assert len(file.read_text().splitlines()) <= 300, file


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_config_is_parsed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command its first comment names, ``fit`` if it names none."""
    text = config.read_text()
    command = next((name for name in COMMANDS if f"lightning-moe {name}" in text), "fit")
    with pytest.raises(SystemExit) as left:
        main([command, "--config", str(config), "--print_config"])
    said = capsys.readouterr()
    assert left.value.code in (0, None), said.err
    assert "model:" in said.out
