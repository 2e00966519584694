"""The layout of the packages: which package may import which, and what an import may load.

Imports are read from the syntax trees, those inside functions and under `if TYPE_CHECKING` included.
"""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("analysis", "defenses")
    for path in sorted((ROOT / package).rglob("*.py"))
}
MODEL_LIBRARIES = {"torch", "transformers", "peft", "trl", "datasets", "accelerate"}
PLOT_LIBRARIES = {"matplotlib", "seaborn", "PIL"}
TERMINAL_LIBRARIES = {"rich", "typer", "click"}
IMAGE_MODULES = {"analysis.datasets.images", "analysis.models.vision", "analysis.checkpoints.pixel_share"}
COMPUTING = {
    "stats",
    "files",
    "datasets",
    "checkpoints",
    "models",
    "served",
    "attacks",
    "readouts",
    "judges",
    "run",
    "mechanism",
}

# What each package (or single module) of `analysis` may import of the others.
ALLOWED = {
    "stats": set(),
    "families": set(),
    "plots": {"stats", "families"},
    "files": set(),
    "progress": set(),
    "datasets": {"files"},
    "checkpoints": {"files"},
    "models": {"checkpoints", "files"},
    "served": {"models", "files"},
    "report": {"plots", "stats", "families", "files"},
    "attacks": {"datasets", "files", "image_attacks"},
    "image_attacks": {"datasets"},
    "readouts": {"models", "served"},
    "judges": {"checkpoints", "models", "files", "served"},
    "run": {"datasets", "attacks", "models", "readouts", "stats"},
    "mechanism": {"models", "readouts", "stats"},
}
ALLOWED["studies"] = set(ALLOWED)
ALLOWED["suffix_attack"] = {
    *("attacks", "datasets", "files", "models", "progress", "readouts", "stats", "studies"),
}
ALLOWED["comparison"] = {
    *("attacks", "checkpoints", "models", "plots", "progress", "report", "served", "stats", "studies"),
}
ALLOWED["api"] = {"comparison", "studies", "suffix_attack", "report", "stats", "datasets", "progress"}
ALLOWED["cli"] = {*ALLOWED}
ALLOWED["__main__"] = {"cli"}


