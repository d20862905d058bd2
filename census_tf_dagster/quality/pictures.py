"""Draws the pictures of a release as PNG files of at most `MOST_BYTES`, because Dagster's event log stores them, too.

Computing what they show belongs in `measures`, `coverage`, `projection` and `vocabulary`.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from census_tf_dagster.quality.measures import UNLABELLED

MOST_BYTES = 150_000
DPIS = (110, 100, 90, 75, 60)
COLOURS = 255
MOST_GROUPS = 18
MOST_BARS = 12
LONGEST_NAME = 40
SEED = 0

INK, FAINT, OTHER, ACCENT, BAR = "#22262b", "#8a9199", "#d4d8dc", "#c8102e", "#3b6ea5"
PALETTE = (
    *("#2f6db5", "#e8743b", "#2a9d57", "#c93b4a", "#8c5fb5", "#b58a1b", "#19a7b8", "#e377ae", "#6b7a1f", "#5a4636"),
    *("#7fb3e6", "#f4b183", "#8fd19e", "#f0918f", "#c3a6e0", "#e6cf6f", "#86d9e0", "#4c4f8f"),
)
"""Colours of groups, strong ones first. The largest group gets the first."""


def scatter(points: npt.NDArray[np.float32], labels: npt.NDArray[np.str_], by: str, title: str, note: str) -> bytes:
    """Draw cells in the plane, coloured by their labels.

    Parameters
    ----------
    points
        float32 ``(n, 2)``.
    labels
        Label of each cell.
    by
        Name of the kind of labels for a person, such as "cell type".
    title, note
        Text above the picture, and a note for the reader below it.
    """
    names, counts = np.unique(labels, return_counts=True)
    known = [i for i in np.lexsort((names, -counts)) if names[i] not in UNLABELLED]
    shown = [str(names[i]) for i in known[:MOST_GROUPS]]
    size = {str(name): int(count) for name, count in zip(names, counts, strict=True)}
    colour = dict(zip(shown, PALETTE, strict=False))
    figure, axes = _figure(9.6, 6.6, title, note, right=0.60)
    # All groups are drawn in one call and in random order, because the last group drawn would hide the others.
    order = np.random.default_rng(SEED).permutation(len(labels))
    order = np.concatenate([order[~np.isin(labels[order], shown)], order[np.isin(labels[order], shown)]])
    colours = [colour.get(str(label), OTHER) for label in labels[order]]
    area = float(np.clip(60_000 / max(len(labels), 1), 2.5, 36))
    axes.scatter(points[order, 0], points[order, 1], s=area, c=colours, linewidths=0, alpha=0.85)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(OTHER)
    axes.set_xlabel("UMAP 1", color=FAINT, fontsize=8, loc="left")
    axes.set_ylabel("UMAP 2", color=FAINT, fontsize=8, loc="bottom")
    rest = len(labels) - sum(size[name] for name in shown)
    entries = [(colour[name], f"{_short(name)}  {size[name]:,}") for name in shown]
    if rest:
        groups = len(names) - len(shown)
        entries.append((OTHER, f"{groups} other or unknown  {rest:,}" if groups > 1 else f"unknown  {rest:,}"))
    figure.legend(
        handles=[Line2D([], [], marker="o", ls="", ms=7, mew=0, color=shade, label=text) for shade, text in entries],
        loc="upper left",
        bbox_to_anchor=(0.615, 0.895),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        title=f"{by}, cells in the sample",
        title_fontproperties={"size": 9, "weight": "bold"},
        alignment="left",
        handletextpad=0.3,
        borderaxespad=0.0,
    )
    return _png(figure)


def genes_histogram(genes: npt.NDArray[np.int64], window: int, title: str, note: str) -> bytes:
    """Draw how many genes cells express, together with the model's window.

    Parameters
    ----------
    genes
        Number of cells by number of expressed genes, int64.
    window
        Most genes of a cell that the model reads.
    title, note
        See `scatter`.
    """
    total = max(int(genes.sum()), 1)
    running = np.cumsum(genes) / total
    last = max(int(np.searchsorted(running, 0.999)), int(window * 1.25))
    width = max(last // 120, 1)
    # No bar crosses the window's edge, so the first bar may be narrower.
    edges = np.union1d([0], np.arange((window + 1) % width, last + 1, width))
    heights = np.add.reduceat(genes[: last + 1], edges) / total
    figure, axes = _figure(9.6, 4.8, title, note)
    colours = np.where(edges > window, ACCENT, BAR).tolist()
    axes.bar(edges, heights, np.diff(edges, append=edges[-1] + width), align="edge", color=colours)
    axes.axvline(window + 1, color=INK, lw=1)
    over = int(genes[window + 1 :].sum())
    top = axes.get_ylim()[1]
    side = "right" if window > 0.6 * last else "left"
    lines = (
        (f"  the model's window: {window:,} genes  ", INK),
        (f"  {over:,} cells ({over / total:.1%}) express more  ", ACCENT if over else INK),
    )
    for height, (text, shade) in zip((0.97, 0.90), lines, strict=True):
        axes.text(window, top * height, text, color=shade, fontsize=9, va="top", ha=side)
    axes.set_xlim(0, last)
    axes.set_xlabel("expressed genes of a cell", color=INK)
    axes.set_ylabel("share of the planned cells", color=INK)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _quiet(axes)
    return _png(figure)


def share_bars(
    groups: Sequence[tuple[str, Sequence[tuple[str, float, int]]]], overall: float, title: str, note: str
) -> bytes:
    """Draw panels of bars side by side, one bar for each group's share.

    Parameters
    ----------
    groups
        For each panel: its heading, and name, share and number of cells of each bar.
    overall
        The share over all cells.
    title, note
        See `scatter`.
    """
    panels = [(heading, list(bars[:MOST_BARS])) for heading, bars in groups]
    longest = max(len(bars) for _, bars in panels)
    figure, _ = _figure(9.8, 1.9 + 0.36 * longest, title, note, axes=False)
    bottom, top = 0.75 / (1.9 + 0.36 * longest), 1 - 0.85 / (1.9 + 0.36 * longest)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
    most = max([overall, *(share for _, bars in panels for _, share, _ in bars), 1e-3])
    for place, (heading, bars) in enumerate(panels):
        left = 0.22 + place * 0.5 - (0.02 if place else 0)
        height = (top - bottom) * max(len(bars), 1) / longest
        axes = figure.add_axes((left, top - height, 0.22, height))
        at = np.arange(len(bars))
        axes.barh(at, [share for _, share, _ in bars], 0.66, color=BAR)
        axes.axvline(overall, color=ACCENT, lw=1, zorder=0)
        for y, (_, share, cells) in enumerate(bars):
            axes.text(share, y, f" {share:.1%}  ({cells:,})", va="center", fontsize=8, color=INK, bbox=paper)
        axes.set_yticks(at, [_short(name, 32) for name, _, _ in bars], fontsize=8.5, color=INK)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, most * 1.5)
        axes.set_title(heading, loc="left", fontsize=9, weight="bold", color=INK)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.locator_params(axis="x", nbins=4)
        _quiet(axes)
    return _png(figure)


def _figure(
    width: float, height: float, title: str, note: str, *, right: float = 0.97, axes: bool = True
) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.03, 1 - 0.2 / height, title, fontsize=13, weight="bold", color=INK, va="top")
    figure.text(0.03, 0.14 / height, note, fontsize=8, color=FAINT, va="bottom")
    if not axes:
        return figure, None
    left, bottom = (0.04, 0.62 / height) if right < 0.9 else (0.085, 0.85 / height)
    return figure, figure.add_axes((left, bottom, right - left, 1 - 0.65 / height - bottom))


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(OTHER)
    axes.tick_params(colors=FAINT, labelsize=8.5, length=3)
    for label in axes.get_yticklabels():
        label.set_color(INK)


def _short(name: str, longest: int = LONGEST_NAME) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1].rstrip()}…"


def _png(figure: Figure) -> bytes:
    """Encode with few colours, at decreasing resolution until the file is small enough."""
    content = b""
    for dpi in DPIS:
        drawn, sink = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=dpi)
        with Image.open(drawn) as image:
            few = image.convert("RGB").quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
            # The background stays white.
            few.putpalette([255 if value > 252 else value for value in few.getpalette() or ()])
            few.save(sink, format="png", optimize=True)
        content = sink.getvalue()
        if len(content) <= MOST_BYTES:
            break
    return content
