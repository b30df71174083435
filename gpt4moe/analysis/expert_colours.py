"""A colour for every expert, as CSS: apart from each other and legible behind text, on a light page and a dark one."""

from __future__ import annotations

NUM_COLOURS = 64
# Lightness in OKLCH of the rings of hues that more experts than fit one ring are spread over, and chroma.
LIGHT, DARK = (0.86, 0.77, 0.93, 0.69), (0.44, 0.36, 0.52, 0.28)
HUES_OF_A_RING = 16
CHROMA = 0.11


def expert_colours(num_experts: int, *, dark: bool) -> list[tuple[float, float, float]]:
    """Lightness, chroma and hue (OKLCH) of experts 0 .. `num_experts` - 1, repeating after 64 (`NUM_COLOURS`).

    Neighbouring numbers lie on different rings, and each ring is turned against the last, so that those that differ
    least in hue differ in lightness.
    """
    count = min(num_experts, NUM_COLOURS)
    num_rings = -(-count // HUES_OF_A_RING)
    hues = -(-count // num_rings)
    found = []
    for expert in range(num_experts):
        number, ring = divmod(expert % NUM_COLOURS, num_rings)
        hue = 360 * (number + ring / num_rings) / hues
        found.append(((DARK if dark else LIGHT)[ring], CHROMA, hue))
    return found


def css(num_experts: int, *, dark: bool) -> str:
    """The custom properties --x0, --x1, ... of the page."""
    colours = expert_colours(num_experts, dark=dark)
    return "; ".join(
        f"--x{expert}: oklch({lightness:.2f} {chroma:.2f} {hue:.0f})"
        for expert, (lightness, chroma, hue) in enumerate(colours)
    )
