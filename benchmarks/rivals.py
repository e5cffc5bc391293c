"""What tasks share that run sentence-transformers beside prunepass, in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from prunepass.errors import PruneError

__all__ = ["RIVAL", "beside", "in_brackets", "versions", "why_not"]

RIVAL = "sentence-transformers"
_PACKAGES = ("sentence-transformers", "optimum-intel", "transformers", "openvino")


def why_not(python: str, runners: Sequence[str], others: Sequence[str]) -> str | None:
    """Why it cannot run: it is asked for, and its ``python`` is not given. ``others`` are the runners without it."""
    if RIVAL not in runners or python:
        return None
    return (
        f"{RIVAL} runs in an environment of its own, with sentence-transformers[openvino]: give its --python, or "
        f"leave it out with --runners {','.join(others)}"
    )


def versions(python: str) -> dict[str, str]:
    """Of what takes part in its environment.

    Raises:
        PruneError: there is no such Python, or it lacks a package.
    """
    code = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    try:
        said = subprocess.run([python, "-c", code, *_PACKAGES], check=True, capture_output=True, text=True).stdout
    except OSError as e:
        raise PruneError(f"{python} cannot be run: {e.strerror}. It is to be a Python.") from None
    except subprocess.CalledProcessError as e:
        raise PruneError(f"{python} lacks a package of {RIVAL}[openvino]: {e.stderr.strip()[-200:]}") from None
    return dict(json.loads(said))


def beside(shared: Mapping[str, Any]) -> str:
    """For a page: the versions of a group's other environment, where it had one."""
    others = ", ".join(f"{name} {version}" for name, version in shared["other_versions"].items())
    return f"; {RIVAL}' environment: {others}" if others else ""


def in_brackets(ratio: Sequence[float] | None) -> str:
    """For a page: how many times as fast, with quartiles; empty where nothing was compared."""
    return f"{ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else ""
