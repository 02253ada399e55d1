"""What the extension was built from: compiled in by setup.py, compared with the source that is there.

Stands alone: setup.py runs this file before anything is installed.
"""

from hashlib import sha256
from pathlib import Path

NATIVE = Path(__file__).with_name("native")


def source_digest(directory: Path = NATIVE) -> str:
    """A digest of the C source, ``""`` where it is not there: an installed package does not carry it."""
    digest = sha256()
    files = sorted(directory.glob("*.[ch]"))
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16] if files else ""
