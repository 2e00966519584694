"""The wheel contains two packages and the data, and works without a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the source files."""
    source, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("analysis", "defenses", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr + result.stdout
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with only the wheel installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder),
    ]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return folder


def run_installed(installed, code, *args):
    """Run code with the installed packages first, outside the checkout."""
    env = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=installed).stdout


def test_the_top_level_is_two_packages_and_the_metadata(wheel):
    top_level = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    (metadata,) = top_level - {"analysis", "defenses"}
    assert metadata.startswith("refusalscope-") and metadata.endswith(".dist-info")
    assert {"analysis", "defenses"} <= top_level


def test_it_contains_every_module_and_every_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("analysis", "defenses"):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")} <= names
    data = [path.relative_to(ROOT / "data") for path in (ROOT / "data").rglob("*") if path.is_file()]
    assert {f"analysis/data/{path}" for path in data} <= names
    assert {"analysis/data/contrast.jsonl", "analysis/data/contrast-v1.jsonl"} <= names
    page = [path.relative_to(ROOT) for path in (ROOT / "analysis" / "report" / "page").iterdir()]
    assert {str(path) for path in page} <= names and len(page) >= 3
    assert not [name for name in names if name.startswith("analysis/data/") and name.endswith(".py")]
    assert not [name for name in names if "test" in name.split("/")[0]]


def test_the_command_is_an_entry_point_and_the_license_is_included(wheel):
    archive = zipfile.ZipFile(wheel)
    (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "analyze = analysis.cli.main:main" in archive.read(entry).decode()
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
    assert any(name.endswith("LICENSE") for name in archive.namelist())


def test_it_finds_its_data_outside_the_checkout(installed):
    code = (
        "import analysis; from analysis import data_folder;"
        "from analysis.datasets.loading import load_queries;"
        "from defenses.catalog import list_defense_names;"
        "print(analysis.__file__, data_folder());"
        "print(len(load_queries('contrast').queries), len(list_defense_names()))"
    )
    module, folder, queries, names = run_installed(installed, code).split()
    assert Path(module).is_relative_to(installed) and Path(folder) == installed / "analysis" / "data"
    assert queries == "1344" and int(names) >= 11


def test_the_command_runs_from_the_wheel(installed):
    out = run_installed(installed, "from analysis.cli.main import main; main()", "list", "data")
    assert "contrast" in out and "twins" in out
