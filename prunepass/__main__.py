"""``python -m prunepass`` and the ``prunepass`` command: the command line, or how to install what it needs."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from prunepass.errors import MissingExtraError


def main() -> None:
    """Run the command line. Exits with code 2, and the install command, where its extra is missing."""
    missing = [name for name in ("typer", "rich", "transformers") if find_spec(name) is None]
    if missing:
        sys.stderr.write(f"{MissingExtraError(', '.join(missing), 'cli', 'The prunepass command')}\n")
        raise SystemExit(2)
    from prunepass.cli import app

    app()


if __name__ == "__main__":
    main()
