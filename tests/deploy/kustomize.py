"""Building kustomizations with kubectl, where it is installed and new enough."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ALLOWED_SKIP


def kubectl_builds_components() -> str:
    """Why not, or nothing."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return "kubectl is not installed"
    printed = subprocess.run([kubectl, "version", "--client", "-o", "json"], capture_output=True, text=True)
    version = json.loads(printed.stdout)["clientVersion"]
    return too_old(version["gitVersion"])


def too_old(version: str) -> str:
    """Why this kubectl builds no Components; nothing when it does."""
    major, minor = map(int, re.findall(r"\d+", version)[:2])
    return f"{ALLOWED_SKIP}: {version} builds no Components" if (major, minor) < (1, 21) else ""


needs_kubectl = pytest.mark.skipif(bool(why := kubectl_builds_components()), reason=why or "kubectl is here")


def build(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["kubectl", "kustomize", str(directory)], capture_output=True, text=True, timeout=60
    )
