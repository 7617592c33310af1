"""loss.png, the picture of a run: its losses above, its learning rate below."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

RAW, SMOOTH, HELD_OUT, RATE = "#a9c4e4", "#1f5fa8", "#d1570f", "#6b7280"  # line colours, distinct in grey too


def loss_figure(
    steps: list[tuple[float, ...]],
    title: str,
    validation: list[tuple[int, float]],
    best: tuple[int, float] | None,
    axis: str = "loss (nats per token)",
) -> Figure:
    """Returns the picture; `steps` are step, loss and lr of each step, `validation` and `best` are (step, loss)."""
    x, losses, rates = zip(*steps, strict=True)
    figure = Figure(figsize=(8, 5.4), dpi=200, layout="constrained")  # twice the 800 px that it is shown at
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3.2, 1))
    few = len(x) < 20  # too few to smooth
    thick = {"linewidth": 1.8} | ({"marker": "o", "markersize": 4} if few else {})
    thin = thick if few else {"linewidth": 0.8}
    upper.plot(x, losses, color=SMOOTH if few else RAW, label="training, each step", **thin)
    if not few:
        upper.plot(x, smoothed(losses), color=SMOOTH, linewidth=2.2, label="training, smoothed")
    if validation:
        label = "validation"
        if best is not None:
            label += f" (best {best[1]:.3f} at step {best[0]:,})"
        look = {"markersize": 6, "markeredgecolor": "white", "linewidth": 1.2, "zorder": 3}
        upper.plot(*zip(*validation, strict=True), "o-", color=HELD_OUT, label=label, **look)
    if best is not None:
        upper.plot(*best, "o", markersize=12, markerfacecolor="none", markeredgecolor=HELD_OUT, zorder=4)
    upper.set_ylabel(axis, fontsize=11)
    upper.legend(frameon=False, fontsize=10)
    ascii_title = title.encode("ascii", "replace").decode()  # the font may lack other letters
    upper.set_title(ascii_title, loc="left", fontsize=13, fontweight="bold", pad=10, parse_math=False)
    lower.plot(x, rates, color=RATE, **thick)
    peak = max(rates)
    lower.set(ylim=(0, 1.2 * peak or 1), xlabel="optimizer steps", ylabel="learning rate")
    lower.set_yticks([0, peak], ["0", f"{peak:.3g}"])
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9ca3af")
        axes.tick_params(colors="#374151", labelsize=10)
        axes.margins(x=0.015)
    for label in (lower.xaxis.label, lower.yaxis.label):
        label.set_fontsize(11)
    figure.align_ylabels()
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    return figure


def smoothed(values: list[float]) -> list[float]:
    """Returns `values` smoothed with a Gaussian window; its standard deviation is a sixtieth of their number."""
    sigma = max(1.0, len(values) / 60)
    reach = math.ceil(3 * sigma)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    # divided by the part of the window inside the values, so that the ends are not drawn towards 0
    return (np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")).tolist()
