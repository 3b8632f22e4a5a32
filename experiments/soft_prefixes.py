"""What is a state worth beside earlier texts in the prompt? Soft prefixes and what they compete with.

    python -m steer.experiments.soft_prefixes data DATA
    python -m steer.experiments.soft_prefixes run DATA --out study/soft.json --arms none "BM25 4" "dense 4"
    python -m steer.experiments.soft_prefixes train DATA --method pplug --into study/pplug --epochs 2
    python -m steer.experiments.soft_prefixes run DATA --out study/soft.json --trained PPlug=study/pplug --arms PPlug
    python -m steer.experiments.soft_prefixes times DATA --out study/soft.json
    python -m steer.experiments.soft_prefixes report study/soft.json --plot study/soft.png

DATA is a folder with `git_commits`, `stackexchange_answers` and `public_domain_authors`, each with its `texts.jsonl`;
sets that are not there are left out. Of each set a third of the users, by a hash of their names, is never trained on.
The last ten records of every user, or a third of a short history, are scored: −log p of the response in nats per token,
the same tokens in every arm, with the user's own earlier records and with those of others.

What is scored or fitted is kept beside the result, so that the same call goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress

import steer
from steer.cache import Cache
from steer.cli import options, results
from steer.errors import SteerError
from steer.experiments import soft_prefixes_report as reports
from steer.experiments.soft_prefixes_arms import BASE, Arm, Row, Score, arms, chosen_arms, score, trained_arms
from steer.experiments.soft_prefixes_data import User, digest, read_users, shortened, statistics, strangers
from steer.files import draft
from steer.likelihood import last_logits
from steer.method import make_method
from steer.train import train_method

if TYPE_CHECKING:
    from steer.model import FrozenLM


# Beside what is trained here: who it was trained on.
STUDY = "study.json"


def measure(
    lm: FrozenLM,
    arm: Arm,
    users: Sequence[User],
    cache: Cache,
    *,
    others: int,
    on_user: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Everybody's later records under an arm, with their own earlier ones and with others'."""
    found = []
    for user in users:
        own = _total(lm, arm, user, user, cache)
        entry = {
            "user": hashlib.sha256(f"{user.set}|{user.name}".encode()).hexdigest()[:8],
            "set": user.set,
            "split": user.split,
            "earlier": len(user.earlier),
            "records": len(user.later),
            "tokens": own.tokens,
            "own": own.nats / own.tokens,
            "prompt tokens": own.prompt_tokens / len(user.later),
        }
        if arm.personal:
            totals = [_total(lm, arm, user, other, cache) for other in strangers(users, user, others)]
            entry["others"] = [total.nats / total.tokens for total in totals]
            cost = arm.cost(lm, user.earlier)
            entry |= {"bytes": cost.nbytes, "seconds": cost.seconds}
        found.append(entry)
        on_user()
    return found


def _total(lm: FrozenLM, arm: Arm, user: User, whose: User, cache: Cache) -> Score:
    scores = [score(lm, arm, whose.earlier, record, cache) for record in user.later]
    return Score(*(sum(getattr(one, name) for one in scores) for name in ("nats", "tokens", "prompt_tokens")))


