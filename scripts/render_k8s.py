"""Writes k8s/overlays/*/manifest.yaml: the chart, as each overlay's values.yaml renders it. With --check it only says
which of them are not in step."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "tandem"
OVERLAYS = ROOT / "k8s" / "overlays"
RELEASE = NAMESPACE = "tandem"
HEAD = "# Generated from helm/tandem and values.yaml by scripts/render_k8s.py (`make fix`).\n"
HOOK = "helm.sh/hook"
SEPARATOR = re.compile(r"^---[ \t]*(?:#.*)?$", re.MULTILINE)


def overlays(folder: Path = OVERLAYS) -> list[Path]:
    return sorted(values.parent for values in folder.glob("*/values.yaml"))


def manifest(overlay: Path, chart: Path = CHART) -> str:
    """Helm's own text, file by file, without what only Helm can run. SystemExit says what can't lie in git."""
    values = yaml.safe_load((overlay / "values.yaml").read_text(encoding="utf-8"))
    try:
        loaded = helm_python.Chart.load(chart)
        loaded.validate_schema(values)
        files = loaded.render(values, name=RELEASE, namespace=NAMESPACE)
    except helm_python.HelmError as error:
        raise SystemExit(f"{overlay.name}/values.yaml: {error}") from None
    parts = [HEAD]
    for name, text in sorted(files.items()):
        if not name.endswith((".yaml", ".yml")):
            continue
        for document in SEPARATOR.split(text):
            parsed = yaml.safe_load(document)
            if parsed is None or is_test(parsed, f"{overlay.name}, {name}"):
                continue
            if parsed["kind"] == "Secret" and not is_public(parsed, values):
                raise SystemExit(
                    f"{overlay.name}/values.yaml: the chart makes the Secret {parsed['metadata']['name']}, which would "
                    "lie in git; name one that is there (existingSecret)"
                )
            parts.append("---\n" + document.strip("\n") + "\n")
    return "".join(parts)


def is_public(secret: dict[str, Any], values: dict[str, Any]) -> bool:
    """The credentials of the S3 server for trials: it takes any."""
    trial = values.get("s3", {}).get("trial", {}).get("enabled", False)
    return bool(trial) and secret["metadata"]["labels"]["app.kubernetes.io/component"] == "s3"


def is_test(document: dict[str, Any], where: str) -> bool:
    """Of Helm's hooks the chart has tests alone; any other would have to run here too, and nothing would run it."""
    hooks = (document["metadata"].get("annotations") or {}).get(HOOK)
    if hooks not in (None, "test"):
        raise SystemExit(f"{where}: nothing runs the hook {hooks} without Helm")
    return hooks is not None


def stale(folder: Path = OVERLAYS, chart: Path = CHART) -> list[str]:
    """The names of the overlays whose manifest is not what their values render."""
    return [
        overlay.name
        for overlay in overlays(folder)
        if not (overlay / "manifest.yaml").is_file()
        or (overlay / "manifest.yaml").read_text(encoding="utf-8") != manifest(overlay, chart)
    ]


def main() -> None:
    if "--check" in sys.argv:
        if names := stale():
            sys.exit(f"k8s/overlays: {', '.join(names)}: not what helm/tandem and values.yaml render: run `make fix`")
        return
    for overlay in overlays():
        (overlay / "manifest.yaml").write_text(manifest(overlay), encoding="utf-8")


if __name__ == "__main__":
    main()
