"""No pickle is read or written, no code of a model is run, and known vulnerabilities fail `make check`."""

import ast
import json
from pathlib import Path

import pytest
from audit import report_audit

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for name in ("analysis", "defenses") for path in (ROOT / name).rglob("*.py"))
# Modules that make objects of any class from bytes, or run text as code.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "eval", "exec", "os.system", "pickle.load", "yaml.load"}
FORBIDDEN_METHODS = {"read_pickle", "to_pickle"}


def find_breaches(source):
    """Return the lines of a source file that break a rule."""
    breaches = []
    for node in ast.walk(ast.parse(source)):
        keywords = {}
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if {name.partition(".")[0] for name in names} & FORBIDDEN_MODULES:
                breaches.append((node.lineno, "pickle"))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS:
                breaches.append((node.lineno, name))
            loads_model = name.endswith(".from_pretrained") and ("Model" in name or "loader" in name)
            if loads_model and not keywords.keys() & {"gguf_file", "use_safetensors"}:
                breaches.append((node.lineno, f"{name} without use_safetensors"))
        elif isinstance(node, ast.Dict):
            keywords = {
                key.value: value
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            }
        for name, allowed in (
            ("trust_remote_code", False),
            ("allow_pickle", False),
            ("use_safetensors", True),
        ):
            value = keywords.get(name)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is allowed):
                breaches.append((node.lineno, name))
        if isinstance(node, ast.Constant) and node.value == "weights_only":
            breaches.append((node.lineno, "weights_only"))
    return breaches


def test_no_module_unpickles_or_runs_code_of_a_model():
    breaches = {str(path.relative_to(ROOT)): find_breaches(path.read_text("utf-8")) for path in SOURCES}
    assert len(SOURCES) > 100 and {path: found for path, found in breaches.items() if found} == {}


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from joblib import load", "import numpy, dill", "torch.load(path)", "eval(text)"),
        *("load(path, trust_remote_code=True)", "load(path, trust_remote_code=trust)", "x.read_pickle(path)"),
        *("options = {'trust_remote_code': True}", "numpy.load(path, allow_pickle=True)"),
        *("AutoModel.from_pretrained(folder)", "AutoModel.from_pretrained(folder, use_safetensors=None)"),
    ],
)
def test_the_rules_on_sources_find_each_breach(line):
    assert len(find_breaches(line)) == 1


def test_shipped_files_are_no_pickles():
    suffixes = {path.suffix for name in ("data", "figures") for path in (ROOT / name).rglob("*")}
    assert ".jsonl" in suffixes
    assert not suffixes & {".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".joblib", ".npy", ".npz"}


def test_an_audit_fails_for_a_known_vulnerability_only():
    good, bad = {"name": "a", "version": "1", "vulns": []}, {"name": "c", "skip_reason": "not on PyPI"}
    found = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    assert report_audit(json.dumps({"dependencies": [good, found, bad]}), "") == (
        ["b 2: CVE-1, mended in 3", "vulnerabilities: 1 in 2 packages; 1 others are not known to the index"],
        1,
    )
    assert report_audit(json.dumps({"dependencies": [good]}), "") == (["vulnerabilities: 0 in 1 packages"], 0)
    for output, errors in ((json.dumps({"dependencies": [bad]}), ""), ("", "x\nConnectionError: no network")):
        (line,), code = report_audit(output, errors)
        assert line.startswith("vulnerabilities: not checked: ") and code == 0
