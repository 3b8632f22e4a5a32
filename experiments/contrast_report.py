"""Tables and figures of `steer.experiments.contrast`, from what it wrote."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steer.errors import SteerError
from steer.view.figures import new_figure

# λ that tables have; figures have all.
_SHOWN = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
_CHANCE = {"color": "0.5", "linestyle": ":", "linewidth": 1}


def tables(done: Mapping[str, Any]) -> str:
    """All tables of a result, in Markdown."""
    return "\n".join(_TABLES[_name(done)](done)) + "\n"


def figures(done: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of a result, by what is added to the file's name."""
    return _FIGURES[_name(done)](done)


def _name(done: Mapping[str, Any]) -> str:
    name = done.get("study", {}).get("name")
    if name not in _TABLES or not done.get("results"):
        raise SteerError(f"this is no result of {', '.join(_TABLES)}")
    return name


# Tables.


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in [head, ["---"] * len(head), *rows]:
        yield f"| {' | '.join(row)} |"
    yield ""


def _cell(curve: Mapping[str, Any], at: int | None = None, *, percent: bool = False, sign: bool = False) -> str:
    mean, low, high = (curve[key] if at is None else curve[key][at] for key in ("mean", "low", "high"))
    if percent:
        return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    form = "+.3f" if sign else ".3f"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _places(lams: Sequence[float]) -> list[int]:
    return [i for i, lam in enumerate(lams) if lam in _SHOWN]


def _prefeval_tables(done: Mapping[str, Any]) -> Iterator[str]:
    lams = done["study"]["lams"]
    for result in done["results"]:
        own, other, gap, gain = (result["curves"][arm] for arm in ("own", "another's", "own − another's", "own − none"))
        yield f"### {result['model']}, {result['form']}: {result['questions']} questions\n"
        rows = [
            [
                f"{lams[i]:g}",
                _cell(own["accuracy"], i, percent=True),
                _clustered(own["accuracy"], i),
                _cell(own["accuracy, sums"], i, percent=True),
                _cell(own["accuracy, gains"], i, percent=True),
                _cell(other["accuracy"], i, percent=True),
                _cell(gain["accuracy"], i, percent=True),
                _cell(gap["accuracy"], i, percent=True),
            ]
            for i in _places(lams)
        ]
        head = ["λ", "accuracy, %", "over topics", "by sums", "by gains", "another's preference"]
        yield from _rows([*head, "own − none", "own − another's"], rows)
        rows = [
            [
                f"{lams[i]:g}",
                *(_cell(own[name], i, sign=True) for name in ("margin", "margin, mean of the others")),
                _cell(other["margin"], i, sign=True),
                *(f"{own[name]['mean'][i]:.2f}" for name in ("conforming", "others")),
            ]
            for i in _places(lams)
        ]
        head = ["λ", "margin to the best other", "to their mean", "to the best, another's preference"]
        yield from _rows([*head, "log p of the conforming", "of the others"], rows)
        best, tokens = result["best"], result["tokens"]
        yield (
            f"Best at λ = {best['lam']:g} ({100 * best['mean']:.1f} %), not told from λ in {best['range']}; "
            f"{tokens['conforming']:.1f} tokens in conforming options, {tokens['others']:.1f} in others.\n"
        )
        rows = [
            [topic, str(own["questions"]), *(f"{100 * own['accuracy']['mean'][i]:.0f}" for i in _places(lams))]
            for topic, own in result["by topic"].items()
        ]
        yield from _rows(["accuracy, %", "questions", *(f"λ = {lams[i]:g}" for i in _places(lams))], rows)


def _clustered(curve: Mapping[str, Any], at: int) -> str:
    return f"[{100 * curve['low_clustered'][at]:.1f}, {100 * curve['high_clustered'][at]:.1f}]"


