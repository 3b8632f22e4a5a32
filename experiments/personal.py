"""What makes a state personal? Ways to make a state, each user's own against others' on what they wrote later.

    python -m steer.experiments.personal texts.jsonl --instruction "Write a commit message titled: {title}" \
        --half first --out study/commits-first.json

Users are split in halves by a hash of their names: choose on the first, confirm on the second. Every way is one of
`ARMS`; `--arms` picks some. What is read of a text is kept beside the result, and a result that is there is not made
again, so that the same call goes on where it was stopped.

    python -m steer.experiments.personal --report study/commits-first.json study/answers-first.json --plot study.png

The report has nats per token, with 95 % bootstrap intervals over users: own − base below zero says that states help,
own − others below zero that they are personal. Of studies that were made with `--others 0`, which is enough to compare
layers and strengths by own − base, the plot is a heat map.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import steer
from steer.cache import Cache
from steer.cli import results
from steer.encoders import Moments
from steer.errors import SteerError
from steer.history import History
from steer.method import Method, make_method
from steer.plan import edits_of
from steer.read import Span, read, record_span
from steer.score import Scores, UserScore, row_losses
from steer.state import Artifact, UserState
from steer.view.colours import CHANGE, colour, colour_map, ink

# Where style vectors are read, as shares of a model's layers; each is tried alone. 14 and 23 of SmolLM2-135M's 30.
DEPTHS = (0.47, 0.77)
# The same for a grid: 4, 8, 14, 19, 23 and 25.
GRID = (0.13, 0.27, 0.47, 0.63, 0.77, 0.83)


@dataclass(frozen=True)
class Arm:
    """One way to make states, and how strongly to add them.

    Attributes:
        method: its name.
        settings: its hyper-parameters.
        depths: its layers, as shares of the model's; the method's own choice if empty.
        amounts: strengths, or doses where `dosed`.
        dosed: whether the amounts are in units of the residual norm.
        apart: whether each of the states' sites is tried alone, too many being added otherwise.
        whitened: whether vectors are divided by the covariance of all users' texts.
    """

    method: str
    settings: Mapping[str, Any]
    depths: Sequence[float] = ()
    amounts: Sequence[float] = (1.0,)
    dosed: bool = False
    apart: bool = False
    whitened: bool = False

    def make(self, lm: steer.FrozenLM) -> Method:
        """The method, for a model."""
        layers = {"layer": [round(depth * lm.n_layers) for depth in self.depths]} if self.depths else {}
        return make_method(self.method, **layers, **self.settings)


def _style(whitened: bool = False, **settings: Any) -> Arm:
    return Arm("style_vector", settings, DEPTHS, (0.05, 0.1), dosed=True, apart=True, whitened=whitened)


def _grid(**settings: Any) -> Arm:
    return Arm("style_vector", settings, GRID, (0.02, 0.05, 0.1, 0.2), dosed=True, apart=True)


def _natural(*depths: float, **settings: Any) -> Arm:
    return Arm("natural_gradient", settings, depths)


def _trained(**settings: Any) -> Arm:
    return Arm("trained_vector", {"steps": 12, "batch": 4, **settings}, (0.27, 0.77))


ARMS = {
    "last, model": _style(pool="last", neutral="model"),
    "last, population": _style(pool="last", neutral="population"),
    "mean, model": _style(pool="mean", neutral="model"),
    "mean, population": _style(pool="mean", neutral="population"),
    "mean, population, whitened": _style(whitened=True, pool="mean", neutral="population"),
    "logistic, population": _style(extractor="logistic", pool="mean", neutral="population"),
    "pca, population": _style(extractor="pca", pool="mean", neutral="population"),
    "grid: last, model": _grid(pool="last", neutral="model"),
    "grid: mean, model": _grid(pool="mean", neutral="model"),
    "grid: mean, population": _grid(pool="mean", neutral="population"),
    "trained": _trained(),
    "trained, shared stage": _trained(shared_steps=24),
    "gradient": _natural(),
    "gradient, three quarters up": _natural(0.77),
    "gradient, two layers": _natural(0.27, 0.77),
    "gradient, five layers": _natural(0.13, 0.33, 0.53, 0.7, 0.87),
    "gradient, common part": _natural(step=1e-6),
    "gradient, nothing in common": _natural(common_steps=0),
    "gradient, step 8": _natural(step=8),
    "gradient, step 24": _natural(step=24),
    "gradient, damping 16": _natural(damping=16),
    "gradient, prior 120,000": _natural(prior=120_000, step=24),
    # All is 100,000 times as much, so that F plays no part, at half the step, which then goes as far.
    "gradient, without F": _natural(damping=4e5, prior=6e9, step=8e5),
}


@dataclass(frozen=True)
class Setup:
    """What is scored, and how much of it.

    Attributes:
        fitted, scored: each user's texts, the earlier and the later ones.
        others: how many others' states each user's texts are scored under.
        tokens: of a response that count.
    """

    fitted: Sequence[History]
    scored: Sequence[History]
    others: int
    tokens: int

    @classmethod
    def of(cls, histories: Sequence[History], arguments: argparse.Namespace) -> Setup:
        """Of one half of the users: up to 24 records to fit, up to 10, or a third, held out."""
        ordered = sorted(histories, key=lambda history: _hash(history.user_id))
        middle = len(ordered) // 2
        half = {"first": ordered[:middle], "second": ordered[middle:], "both": ordered}[arguments.half]
        parts = [history.split(min(10, len(history) // 3), 24) for history in half]
        parts = [(known, later.first(arguments.records)) for known, later in parts if len(later)]
        return cls([known for known, _ in parts], [later for _, later in parts], arguments.others, arguments.tokens)

    def strangers(self, user: int) -> list[int]:
        """The others that one user is compared with, the same for every arm."""
        drawn = torch.randperm(len(self.fitted), generator=torch.Generator().manual_seed(user)).tolist()
        return [other for other in drawn if other != user][: self.others]


def run(lm: steer.FrozenLM, setup: Setup, arm: Arm, cache: Cache) -> Iterator[tuple[str, float, Scores]]:
    """Makes everybody's states and scores them: yields where, how strongly, and the scores."""
    method = arm.make(lm)
    states, artifact = _fit(lm, method, setup.fitted, cache)
    if arm.whitened:
        states = _whitened(lm, states, setup.fitted, cache)
    sites = states[0].provenance.sites
    for chosen in [(site,) for site in sites] if arm.apart else [sites]:
        table = _score(lm, setup, [_at(state, chosen) for state in states], artifact, arm)
        for amount, scores in zip(arm.amounts, table, strict=True):
            yield " ".join(chosen), amount, scores


