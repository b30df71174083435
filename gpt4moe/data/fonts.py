"""The fonts of the machine that can draw a text: those that matplotlib brings along, then those of the system."""

from __future__ import annotations

import functools
import pathlib

from PIL import Image, ImageDraw, ImageFont

from gpt4moe.config.check import CallerError

PROBE_SIZE = 24


@functools.cache
def font_files(characters: str) -> tuple[str, ...]:
    """Files of the fonts that draw every one of `characters`, each differently, in the order of their names.

    `CallerError` where there is none. The same fonts give the same order wherever they lie.
    """
    import matplotlib
    from matplotlib import font_manager

    bundled = sorted(pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))
    files: dict[str, str] = {}
    for path in (*map(str, bundled), *sorted(font_manager.findSystemFonts())):
        files.setdefault(pathlib.Path(path).name, path)
    found = tuple(files[name] for name in sorted(files) if _draws(files[name], characters))
    if not found:
        raise CallerError(f"fonts={sorted(files)!r} cannot draw {characters!r}; install fonts-dejavu")
    return found


@functools.cache
def font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """The font of a file at `size` pixels."""
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _draws(path: str, characters: str) -> bool:
    from matplotlib.ft2font import FT2Font

    try:
        known = FT2Font(path).get_charmap()
        # Some fonts of mathematics put other signs, or nothing, where digits and letters belong.
        family = FT2Font(path).family_name.lower()
        signs = {_drawn(path, character) for character in characters}
    except (OSError, RuntimeError, ValueError):  # a bitmap font, or a broken file
        return False
    mathematical = family.startswith(("cm", "stixsize", "stixnonuni")) or "symbol" in family or "display" in family
    return not mathematical and all(ord(one) in known for one in characters) and len(signs) == len(set(characters))


def _drawn(path: str, character: str) -> bytes:
    image = Image.new("L", (2 * PROBE_SIZE, 2 * PROBE_SIZE))
    ImageDraw.Draw(image).text((0, 0), character, font=font(path, PROBE_SIZE), fill=255)
    return image.tobytes()