def _persona_tables(done: Mapping[str, Any]) -> Iterator[str]:
    lams = done["study"]["lams"]
    for result in done["results"]:
        for voice, curves in result["curves"].items():
            yield f"### {result['model']}, “{voice} a person …”: {len(result['items'])} personas\n"
            rows = [
                [
                    f"{lams[i]:g}",
                    _cell(curves["log-odds"], i, sign=True),
                    *(
                        _cell(curves[name], i, percent=True)
                        for name in ("told apart", "as the persona", "says Yes", "Yes or No")
                    ),
                ]
                for i in _places(lams)
            ]
            yield from _rows(
                ["λ", "log-odds", "told apart, %", "as the persona, %", "says Yes, %", "p(Yes or No), %"], rows
            )
            yield f"Log-odds per unit of λ: {_cell(result['slopes'][voice], sign=True)}\n"
            rows = [
                [name, *(f"{100 * table['told apart']['mean'][i]:.0f}" for i in _places(lams)), _slope(table, lams)]
                for name, table in result["by persona"][voice].items()
            ]
            head = ["told apart, %", *(f"λ = {lams[i]:g}" for i in _places(lams)), "log-odds per unit of λ"]
            yield from _rows(head, rows)


def _slope(table: Mapping[str, Any], lams: Sequence[float]) -> str:
    """Of a straight line: log-odds of two tokens are linear in λ."""
    mean = table["log-odds"]["mean"]
    return f"{(mean[-1] - mean[0]) / (lams[-1] - lams[0]):+.3f}"


def _recovery_tables(done: Mapping[str, Any]) -> Iterator[str]:
    for result in done["results"]:
        yield f"### {result['model']}: {result['texts']} texts\n"
        rows = [
            [_what(case), str(case["all"]["count"]), *_quality_cells(case["all"]), f"{case['all']['spread']:.2f}"]
            for case in result["cases"]
        ]
        head = ["what is known", "estimates", "bias", "RMSE", "expected", "coverage, %", "at an end"]
        yield from _rows([*head, "spread over its own estimate"], rows)
        for case in result["cases"]:
            rows = [
                [f"{lam:g}", str(own["count"]), *_quality_cells(own)]
                for lam, own in zip(done["study"]["lams"], case["by lam"], strict=True)
            ]
            yield from _rows(
                [f"λ ({_what(case)})", *["estimates", "bias", "RMSE", "expected", "coverage, %", "at an end"]], rows
            )
        time = result["time"]
        yield (
            f"{time['lams']} λ, one text of {time['tokens']} tokens, medians of {time['rounds']} rounds: "
            f"{time['seconds']['grid']:.2f} s on the grid, {time['seconds']['run per lam']:.2f} s with a run per λ, "
            f"{time['ratio']['median']:.1f} times as long [{time['ratio']['q1']:.1f}, {time['ratio']['q3']:.1f}].\n"
        )
        lengths = zip(done["study"]["lams"], result["ended"], result["mean tokens"], strict=True)
        yield from _rows(
            ["λ", "texts that ended", "mean tokens"], [[f"{a:g}", str(b), f"{c:.1f}"] for a, b, c in lengths]
        )


def _quality_cells(own: Mapping[str, Any]) -> list[str]:
    return [
        _cell(own["bias"], sign=True),
        _cell(own["rmse"]),
        f"{own['expected']:.3f}",
        _cell(own["coverage"], percent=True),
        str(own["at the end"]),
    ]


def _what(case: Mapping[str, Any]) -> str:
    return f"{case['length']} tokens" if case["texts"] == 1 else f"{case['texts']} texts of {case['length']}"


# Figures.