def _fit(
    lm: steer.FrozenLM, method: Method, histories: Sequence[History], cache: Cache
) -> tuple[list[UserState], Artifact | None]:
    kept: dict[str, Any] = {"cache": cache} if isinstance(method, steer.StyleVector | steer.NaturalGradient) else {}
    artifact = method.train(lm, histories, **kept)
    return method.fit_many(lm, histories, **kept), artifact


def _whitened(
    lm: steer.FrozenLM, states: Sequence[UserState], histories: Sequence[History], cache: Cache
) -> list[UserState]:
    """Divided by the covariance of all texts: v ← (Σ + 0.1 · tr(Σ)/d · I)⁻¹ v."""
    spans = [record_span(lm, record) for history in histories for record in history]
    readings = read(lm, spans, states[0].provenance.sites, pool="mean", cache=cache)
    solved: list[dict[str, Tensor]] = [{} for _ in states]
    for site, reading in readings.items():
        covariance = Moments.of(reading.pooled, covariance=True).covariance
        ridge = 0.1 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
        vectors = torch.stack([state.tensors[str(site)].double() for state in states])
        for tensors, vector in zip(solved, torch.linalg.solve(covariance + ridge, vectors.T).T, strict=True):
            tensors[str(site)] = vector.float()
    return [UserState(state.provenance, tensors) for state, tensors in zip(states, solved, strict=True)]


def _at(state: UserState, sites: Sequence[str]) -> UserState:
    """The part of a state that acts at some of its sites."""
    return UserState(replace(state.provenance, sites=tuple(sites)), {site: state.tensors[site] for site in sites})


