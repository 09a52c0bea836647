"""Write files that are pictures of every kind, and 7 % that are none.

Usage: ``python make_pictures.py OUT_DIR COUNT``. The files are seeded and small and lie in ``OUT_DIR/files``,
in the folders ``label=0`` and ``label=1``. ``OUT_DIR/manifest.json`` has an object for each: ``path`` below
``files``, ``kind``, and for good ones ``format``, ``height``, ``width`` and ``channels``, upright.
A folder that is already there is left alone; it is written beside its place and renamed into it.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage import data as photographs

BAD_SHARE = 0.07
SIDE = 30_000  # of a bomb
ORIENTATION = 0x112  # EXIF's tag


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the picture as a file."""
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """Return a PNG of compressed ``rows``; also one that lies about its size."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def black(side: int) -> bytes:
    """Return a whole PNG of ``side`` x ``side`` black points, one bit each."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    rows = [packer.compress(row * 100) for _ in range(side // 100)] + [packer.compress(row * (side % 100))]
    return png(side, side, 1, 0, b"".join(rows) + packer.flush())


def sixteen_bits(grey: np.ndarray) -> bytes:
    """Return a grey PNG of 16 bits; the upper 8 are ``grey``."""
    values = grey.astype(np.uint16) * 256 + 77
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(grey.shape[1], grey.shape[0], 16, 0, zlib.compress(rows))


def with_alpha(picture: Image.Image) -> Image.Image:
    """Return the picture with an alpha channel that runs from left to right."""
    ramp = np.linspace(0, 255, picture.width).astype(np.uint8)
    picture = picture.copy()
    picture.putalpha(Image.fromarray(np.tile(ramp, (picture.height, 1))))
    return picture


def transparent(picture: Image.Image) -> bytes:
    """Return a PNG whose palette has a colour that is not there."""
    return encoded(picture.quantize(32), "PNG", transparency=3)