def _band(
    axes: Any,
    lams: Sequence[float],
    curve: Mapping[str, Any],
    *,
    scale: float = 1.0,
    band: bool = True,
    **style: Any,
) -> None:
    """A line with its interval."""
    mean, low, high = ([scale * value for value in curve[key]] for key in ("mean", "low", "high"))
    (line,) = axes.plot(lams, mean, linewidth=2, marker="o", markersize=3, **style)
    if band:
        axes.fill_between(lams, low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def _at_landmarks(axes: Any) -> None:
    """λ = −1 is no context, 0 the context as it is."""
    for lam in (-1, 0):
        axes.axvline(lam, color="0.85", linewidth=1, zorder=0)
    axes.set_xlabel("λ")


def _prefeval_figures(done: Mapping[str, Any]) -> dict[str, Any]:
    lams, found = done["study"]["lams"], done["results"]
    figure = new_figure(15, 3.7 * len(found))
    for row, result in zip(figure.subplots(len(found), 4, squeeze=False), found, strict=True):
        own, other = result["curves"]["own"], result["curves"]["another's"]
        shares, changes, margins, parts = row
        _band(shares, lams, own["accuracy"], scale=100, color="C0", label="own preference")
        _band(shares, lams, other["accuracy"], scale=100, color="0.4", label="another user's")
        sums = [100 * value for value in own["accuracy, sums"]["mean"]]
        shares.plot(lams, sums, "--", color="C0", linewidth=1, label="own, by sums")
        shares.axhline(25, **_CHANCE)
        shares.annotate("chance", (lams[-1], 25), ha="right", va="bottom", color="0.4", fontsize=8)
        shares.set(title=f"{result['model']}, {result['form']}", ylabel="the conforming option is likeliest, %")
        for arm, style in {"own − none": "C2", "own − another's": "C4"}.items():
            _band(changes, lams, result["curves"][arm]["accuracy"], scale=100, color=style, label=arm)
        changes.axhline(0, **_CHANCE)
        changes.set(title="paired differences", ylabel="percentage points")
        _band(margins, lams, own["margin"], color="C0", label="own preference")
        _band(margins, lams, other["margin"], color="0.4", label="another user's")
        margins.axhline(0, **_CHANCE)
        margins.set(title="margin to the best other option", ylabel="nats per token")
        _band(parts, lams, own["conforming"], color="C0", label="the conforming option")
        _band(parts, lams, own["others"], color="C1", label="mean of the three others")
        parts.set(title="log-likelihood, own preference", ylabel="nats per token")
        for axes in row:
            _at_landmarks(axes)
            axes.legend(fontsize=8, loc="best")
    return {"": figure, "-topics": _topics(done)}


def _topics(done: Mapping[str, Any]) -> Any:
    """A panel for each topic, all results in it."""
    names = list(done["results"][0]["by topic"])
    curves = {
        f"{result['model']}, {result['form']}": {topic: own["accuracy"] for topic, own in result["by topic"].items()}
        for result in done["results"]
    }
    counts = {topic: own["questions"] for topic, own in done["results"][0]["by topic"].items()}
    titles = {topic: f"{topic.replace('_', ' ')} ({counts[topic]})" for topic in names}
    figure, panels = _panels(done["study"]["lams"], titles, curves)
    for axes in panels:
        axes.axhline(25, **_CHANCE)
        axes.set_ylim(0, 100)
    figure.supylabel("the conforming option is likeliest, %")
    return figure


def _panels(
    lams: Sequence[float], titles: Mapping[str, str], curves: Mapping[str, Mapping[str, Any]]
) -> tuple[Any, list[Any]]:
    columns = min(len(titles), 4 if len(titles) % 5 else 5)
    rows = math.ceil(len(titles) / columns)
    figure = new_figure(2.9 * columns, 2.4 * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for axes in panels[len(titles) :]:
        axes.set_axis_off()
    panels = panels[: len(titles)]
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for i, own in enumerate(curves.values()):
            # More than two bands hide one another.
            _band(axes, lams, own[name], scale=100, band=len(curves) < 3, color=f"C{i}")
        axes.set_title(title, fontsize=10)
        _at_landmarks(axes)
        axes.set_xticks(range(-1, 5))
        axes.label_outer()
    figure.legend(panels[0].lines[: len(curves)], list(curves), loc="outside lower center", ncols=len(curves))
    return figure, panels


def _persona_figures(done: Mapping[str, Any]) -> dict[str, Any]:
    lams, found = done["study"]["lams"], done["results"]
    figure = new_figure(15, 3.7 * len(found))
    for row, result in zip(figure.subplots(len(found), 4, squeeze=False), found, strict=True):
        odds, apart, shares, mass = row
        for i, (voice, curves) in enumerate(result["curves"].items()):
            for own in result["by persona"][voice].values():
                odds.plot(lams, own["log-odds"]["mean"], color=f"C{i}", alpha=0.25, linewidth=0.8)
            label = f"“{voice} a person …”"
            _band(odds, lams, curves["log-odds"], color=f"C{i}", label=label)
            _band(apart, lams, curves["told apart"], scale=100, color=f"C{i}", label=label)
            _band(shares, lams, curves["as the persona"], scale=100, color=f"C{i}", label=label)
            yes = [100 * value for value in curves["says Yes"]["mean"]]
            shares.plot(lams, yes, ":", color=f"C{i}", label="… says Yes")
            _band(mass, lams, curves["Yes or No"], scale=100, color=f"C{i}", label=label)
        odds.axhline(0, **_CHANCE)
        for axes in (apart, shares):
            axes.axhline(50, **_CHANCE)
        odds.set(title=f"{result['model']}: thin lines are personas", ylabel="log-odds of the persona's answer, nats")
        apart.set(title="the persona's Yes and No told apart", ylabel="area under the ROC curve, %", ylim=(20, 100))
        shares.set(title="answers as the persona would", ylabel="% of items, half of them Yes", ylim=(0, 100))
        mass.set(title="probability of Yes and No together", ylabel="%")
        for axes in row:
            _at_landmarks(axes)
            axes.legend(fontsize=8, loc="best")
    return {"": figure, "-each": _personas(done)}


def _personas(done: Mapping[str, Any]) -> Any:
    curves = {
        f"{result['model']}, “{voice} …”": {name: table["told apart"] for name, table in own.items()}
        for result in done["results"]
        for voice, own in result["by persona"].items()
    }
    names = done["results"][0]["items"]
    figure, panels = _panels(done["study"]["lams"], {name: f"{name} ({names[name]})" for name in names}, curves)
    for axes in panels:
        axes.axhline(50, **_CHANCE)
        axes.set_ylim(0, 100)
    figure.supylabel("area under the ROC curve, %")
    return figure


def _recovery_figures(done: Mapping[str, Any]) -> dict[str, Any]:
    lams, found = done["study"]["lams"], done["results"]
    figure = new_figure(13, 3.9 * len(found))
    for row, result in zip(figure.subplots(len(found), 3, squeeze=False), found, strict=True):
        cases = result["cases"]
        names = [_what(case) for case in cases]
        found_at, error, coverage = row
        found_at.plot(lams, lams, **_CHANCE)
        for i, at in enumerate((0, len(cases) - 1)):
            shift = [lam + 0.1 * i - 0.05 for lam in lams]
            means = [lam + own["bias"]["mean"] for lam, own in zip(lams, cases[at]["by lam"], strict=True)]
            errors = [own["rmse"]["mean"] for own in cases[at]["by lam"]]
            found_at.errorbar(
                shift, means, yerr=errors, fmt="o", color=f"C{i}", markersize=4, capsize=2, label=names[at]
            )
        found_at.set(title=f"{result['model']}: mean ± RMSE", xlabel="true λ", ylabel="λ found")
        places = list(range(len(cases)))
        _bars(error, places, [case["all"]["rmse"] for case in cases], color="C0", label="RMSE")
        error.plot(
            places, [case["all"]["expected"] for case in cases], "k_", markersize=16, label="from the information"
        )
        error.set(title="error of λ", ylabel="units of λ", ylim=(0, None))
        _bars(coverage, places, [_scaled(case["all"]["coverage"], 100) for case in cases], color="C0")
        coverage.axhline(95, **_CHANCE)
        coverage.set(title="95 % intervals that hold the true λ", ylabel="%", ylim=(85, 100.5))
        for axes in (error, coverage):
            axes.set_xticks(places, names, rotation=20, ha="right")
        found_at.legend(fontsize=8)
        error.legend(fontsize=8)
    return {"": figure}


def _bars(axes: Any, places: Sequence[float], points: Sequence[Mapping[str, float]], **style: Any) -> None:
    mean = [point["mean"] for point in points]
    # Where an interval ends at its mean, rounding may put it beyond.
    below = [max(point["mean"] - point["low"], 0) for point in points]
    above = [max(point["high"] - point["mean"], 0) for point in points]
    axes.errorbar(places, mean, yerr=[below, above], fmt="o", markersize=4, capsize=2, **style)


def _scaled(point: Mapping[str, float], by: float) -> dict[str, float]:
    return {key: by * value for key, value in point.items()}


_TABLES = {"prefeval": _prefeval_tables, "persona": _persona_tables, "recovery": _recovery_tables}
_FIGURES = {"prefeval": _prefeval_figures, "persona": _persona_figures, "recovery": _recovery_figures}
