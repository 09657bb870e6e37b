"""The curves of runs, drawn by matplotlib: as SVG inside a page (a few kB each, sharp at any size, in the page's colours) and as a PNG sheet."""

from __future__ import annotations

import io
import re
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_rlhf.report import Run

COLOURS = ("#3b82f6", "#d97706", "#0d9488", "#a855f7", "#db2777", "#78716c", "#16a34a", "#ef4444")      # 3:1 or more on white and on near-black
REST = "#78716c"            # grey: time that is in no phase
INK = "#123456"             # stands for the page's text colour until the drawing is in the page
MAX_POINTS = 400            # of a curve; more are drawn as means of equal stretches

# a curve: title, unit, and its lines: (kind of record, name in it, what it is)
PANELS = (
    ("Loss", "", (("train", "loss", "training"),)),
    ("Perplexity", "", (("train", "perplexity", "training"),)),
    ("Judged rightly", "share", (("train", "accuracy", "training"), ("evaluation", "pair_accuracy", "held-out pairs"))),
    ("Score: what is optimised", "", (("iteration", "score", "mean of a buffer"), ("iteration", "score_ema", "smoothed"))),
    ("Exact accuracy", "share", (("iteration", "accuracy", "samples"), ("evaluation", "accuracy", "held-out problems"))),
    ("Reward: score and KL penalty", "", (("iteration", "reward", "sum of a response"),)),
    ("KL to the reference", "nats per response", (("iteration", "kl_sequence", "k1"),)),
    ("Entropy", "nats per token", (("iteration", "entropy", "policy"),)),
    ("Clipped", "share", (("iteration", "clipfrac", "policy"), ("iteration", "value_clipfrac", "critic"))),
    ("Explained variance", "", (("iteration", "explained_variance", "critic"),)),
    ("Response length", "tokens", (("iteration", "response_length", "mean"), ("iteration", "response_length_max", "longest"))),
    ("Finished responses", "share", (("iteration", "finished_share", "samples"), ("evaluation", "finished_share", "held-out problems"))),
    ("KL of one update", "nats per token", (("iteration", "approx_kl", "policy"),)),
    ("Losses", "", (("iteration", "policy_loss", "policy"), ("iteration", "value_loss", "critic"))),
    ("Gradient norm", "before clipping", (("train", "grad_norm", "model"), ("iteration", "actor_grad_norm", "actor"),
                                          ("iteration", "critic_grad_norm", "critic"))),
    ("Learning rate", "", (("train", "lr", "model"), ("iteration", "actor_lr", "actor"), ("iteration", "critic_lr", "critic"))),
    ("Throughput", "tokens per second", (("train", "tokens_per_second", "training"), ("iteration", "generated_per_second", "generation"))),
    ("Time of an iteration", "seconds", (("iteration", "seconds", "all phases"),)),
    ("Peak memory of a process", "GB", (("train", "peak_memory_gb", "so far"), ("iteration", "peak_memory_gb", "so far"))),
)
# what a drawing does not say by itself: title, sentence
NOTES = {
    "Exact accuracy, share": "Bars: 95 % intervals of the held-out problems.",
    "KL to the reference, nats per response": "How far the policy has moved; near 0 at the start.",
    "Explained variance": "1: the critic knows the return; 0: no better than a constant.",
    "Exact accuracy against score": "From the hollow to the filled dot. To the right and down: the reward is being exploited.",
    "Right, by predicted probability": "On the dotted line, predictions come true as often as they say.",
}
LOGARITHMIC = ("Loss", "Perplexity", "Gradient norm")      # where largest and smallest are more than a factor of 100 apart


def series(run: Run, kind: str, name: str, most: int = MAX_POINTS) -> tuple:
    """(steps, values) of one name; null is left out."""
    if (key := (kind, name, most)) not in run.columns:
        run.columns[key] = thin([(record["step"], record[name]) for record in run.of(kind) if record.get(name) is not None and "step" in record], most)
    return run.columns[key]