def _score(
    lm: steer.FrozenLM, setup: Setup, states: Sequence[UserState], artifact: Artifact | None, arm: Arm
) -> list[Scores]:
    """Scores for each amount. All of them are rows of one batch, with the text's part below the states run once."""
    shared = {} if artifact is None else {artifact.hash: artifact}
    users: list[list[UserScore]] = [[] for _ in arm.amounts]
    for user, later in enumerate(setup.scored):
        strangers = setup.strangers(user)
        whose = [user, *strangers] * len(arm.amounts)
        amounts: dict[str, Any] = {
            "dose" if arm.dosed else "strength": [0.0]
            + [amount for amount in arm.amounts for _ in range(len(strangers) + 1)]
        }
        edits = edits_of(
            lm,
            [{}, *({"state": states[i]} for i in whose)],
            artifacts=shared,
            **amounts,
        )
        sums, tokens = torch.zeros(1 + len(whose), dtype=torch.float64), 0
        for record in later:
            span = _first(record_span(lm, record), setup.tokens)
            sums += row_losses(lm, span, edits, len(sums)).double()
            tokens += span.end - max(span.start, 1)
        base, *rest = (sums / tokens).tolist()
        size = 1 + len(strangers)
        for row, scores in enumerate(users):
            own, *others = rest[row * size : (row + 1) * size]
            names = [setup.fitted[i].user_id for i in strangers]
            scores.append(UserScore(later.user_id, base, own, dict(zip(names, others, strict=True)), tokens))
    return [Scores(scores) for scores in users]


def _first(span: Span, tokens: int) -> Span:
    end = min(span.end, max(span.start, 1) + tokens)
    return replace(span, ids=span.ids[:end], end=end)


def main() -> None:
    arguments = _parse()
    if arguments.report:
        _report(arguments.report, arguments.plot)
        return
    histories = [own for _, own in steer.read_histories(arguments.texts, instruction=arguments.instruction)]
    setup = Setup.of(histories, arguments)
    named = ("instruction", "half", "records", "others", "tokens", "model", "precision")
    asked = {key: getattr(arguments, key) for key in named}
    asked |= {"texts": _hash(arguments.texts.read_bytes())[:16], "users": len(setup.fitted)}
    done: dict[str, Any] = {"study": asked, "results": []}
    if arguments.out.exists():
        done = json.loads(arguments.out.read_text())
    if done["study"] != asked:
        raise SteerError(f"{arguments.out} is of another study, {done['study']}; give another --out")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results.require_writable(arguments.out)
    torch.set_float32_matmul_precision(arguments.precision)
    lm = steer.load(arguments.model)
    wanted = {name: _described(lm, ARMS[name]) for name in arguments.arms or ARMS}
    known = [(result["arm"], result["settings"]) for result in done["results"]]
    missing = [name for name, settings in wanted.items() if (name, settings) not in known]
    cache = Cache(arguments.out.with_suffix(".cache"))
    for name in track(missing, "arms", console=Console(stderr=True)):
        done["results"] = [result for result in done["results"] if result["arm"] != name]
        for sites, amount, scores in run(lm, setup, ARMS[name], cache):
            entry = {"arm": name, "settings": wanted[name], "sites": sites, "amount": amount, "totals": scores.totals()}
            entry["users"] = {
                _hash(score.user)[:8]: [score.base, score.own, score.other_mean] for score in scores.users
            }
            done["results"].append(entry)
            print(_line(entry), flush=True)
        results.write(arguments.out, done)


def _described(lm: steer.FrozenLM, arm: Arm) -> dict[str, Any]:
    """All that an arm's results depend on, with the hyper-parameters that it leaves at their defaults."""
    method = arm.make(lm)
    settings = {f.name: getattr(method, f.name) for f in fields(method) if f.init}  # type: ignore[arg-type]
    described = {"method": arm.method, **settings, "amounts": arm.amounts}
    if arm.whitened:
        described["whitened"] = True
    return json.loads(json.dumps(described, default=str))


