"""The raw text: Debian packages, unpacked, read as documents.

Nothing here needs PyTorch. The packages and why their text may be used are in `MODEL_CARD.md`.
"""

import gzip
import re
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    "python3.11-doc",
    "libpython3.11-stdlib",
    "libpython3.11-testsuite",
    "r-cran-janeaustenr",
    "bible-kjv",
    "bible-kjv-text",
    "jargon-text",
    "dict-devil",
    "golang-1.19-src",
)
BOOK_CHUNK = 20_000  # characters: a book is cut into documents, so that a part can be held out
MAX_FILE = 400_000  # characters: larger source files are generated tables
R_CHARACTER, R_STRINGS = 9, 16  # type numbers of R's serialisation


@dataclass(frozen=True)
class Document:
    """A piece of text, where it came from, and its kind: "prose", "docs" or "code"."""

    source: str
    kind: str
    text: str


def download_packages(folder: Path) -> Path:
    """Download and unpack `PACKAGES` into `folder` with apt and dpkg; return the unpacked root."""
    root = folder / "root"
    if root.exists():
        return root
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    return root


def read_documents(root: Path) -> list[Document]:
    """Every document below the unpacked packages, in a fixed order."""
    return [*read_books(root), *read_manual(root), *read_library(root)]


def read_books(root: Path) -> list[Document]:
    """Austen's novels, the King James Bible, the Jargon File, the Devil's Dictionary, Opticks."""
    books = read_austen(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    books["kjv"] = read_bible(root)
    with gzip.open(root / "usr/share/doc/jargon-text/jargon.txt.gz", "rt", errors="replace") as file:
        books["jargon"] = file.read()
    with gzip.open(root / "usr/share/dictd/devil.dict.dz", "rt", errors="replace") as file:
        books["devil"] = file.read()
    books["opticks"] = (root / "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt").read_text()
    return [
        Document(f"{name}/{number}", "prose", chunk)
        for name, text in books.items()
        for number, chunk in enumerate(cut_at_lines(text, BOOK_CHUNK))
    ]


def read_austen(path: Path) -> dict[str, str]:
    """The novels in R's lazy-load file: per object a 4-byte length and a zlib stream of strings."""
    data, books = path.read_bytes(), {}
    while data:
        stream = zlib.decompressobj()
        lines = read_r_strings(stream.decompress(data[4:]))
        data = stream.unused_data
        books["austen-" + lines[0].lower().replace(" ", "-")] = "\n".join(lines)
    return books


def read_r_strings(raw: bytes) -> list[str]:
    """The first character vector in R's binary (XDR) serialisation."""
    at = raw.index(struct.pack(">I", R_STRINGS))
    count, at, lines = struct.unpack_from(">I", raw, at + 4)[0], at + 8, []
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", raw, at)
        if flags & 0xFF != R_CHARACTER:
            raise ValueError(f"not a string at byte {at}: type {flags & 0xFF}")
        at += 8
        lines.append(raw[at : at + max(length, 0)].decode())
        at += max(length, 0)
    return lines


def read_bible(root: Path) -> str:
    """The King James Version without verse numbers, through the package's own reader."""
    command = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "-f", "gen1:1-rev22:21"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.sub(r"(?m)^[1-3]?[A-Za-z]+\d+:\d+ ", "", output)


def read_manual(root: Path) -> list[Document]:
    """Python's documentation, as reStructuredText."""
    folder = root / "usr/share/doc/python3.11/html/_sources"
    files = sorted(folder.rglob("*.rst.txt"))
    return [Document(str(file.relative_to(folder)), "docs", file.read_text()) for file in files]


def read_library(root: Path) -> list[Document]:
    """Python's standard library and its tests, less generated tables and the copied manual."""
    folder, documents = root / "usr/lib/python3.11", []
    files = [file for file in sorted(folder.rglob("*.py")) if file.is_file() and not file.is_symlink()]
    for file in files:
        name = str(file.relative_to(folder))
        text = file.read_text(errors="replace")
        if not name.startswith(("encodings/", "pydoc_data/")) and 200 < len(text) < MAX_FILE and "\ufffd" not in text:
            documents.append(Document(name, "code", text))
    return documents


def cut_at_lines(text: str, size: int) -> list[str]:
    """Cut `text` at line ends into chunks of at least `size` characters (the last may be shorter)."""
    chunks, start = [], 0
    while start < len(text):
        end = text.find("\n", min(start + size, len(text) - 1)) + 1 or len(text)
        chunks.append(text[start:end])
        start = end
    return chunks