def turned(picture: Image.Image, orientation: int) -> bytes:
    """Return a JPEG that says how it is to be turned."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(picture, "JPEG", quality=92, exif=exif)


def animated(picture: Image.Image) -> bytes:
    """Return a GIF of three frames, the first of which is the picture."""
    frames = [picture.transpose(Image.Transpose.ROTATE_180), picture.convert("L").convert("RGB")]
    return encoded(picture, "GIF", save_all=True, append_images=frames, duration=100)


def damaged(file: bytes, after: bytes, offset: int) -> bytes:
    """Return the file with one byte after a mark changed."""
    at = file.index(after) + len(after) + offset
    return file[:at] + bytes([file[at] ^ 0x55]) + file[at + 1 :]


def cut(file: bytes, percent: int) -> bytes:
    """Return the beginning of the file."""
    return file[: len(file) * percent // 100]


# Kind, format, channels and how the file is made of an RGB picture.
GOOD: list[tuple[str, str, int, Callable[[Image.Image], bytes]]] = [
    ("jpeg", "JPEG", 3, lambda p: encoded(p, "JPEG", quality=90)),
    ("jpeg of full colour", "JPEG", 3, lambda p: encoded(p, "JPEG", quality=95, subsampling=0)),
    ("jpeg, progressive", "JPEG", 3, lambda p: encoded(p, "JPEG", quality=90, progressive=True)),
    ("jpeg, grey", "JPEG", 1, lambda p: encoded(p.convert("L"), "JPEG", quality=90)),
    ("jpeg, cmyk", "JPEG", 3, lambda p: encoded(p.convert("CMYK"), "JPEG", quality=90)),
    *((f"jpeg, turned {o}", "JPEG", 3, lambda p, o=o: turned(p, o)) for o in range(1, 9)),
    ("png", "PNG", 3, lambda p: encoded(p, "PNG")),
    ("png, grey", "PNG", 1, lambda p: encoded(p.convert("L"), "PNG")),
    ("png, palette", "PNG", 3, lambda p: encoded(p.quantize(32), "PNG")),
    ("png, palette with a transparent colour", "PNG", 4, transparent),
    ("png, alpha", "PNG", 4, lambda p: encoded(with_alpha(p), "PNG")),
    ("png, grey with alpha", "PNG", 4, lambda p: encoded(with_alpha(p).convert("LA"), "PNG")),
    ("png, 16 bits", "PNG", 1, lambda p: sixteen_bits(np.asarray(p.convert("L")))),
    ("png, 1 bit", "PNG", 1, lambda p: encoded(p.convert("1"), "PNG")),
    ("gif", "GIF", 3, lambda p: encoded(p, "GIF")),
    ("gif, animated", "GIF", 3, animated),
    ("bmp", "BMP", 3, lambda p: encoded(p, "BMP")),
    ("bmp, palette", "BMP", 3, lambda p: encoded(p.quantize(32), "BMP")),
]

# Kind, extension and how the file is made of an RGB picture.
BAD: list[tuple[str, str, Callable[[Image.Image], bytes]]] = [
    ("png bomb of a few kB", "png", lambda p: png(SIDE, SIDE, 8, 2, zlib.compress(bytes(2_000_000), 9))),
    ("empty", "jpg", lambda p: b""),
    ("text", "jpg", lambda p: b"this file is no picture at all\n" * 20),
    ("jpeg cut at 60", "jpg", lambda p: cut(encoded(p, "JPEG"), 60)),
    ("png, damaged pixels", "png", lambda p: damaged(encoded(p, "PNG"), b"IDAT", 100)),
    ("gif bomb", "gif", lambda p: b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + encoded(p, "GIF")[10:]),
    ("png bomb, whole", "png", lambda p: black(SIDE)),
    ("bmp bomb", "bmp", lambda p: bmp_bomb(encoded(p, "BMP"))),
    ("jpeg bomb", "jpg", lambda p: jpeg_bomb(encoded(p, "JPEG"))),
    ("zip", "png", lambda p: b"PK\x03\x04\x14\x00\x00\x00" + bytes(200)),
    ("png cut at 60", "png", lambda p: cut(encoded(p, "PNG"), 60)),
    ("gif cut", "gif", lambda p: cut(encoded(p, "GIF"), 50)),
    ("bmp cut", "bmp", lambda p: cut(encoded(p, "BMP"), 50)),
    ("jpeg cut at 30", "jpg", lambda p: cut(encoded(p, "JPEG"), 30)),
    ("jpeg cut at 90", "jpg", lambda p: cut(encoded(p, "JPEG"), 90)),
    ("progressive jpeg cut", "jpg", lambda p: cut(encoded(p, "JPEG", progressive=True), 50)),
    ("jpeg, damaged header", "jpg", lambda p: damaged(encoded(p, "JPEG"), b"\xff\xc0\x00\x11", 0)),
    ("png cut at 30", "png", lambda p: cut(encoded(p, "PNG"), 30)),
    ("png cut at 90", "png", lambda p: cut(encoded(p, "PNG"), 90)),
    ("png, damaged header", "png", lambda p: damaged(encoded(p, "PNG"), b"IHDR", 8)),
    ("html", "png", lambda p: b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    ("another format", "png", lambda p: encoded(p, "TIFF")),
]


def bmp_bomb(file: bytes) -> bytes:
    """Return a BMP that says it is large."""
    return file[:18] + struct.pack("<ii", SIDE, SIDE) + file[26:]


def jpeg_bomb(file: bytes) -> bytes:
    """Return a JPEG that says it is large."""
    at = file.index(b"\xff\xc0") + 5
    return file[:at] + struct.pack(">HH", 65_000, 65_000) + file[at + 4 :]


def main(folder: Path, count: int) -> None:
    """Write ``count`` files and the manifest into ``folder``."""
    if folder.exists():
        return
    random = np.random.default_rng(20)
    sources = [photographs.astronaut(), photographs.chelsea(), photographs.coffee(), photographs.rocket()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    bad = set(random.choice(count, round(count * BAD_SHARE), replace=False).tolist())
    manifest, seen = [], {True: 0, False: 0}
    for i in range(count):
        source = sources[i % len(sources)]
        height, width = (int(side) for side in random.integers(24, 120, 2))
        top = int(random.integers(0, source.shape[0] - height))
        left = int(random.integers(0, source.shape[1] - width))
        picture = Image.fromarray(source[top : top + height, left : left + width])
        good = i not in bad
        number, seen[good] = seen[good], seen[good] + 1
        about: dict[str, Any]
        if good:
            kind, form, channels, make = GOOD[number % len(GOOD)]
            if kind.startswith("jpeg, turned") and int(kind[-1]) > 4:
                height, width = width, height
            about = {"kind": kind, "format": form, "height": height, "width": width, "channels": channels}
            extension = form.lower()
        else:
            kind, extension, make = BAD[number % len(BAD)]
            about = {"kind": kind}
        path = beside / "files" / f"label={i % 2}" / f"{i:04}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make(picture))
        manifest.append({"path": str(path.relative_to(beside / "files")), **about})
    (beside / "manifest.json").write_text(json.dumps(manifest, indent=0))
    try:
        beside.chmod(0o755)
        beside.rename(folder)
    except OSError:  # somebody else was faster
        shutil.rmtree(beside)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