def thin(points: list[tuple[float, float]], most: int) -> tuple:
    """Two columns, of at most so many rows: means of equal stretches."""
    stretch = -(-len(points) // most) or 1
    means = [[sum(column) / len(column) for column in zip(*points[i:i + stretch])] for i in range(0, len(points), stretch)]
    return tuple(zip(*means)) or ((), ())


def draw_lines(axes, panel, runs: list[Run]) -> None:
    """Lines of one run in a colour each; of several runs in the run's colour, solid, dashed, dotted."""
    title, unit, lines = panel
    there = [line for line in lines if any(series(run, *line[:2])[1] for run in runs)]
    for run in runs:
        for place, (kind, name, label) in enumerate(there):
            steps, values = series(run, kind, name)
            colour, style = (COLOURS[place], "-") if len(runs) == 1 else (run.colour, ("-", "--", ":")[place])
            axes.plot(steps, values, color=colour, linestyle=style, label=label, linewidth=1.4, marker="." if len(values) <= 30 else "", markersize=5)
            if (kind, name) == ("evaluation", "accuracy") and len(values) <= 60:
                for record in (record for record in run.of(kind) if record.get("interval")):
                    axes.plot([record["step"]] * 2, record["interval"], color=colour, linewidth=3, alpha=0.25, solid_capstyle="butt", label="_interval")
    if len(there) > 1:
        handles = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        # above the axes: inside, it would cover the curves
        for line in axes.legend(handles.values(), handles, frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=len(handles)).get_lines():
            line.set(marker="", color=INK if len(runs) > 1 else line.get_color())
    values = [value for line in axes.lines for value in line.get_ydata()]
    if title in LOGARITHMIC and min(values) > 0 and max(values) > 100 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    elif unit in ("tokens", "tokens per second", "seconds", "GB"):
        axes.set_ylim(0, 1.08 * max(values))
    _finish(axes, unit, "iteration" if runs[0].of("iteration") else "step")


def draw_against_score(axes, runs: list[Run]) -> None:
    """A path from the hollow to the filled dot. To the right and down: the reward is being exploited."""
    for run in runs:
        scores, accuracies = thin([(r["score"], r["accuracy"]) for r in run.of("iteration") if r.get("accuracy") is not None and r["score"] is not None], 12)
        axes.plot(scores, accuracies, color=run.colour, linewidth=1, alpha=0.6)
        axes.plot(scores[:1], accuracies[:1], "o", color=run.colour, markerfacecolor="none")
        axes.plot(scores[-1:], accuracies[-1:], "o", color=run.colour)
    _finish(axes, "share", "score")


def draw_calibration(axes, runs: list[Run]) -> None:
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    for run in runs:
        found = run.of("evaluation")[-1].get("calibration") or () if run.of("evaluation") else ()
        axes.plot([row["probability"] for row in found], [row["share"] for row in found], "o-", color=run.colour, markersize=4, linewidth=1.2)
    _finish(axes, "share", "predicted probability")


def _finish(axes, unit: str, below: str) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter
    axes.set_xlabel(below)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=below in ("iteration", "step"), steps=[1, 2, 5, 10]))
    if unit == "share":
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.03), min(max(high, low + 0.1), 1.01))
        axes.set_yticks([tick for tick in axes.get_yticks() if -1e-9 <= tick <= 1 + 1e-9 and axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif axes.get_yscale() == "linear":
        axes.yaxis.set_major_formatter("{x:g}")         # no offset, no power of ten in the corner


def curves_of(runs: list[Run]) -> list[tuple[str, list[Run], list]]:
    """(script, its runs, [(title, function that draws on axes)]) for every training script that recorded something. Runs to be told apart get a colour each."""
    found = []
    for script in dict.fromkeys(run.script for run in runs if run.script != "solver_evaluate.py"):
        own = [run for run in runs if run.script == script]
        curves = [(", ".join(filter(None, panel[:2])), partial(draw_lines, panel=panel, runs=own)) for panel in PANELS
                  if any(series(run, kind, name)[1] for run in own for kind, name, _ in panel[2])]
        if any(record.get("accuracy", record["score"]) != record["score"] for run in own for record in run.of("iteration")):
            curves.append(("Exact accuracy against score", partial(draw_against_score, runs=own)))
        if any(record.get("calibration") for run in own for record in run.of("evaluation")):
            curves.append(("Right, by predicted probability", partial(draw_calibration, runs=own)))
        for place, run in enumerate(own):
            run.colour = COLOURS[place % len(COLOURS)]
        if curves:
            found.append((script, own, curves))
    return found


def _style(ink: str) -> dict:
    return {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "text.parse_math": False, "axes.spines.top": False,
            "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.2, "axes.formatter.limits": (-3, 5),
            **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), ink)}


def as_svg(draw, label: str, salt: str) -> str:
    """The drawing as an <svg> for the inside of a page: it scales, takes the page's text colour, and shares no id with another."""
    import matplotlib
    from markupsafe import Markup, escape
    from matplotlib.figure import Figure
    with matplotlib.rc_context({**_style(INK), "svg.hashsalt": salt}):
        figure, out = Figure(figsize=(4.4, 2.5), layout="constrained"), io.StringIO()
        draw(figure.subplots())
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>|(?<=<g) id=\"[^\"]*\"", "", out.getvalue(), flags=re.DOTALL).replace(INK, "currentColor")
    box = re.findall(r'viewBox="[^"]*"', text)[0]
    return Markup(re.sub(r"^.*?<svg[^>]*>", f'<svg role="img" aria-label="{escape(label)}" {box} xmlns:xlink="http://www.w3.org/1999/xlink">', text, flags=re.DOTALL))


def write_png(path: str, curves: list) -> None:
    """All curves on one sheet; one column per script where there are several, with its own legend."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    wide = 3 if len(curves) == 1 else 1
    n_rows = max(-(-len(drawn) // wide) for *_, drawn in curves)
    with matplotlib.rc_context(_style("#222222")):
        figure = Figure(figsize=(4.5 * max(wide, len(curves)), 2.9 * n_rows + 0.4), layout="constrained")
        for part, (script, own, drawn) in zip(figure.subfigures(1, len(curves), squeeze=False).flat, curves):
            for axes, (title, draw) in zip(part.subplots(n_rows, wide, squeeze=False).flat, drawn):
                draw(axes)
                axes.set_title(title, fontsize=10, pad=18 if axes.get_legend() else 6)
            for axes in part.axes[len(drawn):]:
                axes.set_axis_off()
            part.suptitle(script)
            if len(own) > 1:
                part.legend([Line2D([], [], color=run.colour) for run in own], [run.name for run in own], loc="outside lower center", frameon=False)
        figure.savefig(path, dpi=110)
