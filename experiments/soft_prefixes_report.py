"""Tables and figures of `steer.experiments.soft_prefixes`, from what it wrote."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from steer.errors import SteerError
from steer.experiments.contrast import interval, resampled
from steer.experiments.soft_prefixes_arms import BASE
from steer.view.figures import new_figure

# Texts in the prompt that states are held against.
REFERENCE = "BM25 4"
_ALL = "all"

Entries = Sequence[Mapping[str, Any]]
Point = Mapping[str, Any]


def merged(studies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of one study that were made apart, as one; the first one's where several have an arm.

    Arms that differ in their number of texts stand together, few before many.

    Raises:
        SteerError: they are of several studies, or of none.
    """
    first = studies[0]
    if any("arms" not in one or one.get("study") != first["study"] for one in studies):
        raise SteerError("these are not results of one study; give those of one, made with the same settings")
    parts: dict[str, dict[str, Any]] = {"arms": {}, "times": {}}
    for one in studies:
        for part, known in parts.items():
            known |= {name: value for name, value in one.get(part, {}).items() if name not in known}
    if BASE not in parts["arms"]:
        raise SteerError(f"there is nothing to compare with: run the arm {BASE!r}")
    families = list(dict.fromkeys(map(_family, parts["arms"])))
    order = sorted(parts["arms"], key=lambda name: (families.index(_family(name)), _count(name)))
    return {**first, **parts, "arms": {name: parts["arms"][name] for name in order}}


def _family(name: str) -> str:
    return re.sub(r" \d+$", "", name)


def _count(name: str) -> int:
    found = re.search(r" (\d+)$", name)
    return int(found[1]) if found else 0


def tables(done: Mapping[str, Any]) -> str:
    """All tables, in Markdown."""
    return "\n".join(_tables(done)) + "\n"


def data_table(counts: Sequence[Mapping[str, Any]]) -> str:
    """Users, records and tokens."""
    head = ["set", "users", "", "earlier records", "tokens", "later records", "tokens", "prompt tokens, mean"]
    rows = [
        [
            *(str(one[key]) for key in ("set", "users", "split")),
            *(f"{one[key]:,}" for key in ("earlier", "earlier tokens", "later", "later tokens")),
            f"{one['prompt tokens']:.0f}",
        ]
        for one in counts
    ]
    return "\n".join(_rows(head, rows))


def figures(done: Mapping[str, Any]) -> dict[str, Any]:
    """All figures, by what is added to the file's name."""
    return {"": _changes(done), "-tokens": _by_tokens(done)}


# What the numbers are.


def sets_of(done: Mapping[str, Any]) -> list[str]:
    """The sets, and all together where there are several."""
    names = list(dict.fromkeys(entry["set"] for entry in done["arms"][BASE]["users"]))
    return [*names, _ALL] if len(names) > 1 else names


def points(done: Mapping[str, Any], name: str, chosen: str, split: str | None = None) -> dict[str, Point]:
    """What an arm does to the users of a set, each of whom counts once, with 95 % bootstrap intervals over users.

    Changes are in nats per token. `own` is against no personalization, `others` the same with others' records, `gap`
    own against others', `reference` against earlier texts in the prompt.
    """

    def users(arm: str) -> list[Mapping[str, Any]]:
        entries: Entries = done["arms"][arm]["users"]
        return [e for e in entries if chosen in (e["set"], _ALL) and split in (e["split"], None)]

    def column(arm: str, key: str) -> np.ndarray:
        return np.array([np.mean(entry[key]) for entry in users(arm)])

    own, base = column(name, "own"), column(BASE, "own")
    changes = {"nats": own, "own": own - base, "prompt tokens": column(name, "prompt tokens")}
    if all(entry.get("others") for entry in users(name)):
        others = column(name, "others")
        changes |= {"others": others - base, "gap": own - others}
    if REFERENCE in done["arms"]:
        changes["reference"] = own - column(REFERENCE, "own")
    # The same draws for all, of users within their sets.
    weights = _draws([entry["set"] for entry in users(name)])
    return {key: interval(values, weights) for key, values in changes.items()}


def _draws(sets: Sequence[str]) -> np.ndarray:
    """Weights of users, adding up to 1, in draws of as many users of each set as there are."""
    names = np.array(sets)
    weights = np.zeros((len(resampled([0])), len(names)))
    for seed, name in enumerate(dict.fromkeys(sets)):
        inside = np.flatnonzero(names == name)
        weights[:, inside] = resampled(range(len(inside)), seed=seed) * len(inside) / len(names)
    return weights


# Tables.


def _tables(done: Mapping[str, Any]) -> Iterator[str]:
    study = done["study"]
    yield f"### {study['model']}, texts of {study['tokens']} tokens, data {study['data']}\n"
    yield data_table(done["data"])
    arms = list(done["arms"])
    for chosen in sets_of(done):
        found = {name: points(done, name, chosen) for name in arms}
        users = sum(chosen in (entry["set"], _ALL) for entry in done["arms"][BASE]["users"])
        yield f"#### {chosen}: {users} users\n"
        head = ["arm", "prompt tokens", "nats per token", "− none", "others' − none", "own − others'"]
        yield from _rows(
            [*head, f"− {REFERENCE}"],
            [
                [name, f"{own['prompt tokens']['mean']:.0f}", f"{own['nats']['mean']:.3f}"]
                + [_cell(own.get(key)) if name != BASE else "" for key in ("own", "others", "gap", "reference")]
                for name, own in found.items()
            ],
        )
    splits = list(dict.fromkeys(entry["split"] for entry in done["arms"][BASE]["users"]))
    if len(splits) > 1:
        yield "#### own − none, users who may be trained on and users never trained on\n"
        head = [f"{chosen}, {split}" for chosen in sets_of(done) for split in splits]
        yield from _rows(["arm", *head], list(_split_rows(done, splits)))
    yield "#### Costs: medians, and quartiles over rounds\n"
    head = ["arm", "prompt tokens", "prefill, ms", "times none", "making the prompt, ms"]
    yield from _rows([*head, "bytes per user", "seconds per user"], [_cost_row(done, name) for name in arms])


