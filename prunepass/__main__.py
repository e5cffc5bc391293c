"""``python -m prunepass`` and the ``prunepass`` command: the command line, or how to install what it needs."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from prunepass.errors import MissingExtraError


def main() -> None:
    """Run the command line. Exits with code 2 and one line for wrong options, or where its extra is missing."""
    missing = [name for name in ("typer", "rich", "transformers") if find_spec(name) is None]
    if missing:
        sys.stderr.write(f"{MissingExtraError(', '.join(missing), 'cli', 'The prunepass command')}\n")
        raise SystemExit(2)
    from prunepass.cli.app import app

    if len(sys.argv) < 2:
        app()  # prints the help
    try:
        raise SystemExit(app(standalone_mode=False))
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        raise SystemExit(130) from None
    except Exception as error:  # of the parser of options, which typer brings along under changing names
        said = getattr(error, "format_message", None)
        if said is None:
            raise
        help_of = getattr(getattr(error, "ctx", None), "command_path", "prunepass")
        sys.stderr.write(f"error: {' '.join(said().split())} ({help_of} --help shows what there is.)\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