def iterate_nodes(tree: ast.AST, inside_functions: bool, type_only: bool):
    """Yield the nodes of a tree, with or without function bodies and type-only blocks."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef) and not inside_functions:
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test) and not type_only:
            continue
        yield child
        yield from iterate_nodes(child, inside_functions, type_only)


def find_imports(source: str, inside_functions: bool = True, type_only: bool = True) -> set[str]:
    """Return the dotted names that a source imports; of `from a import b` a, and a.b where it is ours."""
    names = set()
    for node in iterate_nodes(ast.parse(source), inside_functions, type_only):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "a relative import"
            names.add(node.module)
            names |= {f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in FILES}
    return names


def imports_of(module: str, **options: bool) -> set[str]:
    """Return what one of our modules imports."""
    return find_imports(FILES[module].read_text("utf-8"), **options)


def top_packages(names: set[str]) -> set[str]:
    """Return the top-level packages of dotted names."""
    return {name.split(".")[0] for name in names}


def package_of(module: str) -> str:
    """Return the package of a module of `analysis`: `analysis.stats.effects` is in stats."""
    return module.split(".")[1]


def list_modules(*packages: str) -> list[str]:
    """Return the modules of packages of `analysis`."""
    return [name for name in FILES if name.startswith("analysis.") and package_of(name) in packages]


def package_imports() -> dict[tuple[str, str], set[str]]:
    """Return which modules make one package of `analysis` import another."""
    found = defaultdict(set)
    for module in FILES:
        if not module.startswith("analysis."):
            continue
        for name in imports_of(module):
            if name.startswith("analysis.") and package_of(name) != package_of(module):
                found[package_of(module), package_of(name)].add(module)
    return found


def test_the_walk_finds_imports_inside_functions_and_classes():
    source = "import a.b\ndef f():\n    from c import d\n    class E:\n        import e\n"
    assert find_imports(source) == {"a.b", "c", "e"}
    assert find_imports(source, inside_functions=False) == {"a.b"}
    assert "analysis.stats.tables" in imports_of("analysis.run")
    assert "torch" in imports_of("analysis.models.loading")


def test_every_module_belongs_to_a_package_of_the_table():
    assert {package_of(name) for name in FILES if name.startswith("analysis.")} == set(ALLOWED)


def test_packages_import_only_what_the_table_allows():
    forbidden = {
        pair: modules for pair, modules in package_imports().items() if pair[1] not in ALLOWED[pair[0]]
    }
    assert {pair: sorted(modules) for pair, modules in forbidden.items()} == {}


def test_no_circle_between_packages():
    graph = defaultdict(set)
    for importer, imported in package_imports():
        graph[importer].add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"packages import each other: {error.args[1]}")


def test_no_circle_between_modules():
    """At import time; imports inside functions and type-only imports aside."""
    options = {"inside_functions": False, "type_only": False}
    packages = {name for name, path in FILES.items() if path.name == "__init__.py"}
    graph = {name: (imports_of(name, **options) & set(FILES)) - packages for name in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {error.args[1]}")


def test_a_package_holds_twenty_one_modules_at_most():
    """`stats` and `studies` have one module per question, the comparison of data sets among them."""
    counts = defaultdict(int)
    for name, path in FILES.items():
        if name.startswith("analysis.") and path.name != "__init__.py":
            counts[path.parent.relative_to(ROOT).as_posix()] += 1
    assert {package: count for package, count in counts.items() if count > 21} == {}


def test_module_names_are_unique_nouns_without_gerunds():
    stems = [path.stem for path in FILES.values()]
    allowed = {"loading", "training", "steering", "tuning", "refactoring", "decoding", "voting"}
    allowed |= {"patching", "weight_patching", "thinking"}  # the field calls them so
    assert {stem for stem in stems if stem.endswith("ing")} <= allowed


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("defenses")])
def test_defenses_import_nothing_of_analysis(module):
    allowed = {"torch", "transformers", "peft", "safetensors", "huggingface_hub", "defenses"}
    allowed |= {"PIL", "numpy", "rapidocr"}  # images
    allowed |= set(sys.stdlib_module_names)
    if module.startswith("defenses.training"):
        allowed |= {"trl", "datasets"}
    assert top_packages(imports_of(module)) <= allowed


def test_statistics_use_numeric_libraries_only():
    allowed = {"numpy", "pandas", "scipy", "sklearn", "sacrebleu", "jaxtyping", "analysis"}
    for module in list_modules("stats"):
        assert top_packages(imports_of(module)) <= allowed | set(sys.stdlib_module_names), module


def test_plots_and_reports_load_no_model():
    for module in list_modules("plots", "report"):
        assert not top_packages(imports_of(module)) & (MODEL_LIBRARIES | {"transformer_lens"}), module
    for module in list_modules("plots"):
        assert "defenses" not in top_packages(imports_of(module)), module
    assert not top_packages(imports_of("analysis.plots.data")) & PLOT_LIBRARIES


def test_computing_packages_draw_and_print_nothing():
    for module in list_modules(*COMPUTING):
        reads_images = module in IMAGE_MODULES
        forbidden = (PLOT_LIBRARIES | TERMINAL_LIBRARIES) - ({"PIL"} if reads_images else set())
        assert not top_packages(imports_of(module)) & forbidden, module


def test_only_the_components_of_mechanism_import_transformer_lens():
    users = {name for name in FILES if "transformer_lens" in top_packages(imports_of(name))}
    assert users == {"analysis.mechanism.components"}


def test_nothing_imports_the_top_level_folder_of_data():
    assert not any("data" in top_packages(imports_of(name)) for name in FILES)


@pytest.mark.parametrize(
    ("module", "not_loaded"),
    [
        ("analysis.plots.scores", MODEL_LIBRARIES | {"transformer_lens", "defenses"}),
        ("analysis.datasets.loading", MODEL_LIBRARIES | PLOT_LIBRARIES | {"pandas"}),
        ("analysis.studies.analyze", {"matplotlib", "seaborn", "transformer_lens", "sklearn", "scipy.stats"}),
        ("analysis.plots.figures", MODEL_LIBRARIES | {"sklearn", "scipy.stats"}),
        ("analysis.stats.effects", MODEL_LIBRARIES | PLOT_LIBRARIES | {"transformer_lens", "defenses"}),
        (
            "analysis.cli.main",
            MODEL_LIBRARIES | PLOT_LIBRARIES | {"transformer_lens", "pandas", "numpy", "scipy"},
        ),
        ("defenses", MODEL_LIBRARIES | PLOT_LIBRARIES | {"transformer_lens", "pandas", "analysis"}),
    ],
)
def test_an_import_loads_no_more_than_it_needs(module, not_loaded):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & not_loaded
