"""The wheel holds two packages and the data, and works where there is no checkout."""

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
    """The wheel, built from a copy of what would be committed."""
    source, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("analysis", "defenses", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel in it and nothing else."""
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


def python(installed, code, *args):
    """Run code with the installed packages first, far from the checkout."""
    env = os.environ | {"PYTHONPATH": str(installed)}
    run = [sys.executable, "-c", code, *args]
    return subprocess.run(run, capture_output=True, text=True, check=True, env=env, cwd=installed).stdout


def test_the_top_level_is_two_packages_and_the_metadata(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    (metadata,) = tops - {"analysis", "defenses"}
    assert metadata.startswith("refusalscope-") and metadata.endswith(".dist-info")
    assert {"analysis", "defenses"} <= tops


def test_every_module_and_every_data_file_is_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for room in ("analysis", "defenses"):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / room).rglob("*.py")} <= names
    data = [path.relative_to(ROOT / "data") for path in (ROOT / "data").rglob("*") if path.is_file()]
    assert {f"analysis/data/{path}" for path in data} <= names
    assert "analysis/data/contrast.jsonl" in names
    page = [path.relative_to(ROOT) for path in (ROOT / "analysis" / "report" / "page").iterdir()]
    assert {str(path) for path in page} <= names and len(page) >= 3
    assert not [name for name in names if name.startswith("analysis/data/") and name.endswith(".py")]
    assert not [name for name in names if "test" in name.split("/")[0]]


def test_the_command_is_an_entry_point_and_the_licence_is_there(wheel):
    archive = zipfile.ZipFile(wheel)
    (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "analyze = analysis.cli.main:main" in archive.read(entry).decode()
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
    assert any(name.endswith("LICENSE") for name in archive.namelist())


def test_it_finds_its_data_outside_of_the_checkout(installed):
    code = (
        "import analysis, defenses; from analysis.datasets.loading import load_queries; from analysis.files import data_folder; from defenses.catalog import list_defense_names;"
        "print(analysis.__file__, data_folder());"
        "print(len(load_queries('contrast').queries), len(list_defense_names()))"
    )
    module, folder, queries, names = python(installed, code).split()
    assert Path(module).is_relative_to(installed) and Path(folder) == installed / "analysis" / "data"
    assert queries == "600" and int(names) >= 11


def test_the_command_runs_from_it(installed):
    out = python(installed, "from analysis.cli.main import main; main()", "list", "data")
    assert "contrast" in out and "twins" in out