@torch.no_grad()
def times(
    lm: FrozenLM, chosen: Mapping[str, Arm], users: Sequence[User], *, prompts: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of making the rows and of running their prompts, arm after arm in each of the rounds.

    Of `prompts` records of each set. States and indices are there; queries are embedded anew.
    """
    sets = dict.fromkeys(user.set for user in users)
    asked = [user for name in sets for user in [u for u in users if u.set == name][:prompts]]
    found: dict[str, dict[str, list[float]]] = {name: {"rows": [], "prefill": []} for name in chosen}
    with _progress() as progress:
        bar = progress.add_task("timing", total=rounds + 1)
        for round_ in range(rounds + 1):
            sums = {name: [0.0, 0.0] for name in chosen}
            for user in asked:
                for name, arm in chosen.items():
                    start = time.perf_counter()
                    row = arm.row(lm, user.earlier, user.later.records[0])
                    sums[name][0] += time.perf_counter() - start
                    sums[name][1] += _prefill(lm, row)
            # The first round warms up.
            if round_:
                for name, (rows, prefill) in sums.items():
                    found[name]["rows"].append(rows / len(asked))
                    found[name]["prefill"].append(prefill / len(asked))
            progress.advance(bar)
    # Each arm beside the base of its own rounds.
    return {name: seconds | {"base": found[BASE]["prefill"]} for name, seconds in found.items()}


def _prefill(lm: FrozenLM, row: Row) -> float:
    """Seconds until the first token's logits are there."""
    head = list(row.span.ids[: row.span.start])
    with lm.steered(states=[None], edits=row.edits, prompt_lengths=[row.prompt_tokens]) as steering:
        start = time.perf_counter()
        last_logits(lm, steering.forward_kwargs(steering.prepare([head])), 1).sum().item()
        return time.perf_counter() - start


def _progress() -> Progress:
    return Progress(console=Console(stderr=True))


def main() -> None:
    arguments = _parse()
    if arguments.action == "report":
        done = reports.merged([json.loads(path.read_text(encoding="utf-8")) for path in arguments.results])
        print(reports.tables(done))
        if arguments.plot is not None:
            results.require_writable(arguments.plot)
            for suffix, figure in reports.figures(done).items():
                results.write(arguments.plot.with_stem(arguments.plot.stem + suffix), figure)
        return
    users = read_users(arguments.data, unseen=arguments.unseen, users=arguments.users)
    torch.set_float32_matmul_precision(arguments.precision)
    with steer.load(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype)) as lm:
        users = shortened(lm, users, arguments.tokens)
        if arguments.action == "data":
            print(reports.data_table(statistics(lm, users)))
        elif arguments.action == "train":
            _train(arguments, lm, users)
        else:
            _go_on(arguments, lm, users)


def _train(arguments: argparse.Namespace, lm: FrozenLM, users: Sequence[User]) -> None:
    """Trains what a method shares on the earlier records of the known users, a part of which it validates with."""
    with _progress() as progress:
        bar = progress.add_task(arguments.method, total=1.0)
        _, trained = train_method(
            lm,
            make_method(arguments.method, **options.parse_settings(arguments.set)),
            [user.earlier for user in users if user.known],
            out=arguments.into,
            epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
            copies=arguments.copies,
            later=arguments.validation,
            strangers=arguments.validation,
            batch=arguments.batch,
            seed=arguments.seed,
            evaluate_every=arguments.evaluate_every,
            save_every=arguments.save_every,
            resume=arguments.into.exists(),
            on_progress=lambda share: progress.update(bar, completed=share),
            on_log=lambda entry: progress.console.print(entry),
        )
    with draft(arguments.into / STUDY) as unfinished:
        unfinished.write_text(json.dumps(_people(arguments, users)))
    print({"steps": trained.steps, "kept": trained.kept, "seconds": trained.seconds, **trained.losses})


def _people(arguments: argparse.Namespace, users: Sequence[User]) -> dict[str, Any]:
    """Tells who is trained on from whom else there is."""
    return {"unseen": arguments.unseen, "users": arguments.users, "data": digest(users)}


def _folders(arguments: argparse.Namespace, users: Sequence[User]) -> dict[str, Path]:
    """What was trained, by name. Raises SteerError if it may have been trained on users who are unseen here."""
    folders = {}
    for pair in arguments.trained:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise SteerError(f"--trained {pair} is not a name and a folder, such as PPlug=study/pplug")
        folders[name] = Path(folder)
    for folder in folders.values():
        told = json.loads((folder / STUDY).read_text()) if (folder / STUDY).is_file() else None
        if told != _people(arguments, users):
            raise SteerError(
                f"{folder} was trained on other users, or elsewhere; train it by `{Path(__file__).stem} train`, with "
                "the same DATA, --unseen, --users and --tokens"
            )
    return folders