def _hash(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def _line(entry: Mapping[str, Any]) -> str:
    totals = entry["totals"]
    own = totals["own_minus_base"]
    cells = [entry["arm"], entry["sites"], f"{entry['amount']:g}", _with_interval(own)]
    if gap := totals.get("own_minus_other"):
        cells += [f"{totals['other_minus_base']['mean']:+.4f}", _with_interval(gap)]
        cells += [f"{totals[share]:.0%}" for share in ("better_than_base", "own_beats_others", "top1")]
    else:
        cells += ["", "", f"{totals['better_than_base']:.0%}", "", ""]
    return f"| {' | '.join(cells)} |"


def _with_interval(change: Mapping[str, float]) -> str:
    return f"{change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]"


def _report(paths: Sequence[Path], plot: Path | None) -> None:
    studies = {path.stem: json.loads(path.read_text()) for path in paths}
    for name, study in studies.items():
        print(f"\n### {name}: {study['study']['users']} users\n")
        print(
            "| way | sites | amount | own − base | others − base | own − others | own < base | own < others | top 1 |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for entry in study["results"]:
            print(_line(entry))
    if plot is not None:
        grids = [name for name, study in studies.items() if not study["study"]["others"]]
        if grids and len(grids) < len(studies):
            raise SteerError(f"{grids[0]} was made with --others 0 and others were not; plot them apart")
        (_plot_grids if grids else _plot)(studies, plot)


def _plot(studies: Mapping[str, Any], target: Path) -> None:
    """How much states help, against how personal they are; states that do more than a little harm are left out."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(entry["arm"] for study in studies.values() for entry in study["results"]))
    figure = Figure(figsize=(5.5 * len(studies), 5), layout="constrained")
    for place, (name, study) in enumerate(studies.items(), start=1):
        axes = figure.add_subplot(1, len(studies), place)
        axes.axhline(0, color="0.8")
        axes.axvline(0, color="0.8")
        for i, arm in enumerate(arms):
            if arm not in [entry["arm"] for entry in study["results"]]:
                continue
            own, gap = (
                [entry["totals"][key]["mean"] for entry in study["results"] if entry["arm"] == arm]
                for key in ("own_minus_base", "own_minus_other")
            )
            axes.plot(own, gap, "osD^vP*X"[i % 8], color=f"C{i % 10}", label=arm, alpha=0.8)
        axes.set_xlim(right=0.05)
        axes.set(title=name, xlabel="own − base (nats per token; left is better)")
        axes.set_ylabel("own − others (nats per token; down is more personal)")
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines if line.get_label() in arms}
    figure.legend(
        list(lines.values()), list(map(str, lines)), loc="outside lower center", ncols=2 * len(studies), fontsize=8
    )
    figure.savefig(target, dpi=150)


def _plot_grids(studies: Mapping[str, Any], target: Path) -> None:
    """How much states help by site and amount: a row of maps for each way, a column for each study."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(entry["arm"] for study in studies.values() for entry in study["results"]))
    figure = Figure(figsize=(4.2 * len(studies), 3.2 * len(arms)), layout="constrained")
    figure.suptitle("own − base, nats per token (green: likelier)")
    panels = figure.subplots(len(arms), len(studies), squeeze=False)
    for (row, arm), (column, (name, study)) in product(enumerate(arms), enumerate(studies.items())):
        axes, entries = panels[row, column], [entry for entry in study["results"] if entry["arm"] == arm]
        if not entries:
            axes.set_axis_off()
            continue
        sites, amounts = (list(dict.fromkeys(entry[key] for entry in entries)) for key in ("sites", "amount"))
        points = {(entry["sites"], entry["amount"]): entry["totals"]["own_minus_base"]["mean"] for entry in entries}
        change = torch.tensor([[points[site, amount] for amount in amounts] for site in sites])
        # Harm may be of any size, and is all the same beyond a tenth of a nat.
        axes.imshow(change.numpy(), cmap=colour_map(CHANGE), vmin=-0.1, vmax=0.1, aspect="auto")
        for i, j in product(range(len(sites)), range(len(amounts))):
            back = colour(change[i, j].item() / 0.1, CHANGE)
            axes.text(j, i, f"{change[i, j]:+.3f}", ha="center", va="center", color=ink(back), fontsize=8)
        axes.set_xticks(range(len(amounts)), [f"{amount:g}" for amount in amounts])
        axes.set_yticks(range(len(sites)), sites)
        axes.set(title=f"{name}\n{arm}", xlabel="amount")
    figure.savefig(target, dpi=150)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="?", help="JSONL of records")
    parser.add_argument("--instruction", help="prompt for records without one")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--half", choices=["first", "second", "both"], default="first")
    parser.add_argument("--records", type=int, default=5, help="later records of a user that are scored")
    parser.add_argument("--others", type=int, default=2, help="others' states that a user is scored under")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a scored response")
    parser.add_argument(
        "--precision",
        choices=["highest", "high", "medium"],
        default="highest",
        help="of products of float32 matrices; medium goes by way of bfloat16, faster on some processors",
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--out", type=Path, default=Path("study.json"))
    parser.add_argument("--report", type=Path, nargs="+", help="print these results instead")
    parser.add_argument("--plot", type=Path, help="with --report: draw them here")
    arguments = parser.parse_args()
    if (arguments.texts is None) == (arguments.report is None):
        parser.error("give the texts to study, or --report with results")
    return arguments


if __name__ == "__main__":
    main()
