"""Bars as SVG: panels of values with their ranges go in, the text of a small file comes out. No plotting library."""

from dataclasses import dataclass
from xml.sax.saxutils import escape

LABEL_WIDTH, BAR_WIDTH, VALUE_WIDTH, GAP = 170, 210, 70, 14
ROW, TITLE = 19, 30
OURS, THEIRS, RANGE = "#1f6feb", "#b6bdc6", "#57606a"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One value: its label, the range of its samples, and whether it is drawn in our colour."""

    label: str
    value: float
    low: float
    high: float
    ours: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Bars of one figure, from the top."""

    title: str
    bars: list[Bar]


def svg(panels: list[Panel]) -> str:
    """The panels from left to right."""
    rows = max(len(panel.bars) for panel in panels)
    panel_width = LABEL_WIDTH + BAR_WIDTH + VALUE_WIDTH + GAP
    width, height = len(panels) * panel_width, TITLE + rows * ROW + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, number * panel_width)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, left: int) -> list[str]:
    zero = left + LABEL_WIDTH
    scale = BAR_WIDTH / max(bar.high for bar in panel.bars)
    parts = [f'<text x="{zero}" y="18" font-weight="bold">{escape(panel.title)}</text>']
    for row, bar in enumerate(panel.bars):
        top = TITLE + row * ROW
        middle, length = top + ROW / 2 - 2, bar.value * scale
        colour = OURS if bar.ours else THEIRS
        low, high = zero + bar.low * scale, zero + bar.high * scale
        parts += [
            f'<text x="{zero - 6}" y="{middle + 4:.0f}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect x="{zero}" y="{top}" width="{length:.1f}" height="{ROW - 5}" fill="{colour}"/>',
            f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="{RANGE}" stroke-width="1.5"/>',
            f'<text x="{max(zero + length, high) + 5:.0f}" y="{middle + 4:.0f}">{bar.value:,.4g}</text>',
        ]
    return parts
