"""Who may import whom: the syntax trees are walked, imports inside functions included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ("analysis", "defenses")
    for path in sorted((ROOT / room).rglob("*.py"))
}
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "accelerate"}
DRAWING = {"matplotlib", "seaborn", "PIL"}
STATISTICS = {
    "analysis.tables",
    "analysis.resampling",
    "analysis.decompose",
    "analysis.agreement",
    "analysis.factorial",
    "analysis.ensembles",
    "analysis.voting",
    "analysis.fusion",
    "analysis.outcomes",
    "analysis.kinds",
    "analysis.additivity",
    "analysis.fronts",
    "analysis.cost",
    "analysis.worth",
    "analysis.located",
    "analysis.overlaps",
}
PLOTS = {
    f"analysis.{name}"
    for name in (
        "plots",
        "plane",
        "square",
        "strip",
        "trust",
        "grid",
        "price",
        "forecast",
        "interactions",
        "pareto",
        "panels",
        "depth",
        "transplants",
        "heads",
        "parts",
        "likeness",
        "cuts",
        "wording",
        "ensemble_captions",
        "points",
        "curves",
        "captions",
        "lettering",
        "palette",
        "report",
        "headline",
        "embedded",
        "exhibits",
        "folder",
        "gallery",
        "charted",
        "tabled",
        "cells",
    )
}
ASKING = {
    f"analysis.{n}"
    for n in ("run", "engine", "attention", "models", "checkpoints", "rendering", "readout", "preflight")
}
ASKING |= {
    "analysis.states",
    "analysis.generation",
    "analysis.utility",
    "analysis.answering",
    "analysis.calibrated",
    "analysis.timing",
    "analysis.queries",
    "analysis.query",
    "analysis.rows",
    "analysis.datasets",
    "analysis.published",
    "analysis.copies",
    "analysis.fetching",
    "analysis.attacks",
    "analysis.judge",
    "analysis.refusals",
    "analysis.model_judge",
    "analysis.classifier",
    "analysis.endpoint",
    "analysis.store",
    "analysis.bench",
    "analysis.drafts",
    "analysis.scoring",
    "analysis.batching",
    "analysis.lending",
    "analysis.spoken",
    "analysis.known_models",
}
FRONT = {
    f"analysis.{n}"
    for n in (
        *(
            "cli",
            "commands",
            "request",
            "training",
            "judging",
            "validating",
            "preparing",
            "residuals",
            "sweeping",
            "explaining",
            "validity",
            "reading",
            "kept",
            "arms",
            "backdooralign",
            "redrawn",
            "hearing",
            "tallies",
            "combining",
            "comparing",
            "recommending",
            "pricing",
            "standings",
            "options",
            "asking",
            "cli_app",
            "cli_everyday",
            "cli_studies",
            "cli_weights",
            "reporting",
            "locating",
            "looking",
            "gathered",
            "intervening",
            "findings",
            "analyzing",
            "found",
            "interface",
        ),
        *("manifest", "showing", "saving", "listing"),
    )
}

COMMAND = {name for name in FRONT if name.startswith("analysis.cli")}


def nodes(tree, inside_functions, for_types):
    """Yield the nodes of a tree, without functions and without what only type checkers run, if so wished."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef) and not inside_functions:
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test) and not for_types:
            continue
        yield child
        yield from nodes(child, inside_functions, for_types)


def imports(source, inside_functions=True, for_types=True):
    """Return what a module imports, dotted; `from a import b` gives a, and a.b where that is ours."""
    found = set()
    for node in nodes(ast.parse(source), inside_functions, for_types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in FILES}
    return found


def of(name, **which):
    """Return what one of our modules imports."""
    return imports(FILES[name].read_text("utf-8"), **which)


def tops(names):
    """Return the top-level packages of dotted names."""
    return {name.split(".")[0] for name in names}


def test_the_walk_sees_imports_wherever_they_stand():
    source = "import a.b\ndef f():\n    from c import d\n    class E:\n        import e\n"
    assert imports(source) == {"a.b", "c", "e"}
    assert imports(source, inside_functions=False) == {"a.b"}
    assert "analysis.tables" in of("analysis.run") and "torch" in of("analysis.models")
    assert len(FILES) > 25