def _split_rows(done: Mapping[str, Any], splits: Sequence[str]) -> Iterator[list[str]]:
    for name in done["arms"]:
        if name != BASE:
            cells = [
                _cell(points(done, name, chosen, split)["own"]) if _has(done, chosen, split) else ""
                for chosen in sets_of(done)
                for split in splits
            ]
            yield [name, *cells]


def _has(done: Mapping[str, Any], chosen: str, split: str) -> bool:
    return any(chosen in (e["set"], _ALL) and e["split"] == split for e in done["arms"][BASE]["users"])


def _cost_row(done: Mapping[str, Any], name: str) -> list[str]:
    users: Entries = done["arms"][name]["users"]
    row = [name, f"{points(done, name, sets_of(done)[-1])['prompt tokens']['mean']:.0f}"]
    if timed := done["times"].get(name):
        ratios = [own / base for own, base in zip(timed["prefill"], timed["base"], strict=True)]
        row += [_quartiles([1000 * t for t in timed["prefill"]], ".0f"), _quartiles(ratios, ".2f")]
        row += [_quartiles([1000 * t for t in timed["rows"]], ".1f")]
    else:
        row += ["", "", ""]
    if "bytes" not in users[0]:
        return [*row, "", ""]
    nbytes, seconds = (statistics.median(entry[key] for entry in users) for key in ("bytes", "seconds"))
    return [*row, f"{nbytes:,.0f}", f"{seconds:.2g}"]


def _quartiles(values: Sequence[float], form: str) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in [head, ["---"] * len(head), *rows]:
        yield f"| {' | '.join(row)} |"
    yield ""


def _cell(point: Point | None) -> str:
    return "" if point is None else f"{point['mean']:+.3f} [{point['low']:+.3f}, {point['high']:+.3f}]"


# Figures.


def _changes(done: Mapping[str, Any]) -> Any:
    """A panel for each set: what every arm gains, with the user's own records and with others'."""
    names, sets = [name for name in done["arms"] if name != BASE], sets_of(done)
    figure = new_figure(2.2 + 3.1 * len(sets), 1.4 + 0.27 * len(names))
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    places = list(range(len(names)))[::-1]
    for axes, chosen in zip(panels, sets, strict=True):
        found = [points(done, name, chosen) for name in names]
        axes.axvline(0, color="0.75", linewidth=1)
        axes.hlines(places, 0, 1, transform=axes.get_yaxis_transform(), color="0.94", linewidth=1, zorder=0)
        _bars(axes, [p + 0.14 for p in places], [p["own"] for p in found], "C0", "own records")
        _bars(axes, [p - 0.14 for p in places], [p.get("others") for p in found], "0.55", "others' records", "white")
        axes.set(title=chosen, xlabel="nats per token − none")
        axes.set_yticks(places, names)
        axes.locator_params(axis="x", nbins=5)
        axes.set_ylim(-0.6, len(names) - 0.4)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def _bars(
    axes: Any, places: Sequence[float], found: Sequence[Point | None], colour: str, label: str, face: str | None = None
) -> None:
    shown = [(place, point) for place, point in zip(places, found, strict=True) if point is not None]
    mean, below, above = _errors([point for _, point in shown])
    style = {"color": colour, "markerfacecolor": face or colour, "fmt": "o", "markersize": 4, "capsize": 2}
    axes.errorbar(mean, [place for place, _ in shown], xerr=[below, above], label=label, linewidth=1.2, **style)


def _errors(found: Sequence[Point]) -> tuple[list[float], list[float], list[float]]:
    """Means and what stands below and above them; where an interval ends at its mean, rounding may put it beyond."""
    below = [max(point["mean"] - point["low"], 0) for point in found]
    above = [max(point["high"] - point["mean"], 0) for point in found]
    return [point["mean"] for point in found], below, above


def _by_tokens(done: Mapping[str, Any]) -> Any:
    """A panel for each set: what every arm gains against the tokens that stand before a response."""
    families: dict[str, list[str]] = {}
    for name in done["arms"]:
        families.setdefault(_family(name), []).append(name)
    sets = sets_of(done)
    columns = 2 if len(sets) > 1 else 1
    figure = new_figure(5.2 * columns + 2, 3.9 * ((len(sets) + 1) // 2))
    panels = figure.subplots((len(sets) + 1) // 2, columns, squeeze=False).flatten()
    for axes in panels[len(sets) :]:
        axes.set_axis_off()
    for axes, chosen in zip(panels, sets, strict=False):
        axes.axhline(0, color="0.75", linewidth=1)
        for i, (family, names) in enumerate(families.items()):
            found = [points(done, name, chosen) for name in names]
            mean, below, above = _errors([point["own"] for point in found])
            tokens = [point["prompt tokens"]["mean"] for point in found]
            style = {"color": f"C{i % 10}", "marker": "osD^vP*Xph"[i % 10], "markersize": 5, "capsize": 2}
            axes.errorbar(tokens, mean, yerr=[below, above], label=family, linewidth=1.2, **style)
        axes.set(title=chosen, xlabel="tokens before the response", ylabel="nats per token − none")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9)
    return figure