def _go_on(arguments: argparse.Namespace, lm: FrozenLM, users: Sequence[User]) -> None:
    """Measures what is missing in the result, and writes it arm by arm."""
    named = ("model", "dtype", "precision", "records", "others", "tokens", "shown", "fitted")
    asked = {name: getattr(arguments, name) for name in named} | _people(arguments, users)
    folders = _folders(arguments, users)
    done: dict[str, Any] = {"study": asked, "versions": _versions(lm), "data": statistics(lm, users), "arms": {}}
    out: Path = arguments.out
    if out.exists():
        done = json.loads(out.read_text(encoding="utf-8"))
    if done.get("study") != asked:
        raise SteerError(f"{out} is of another study, {done.get('study')}; give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    results.require_writable(out)
    cache = Cache(out.with_suffix(".cache"))
    scored = [user.first(arguments.records) for user in users]
    every = arms(lm, scored, cache, tokens=arguments.shown, records=arguments.fitted)
    every |= trained_arms(lm, folders, scored, cache, arguments.fitted)
    chosen = chosen_arms(every, list(dict.fromkeys([BASE, *(arguments.arms or every)])))
    if arguments.action == "times":
        done["times"] = done.get("times", {}) | times(
            lm, chosen, scored, prompts=arguments.prompts, rounds=arguments.rounds
        )
        results.write(out, done)
        return
    with _progress() as progress:
        for name, arm in chosen.items():
            if done["arms"].get(name, {}).get("settings") == arm.settings():
                continue
            bar = progress.add_task(name, total=len(scored))
            start = time.perf_counter()
            found = measure(lm, arm, scored, cache, others=arguments.others, on_user=partial(progress.advance, bar))
            took = time.perf_counter() - start
            done["arms"][name] = {"settings": arm.settings(), "seconds": took, "users": found}
            results.write(out, done)
    print(reports.tables(reports.merged([done])))


def _versions(lm: FrozenLM) -> dict[str, str]:
    return {
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        "steer": steer.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else lm.device.type,
        "threads": str(torch.get_num_threads()),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    data, train, run, timed, report = (actions.add_parser(name) for name in ("data", "train", "run", "times", "report"))
    for one in (data, train, run, timed):
        one.add_argument("data", type=Path, help="folder of the sets")
        one.add_argument("--model", default="smollm2-135m")
        one.add_argument("--device", help="cuda if there is one, else cpu")
        one.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
        one.add_argument(
            "--precision",
            choices=["highest", "high", "medium"],
            default="highest",
            help="of products of float32 matrices; medium goes by way of bfloat16, faster on some processors",
        )
        one.add_argument("--unseen", type=float, default=1 / 3, help="share of a set's users who are never trained on")
        one.add_argument("--users", type=int, help="of each set; all if not given")
        one.add_argument("--tokens", type=int, default=256, help="of a response, fitted or scored")
    train.add_argument("--method", default="pplug")
    train.add_argument("--set", nargs="*", default=[], help="hyper-parameters, KEY=VALUE")
    train.add_argument("--into", type=Path, required=True, help="folder; a run that was begun there goes on")
    train.add_argument("--epochs", type=float, default=1.0)
    train.add_argument("--learning-rate", type=float, default=1e-4)
    train.add_argument("--copies", type=int, default=0, help="with parts of the history left out, of each example")
    train.add_argument("--batch", type=int, default=16)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--validation", type=float, default=0.04, help="share of the known users, and of the others' last records"
    )
    train.add_argument("--evaluate-every", type=int, help="steps; an epoch if not given")
    train.add_argument("--save-every", type=int, help="steps; as evaluations if not given")
    for one in (run, timed):
        one.add_argument("--trained", nargs="*", default=[], help="arms of what `train` has made, NAME=FOLDER")
        one.add_argument("--records", type=int, help="later records of a user that are scored; all if not given")
        one.add_argument("--others", type=int, default=1, help="others whose texts and states a user is scored with")
        one.add_argument("--shown", type=int, default=128, help="tokens of an earlier text in a prompt")
        one.add_argument("--fitted", type=int, default=24, help="earlier records that states are fitted on, the newest")
        one.add_argument(
            "--arms",
            nargs="+",
            metavar="ARM",
            help="some of them, or states together, as in 'PPlug + natural gradient'; all if not given",
        )
        one.add_argument("--out", type=Path, default=Path("soft-prefixes.json"))
    timed.add_argument("--prompts", type=int, default=2, help="of each set")
    timed.add_argument("--rounds", type=int, default=5)
    report.add_argument("results", type=Path, nargs="+", help="what `run` wrote, of one study")
    report.add_argument("--plot", type=Path, help="draw here; further figures get a word behind the name")
    return parser.parse_args()


if __name__ == "__main__":
    main()
