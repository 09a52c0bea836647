"""Draws photos and the labels that a classifier gave them as one picture, the contact sheet of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

COLUMNS = 4
PHOTO = 320  # the photo's side, in pixels
GAP = 24  # between tiles, and around them
PADDING = 16  # inside a tile's caption
LABEL = 52  # the height of the strip on the photo that holds the best label
CAPTION = 116  # the height of the bars below the photo
TITLE = 84  # the title's height, the gap above the tiles included

PAPER, TILE, TRACK = "#f3f4f6", "#ffffff", "#e5e7eb"
INK, FAINT, STRIP = "#111827", "#6b7280", (17, 24, 39, 170)
BARS = ("#2563eb", "#93b4f5", "#c3d4f9")


@dataclass(frozen=True)
class Tile:
    """One photo of the sheet.

    Attributes:
        photo: an image file that Pillow reads.
        best: labels and their probabilities (0 to 1), the most probable first; three are drawn.
    """

    photo: Path
    best: list[tuple[str, float]]


def draw(path: Path, title: str, subtitle: str, tiles: list[Tile]) -> None:
    """Writes the sheet to ``path`` as a PNG; each photo is cropped to the square that the network saw."""
    rows = -(-len(tiles) // COLUMNS)
    width = GAP + COLUMNS * (PHOTO + GAP)
    sheet = Image.new("RGB", (width, GAP + TITLE + rows * (PHOTO + CAPTION + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP + 28), title, INK, ImageFont.load_default(34), anchor="ls")
    pen.text((GAP, GAP + 60), subtitle, FAINT, ImageFont.load_default(18), anchor="ls")
    for index, tile in enumerate(tiles):
        row, column = divmod(index, COLUMNS)
        _draw_tile(sheet, GAP + column * (PHOTO + GAP), GAP + TITLE + row * (PHOTO + CAPTION + GAP), tile)
    sheet.save(path)


def _draw_tile(sheet: Image.Image, left: int, top: int, tile: Tile) -> None:
    with Image.open(tile.photo) as photo:
        picture = ImageOps.fit(photo.convert("RGB"), (PHOTO, PHOTO))
    inner, heading = PHOTO - 2 * PADDING, ImageFont.load_default(24)
    glass = ImageDraw.Draw(picture, "RGBA")
    glass.rectangle((0, PHOTO - LABEL, PHOTO, PHOTO), STRIP)
    label = _shorten(tile.best[0][0], heading, inner)
    glass.text((PADDING, PHOTO - LABEL // 2), label, "white", heading, anchor="lm")
    sheet.paste(picture, (left, top))

    pen = ImageDraw.Draw(sheet)
    pen.rectangle((left, top + PHOTO, left + PHOTO - 1, top + PHOTO + CAPTION - 1), TILE)
    x, y = left + PADDING, top + PHOTO
    small = ImageFont.load_default(15)
    for index, (label, probability) in enumerate(tile.best[:3]):
        line = y + 28 + index * 32
        pen.text((x + inner, line), f"{probability:.1%}", FAINT, small, anchor="rs")
        pen.text(
            (x, line), _shorten(label, small, inner - 60), INK if index == 0 else FAINT, small, anchor="ls"
        )
        pen.rectangle((x, line + 7, x + inner - 1, line + 11), TRACK)
        pen.rectangle((x, line + 7, x + max(1, round(inner * probability)) - 1, line + 11), BARS[index])


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Returns the text, cut with an ellipsis where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
