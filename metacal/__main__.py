"""`python -m metacal` is the command line."""

from __future__ import annotations

from metacal.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