def test_every_module_has_a_room_in_the_table():
    ours = {
        name for name in FILES if name.startswith("analysis.") and not name.startswith("analysis.mechanism")
    }
    assert ours <= STATISTICS | PLOTS | ASKING | FRONT, "give the new module a room, here and in DESIGN"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("defenses")])
def test_defenses_know_nothing_of_analysis_tables_or_plots(name):
    allowed = {"torch", "transformers", "peft", "safetensors", "huggingface_hub", "defenses"}
    allowed |= set(sys.stdlib_module_names)
    if name.startswith("defenses.training"):
        allowed |= {"trl", "datasets"}
    assert tops(of(name)) <= allowed


@pytest.mark.parametrize("name", sorted(STATISTICS & set(FILES)))
def test_statistics_take_tables_and_give_tables(name):
    allowed = {"numpy", "pandas", "scipy", "sklearn", "sacrebleu", "jaxtyping"} | set(sys.stdlib_module_names)
    names = of(name)
    assert tops(names) - {"analysis"} <= allowed
    assert {one for one in names if one.startswith("analysis")} <= STATISTICS


@pytest.mark.parametrize("name", sorted(PLOTS & set(FILES)))
def test_plots_know_no_model_and_no_defense(name):
    names = of(name)
    assert not tops(names) & (HEAVY | {"defenses", "transformer_lens"})
    assert {one for one in names if one.startswith("analysis")} <= PLOTS | {
        "analysis.tables",
        "analysis.captions",
        "analysis.ensembles",
        "analysis.fronts",
        "analysis.outcomes",
    }


@pytest.mark.parametrize("name", sorted(ASKING & set(FILES)))
def test_asking_a_model_draws_nothing_and_knows_no_statistics(name):
    names = of(name)
    assert not tops(names) & (DRAWING | {"transformer_lens", "rich", "typer"})
    assert not names & (PLOTS | FRONT | STATISTICS - {"analysis.tables"})


@pytest.mark.parametrize("name", FILES)
def test_only_the_mechanism_room_imports_transformer_lens(name):
    if not name.startswith("analysis.mechanism"):
        assert "transformer_lens" not in tops(of(name))
    else:
        assert not of(name) & (PLOTS | FRONT)
        assert ("transformer_lens" in tops(of(name))) == (name == "analysis.mechanism.lens")


@pytest.mark.parametrize("name", FILES)
def test_nothing_imports_the_command_or_the_data(name):
    front = FRONT if name not in FRONT else COMMAND if name not in COMMAND else set()
    front = front - {"analysis.interface"} if name == "analysis" else front  # late, for notebooks
    assert not of(name) & front
    assert not any(one.split(".")[0] == "data" for one in of(name))


def test_the_command_imports_nothing_heavy_at_its_top():
    light = {"typer", "click", "analysis", "defenses", "rich"} | set(sys.stdlib_module_names)
    command = COMMAND | {"analysis.options", "analysis.asking"}
    for name in command:
        names = of(name, inside_functions=False, for_types=False)
        assert tops(names) <= light
        assert names & set(FILES) <= command | {"analysis", "defenses.errors"}


def test_modules_import_each_other_in_one_direction():
    """At module level, less the package `defenses` itself, whose last line loads its own catalog."""
    left = {
        name: {
            one for one in of(name, inside_functions=False, for_types=False) & set(FILES) if one != "defenses"
        }
        for name in FILES
        if name != "defenses"
    }
    while left:
        free = [name for name, needs in left.items() if not needs & set(left)]
        assert free, f"these import each other: {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("analysis.plots", HEAVY | {"transformer_lens", "defenses"}),
        ("analysis.validity", {"matplotlib", "seaborn", "transformer_lens"}),
        ("analysis.decompose", HEAVY | DRAWING | {"transformer_lens", "defenses"}),
        ("analysis.cli", HEAVY | DRAWING | {"transformer_lens", "pandas", "numpy", "scipy"}),
        ("defenses", HEAVY | DRAWING | {"transformer_lens", "pandas", "analysis"}),
    ],
)
def test_what_an_import_pulls_in(module, without):
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & without
