"""Known vulnerabilities of the installed packages (pip-audit), and their list in CycloneDX (build/sbom.json).

Run by `make check`. A vulnerability fails the check. Without a network, or with a package index that does not
answer questions on vulnerabilities, nothing can be said: a line says so, and the check does not fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BILL_OF_MATERIALS = Path(__file__).parents[1] / "build" / "sbom.json"


def main() -> int:
    """Write the list of packages, print what is known of them, and return the exit code."""
    BILL_OF_MATERIALS.parent.mkdir(exist_ok=True)
    run_module("cyclonedx_py", "environment", "--of", "JSON", "-o", str(BILL_OF_MATERIALS), check=True)
    print(
        f"{BILL_OF_MATERIALS}: {len(json.loads(BILL_OF_MATERIALS.read_text('utf-8'))['components'])} packages"
    )
    result = run_module("pip_audit", "--local", "--skip-editable", "--progress-spinner", "off", "-f", "json")
    lines, code = report_audit(result.stdout, result.stderr)
    print("\n".join(lines))
    return code


def run_module(name: str, *args: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a module with this Python."""
    return subprocess.run([sys.executable, "-m", name, *args], capture_output=True, text=True, check=check)


def report_audit(output: str, errors: str) -> tuple[Sequence[str], int]:
    """Return lines for the terminal, and 1 if a vulnerability is known, else 0.

    Args:
        output: of pip-audit, in JSON.
        errors: what it wrote to stderr.
    """
    try:
        packages: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError):
        reason = (errors.strip().splitlines() or ["no answer"])[-1]
        return [f"vulnerabilities: not checked: {reason[:200]}"], 0
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        return [f"vulnerabilities: not checked: the index knows none of {len(packages)} packages"], 0
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, mended in "
        f"{', '.join(found['fix_versions']) or 'no version'}"
        for package in audited
        for found in package["vulns"]
    ]
    summary = f"vulnerabilities: {len(lines)} in {len(audited)} packages"
    if unknown := len(packages) - len(audited):
        summary += f"; {unknown} others are not known to the index"
    return [*lines, summary], 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
