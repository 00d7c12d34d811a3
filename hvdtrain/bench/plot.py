"""Plot step time against bandwidth."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence


def plot_step_times(
    title: str,
    bandwidths: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    here: float,
    measured: Mapping[str, float],
) -> bytes:
    """Return a plot as PNG.

    Args:
        title: of the plot.
        bandwidths: in bytes per second.
        curves: predicted seconds of a step at each bandwidth, by method.
        here: the bandwidth of this network.
        measured: seconds of a step measured on it, by method.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    # Without pyplot, which would choose a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (method, seconds) in enumerate(curves.items()):
        colour = "black" if method == "none" else f"C{number - 1}"
        axes.plot([b * 8e-6 for b in bandwidths], [s * 1e3 for s in seconds], color=colour, label=method)
        axes.plot([here * 8e-6], [measured[method] * 1e3], "o", color=colour, markeredgecolor="white")
    axes.axvline(here * 8e-6, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bandwidth, Mbit/s that each rank sends")
    axes.set_ylabel("step, ms (line: predicted; point: measured on this network)")
    axes.set_title(title, fontsize=9, wrap=True)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(title="compression")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
