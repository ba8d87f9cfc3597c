"""Builds the documentation into `site/`; any warning, a broken link among them, is an error.

    python docs/build.py [--write] [--notebooks] [--out DIR]

`--write` first brings the cards on the pages of methods, and the tables of choices, up to date with the code.
`--notebooks` first runs the notebooks.
"""

import argparse
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]


def main() -> int:
    """Parses the command line and builds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="bring cards and tables up to date first"
    )
    parser.add_argument(
        "--notebooks", action="store_true", help="run the notebooks before building"
    )
    parser.add_argument(
        "--out",
        default=str(DOCS.parent / "site"),
        help="where the site goes (default: site/)",
    )
    options = parser.parse_args()
    if options.write:
        import cards
        import choices

        for path in sorted((DOCS / "methods").glob("*.md")):
            path.write_text(cards.renewed(path.read_text()))
        page = DOCS / "configuration.md"
        page.write_text(choices.renewed(page.read_text()))
    if options.notebooks:
        import percent

        for script in percent.scripts():
            percent.write(script)
    try:
        from sphinx.cmd.build import build_main
    except ImportError:
        print(
            "the site is built by sphinx: python -m pip install '.[docs]'",
            file=sys.stderr,
        )
        return 1
    doctrees = str(Path(options.out) / ".doctrees")
    return build_main(
        ["-q", "-W", "--keep-going", "-d", doctrees, str(DOCS), options.out]
    )


if __name__ == "__main__":
    sys.exit(main())
