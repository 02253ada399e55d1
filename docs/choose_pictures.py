"""Keeps the pictures that docs/operators-page.md shows, of all that the tests take, and makes them small.

    python docs/choose_pictures.py docs/images        # what `make screenshots` does at its end

Smaller by far with pngquant (Debian's package of that name); without it they are as the browser wrote them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

AS_SMALL = 98
"""pngquant's status for a picture that would not become smaller."""
PAGE = Path(__file__).parent / "operators-page.md"


def main(directory: Path) -> None:
    shown = set(re.findall(r"\]\(images/([\w-]+\.png)\)", PAGE.read_text(encoding="utf-8")))
    for picture in directory.glob("*.png"):
        if picture.name not in shown:
            picture.unlink()
    if (pngquant := shutil.which("pngquant")) is not None:
        small = ("--force", "--skip-if-larger", "--ext", ".png", "--speed", "1", "--strip", "32")
        for picture in sorted(directory.glob("*.png")):
            done = subprocess.run([pngquant, *small, picture], check=False)  # noqa: S603
            if done.returncode not in (0, AS_SMALL):
                sys.exit(f"pngquant gave up on {picture} ({done.returncode})")
    missing = sorted(shown - {picture.name for picture in directory.glob("*.png")})
    if missing:
        sys.exit(f"no picture was taken of {', '.join(missing)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
