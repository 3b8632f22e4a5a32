"""`steer demo`: the whole way once, on people that come with the package."""

from __future__ import annotations

import statistics
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from steer.cli import options
from steer.cli.extract import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from steer import Bank, FrozenLM, History, StyleVector

LAYER = 14
STRENGTH = 2.5
REPETITION_PENALTY = 1.15
# What makes an answer visibly somebody's is too much to make exact texts likelier.
SCORED_STRENGTH = 0.75
HELD_OUT = 3
CONTEXT = "I am seven years old and I love dinosaurs."
LAMBDA = 1.5


def demo(
    prompt: Annotated[str, typer.Option(help="What everybody answers.")] = "Tell me about the last meal you cooked.",
    out: Annotated[Path, typer.Option(help="Folder for the bank and the figure.")] = Path("steer-demo"),
    max_new_tokens: Annotated[int, typer.Option(min=8)] = 48,
    device: options.Device = None,
) -> None:
    """Show the whole way: five people's texts, their style vectors, one batch of answers, one figure."""
    from steer import Bank, StyleVector, read_histories

    out.mkdir(parents=True, exist_ok=True)
    lm = options.load("smollm2-135m", device, "float32")
    with resources.as_file(resources.files("steer") / "data" / "voices.jsonl") as path:
        histories = [history.split(HELD_OUT) for _, history in read_histories(path)]
    bank = Bank(out / "people.bank")
    method = StyleVector(layer=LAYER, neutral="population")
    with progress_bar() as progress:
        method.train(lm, progress.track([known for known, _ in histories], description="population"))
        for known, _ in progress.track(histories, description="style vectors"):
            bank[known.user_id, "style"] = method.fit(lm, known)
    users = [known.user_id for known, _ in histories]
    _show_answers(lm, bank, users, prompt, max_new_tokens)
    _show_timing(lm, bank, users, prompt)
    figure = out / "styles.png"
    with options.err.status("scoring later texts"):
        _draw(figure, lm, bank, method, [held_out for _, held_out in histories])
    options.out.print(f"figure: {figure}\nbank:   {out / 'people.bank'}  (try `steer bank ls {out / 'people.bank'}`)")


def _show_answers(lm: FrozenLM, bank: Bank, users: list[str], prompt: str, max_new_tokens: int) -> None:
    from steer import CoS

    rows: list[str | None] = [None, *users, None]
    states: list[Any] = [None] * (len(rows) - 1) + [CoS(lam=LAMBDA).state(CONTEXT)]
    with options.err.status("answering for everybody in one batch"):
        answers = lm.generate(
            [prompt] * len(rows),
            rows,
            bank,
            states=states,
            strength=STRENGTH,
            max_new_tokens=max_new_tokens,
            repetition_penalty=REPETITION_PENALTY,
        )
    table = Table("who", "answer", title=prompt, show_lines=True)
    for who, answer in zip(["plain", *users, f"CoS, λ = {LAMBDA}:\n“{CONTEXT}”"], answers, strict=True):
        table.add_row(who, " ".join(answer.split()))
    options.out.print(table)


def _show_timing(lm: FrozenLM, bank: Bank, users: list[str], prompt: str, tokens: int = 16, rounds: int = 5) -> None:
    """Times the same batch with and without the vectors, in turn, as the machine's speed drifts."""
    prompts, arms = [prompt] * len(users), {"plain": [None] * len(users), "steered": users}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    with options.err.status("timing"):
        for _ in range(rounds):
            for arm, row in arms.items():
                start = time.perf_counter()
                source: dict[str, Any] = {"bank": bank, "users": row} if arm == "steered" else {}
                lm.generate_tokens(prompts, **source, min_new_tokens=tokens, max_new_tokens=tokens)
                seconds[arm].append(time.perf_counter() - start)
    plain, steered = (statistics.median(seconds[arm]) / tokens * 1000 for arm in arms)
    options.out.print(
        f"{len(users)} people in one batch, prefill included: plain {plain:.1f} ms per token, steered {steered:.1f} ms "
        f"(ratio {steered / plain:.2f}, medians of {rounds} runs in turn)"
    )


def _draw(path: Path, lm: FrozenLM, bank: Bank, method: StyleVector, held_out: list[History]) -> None:
    import torch

    from steer import Site
    from steer.read import read, record_span
    from steer.view import style_figure

    users, site = [history.user_id for history in held_out], Site("resid_post", LAYER)
    spans = [record_span(lm, record) for history in held_out for record in history]
    writers = torch.tensor([i for i, history in enumerate(held_out) for _ in history])
    vectors = torch.stack([state.tensors[str(site)] for state in bank.get_many(users, "style") if state is not None])
    plain, steered = (_losses(lm, spans, v, site) for v in (0 * vectors[:1], SCORED_STRENGTH * vectors))
    change = steered - plain
    by_writer = torch.stack([change[writers == i].mean(0) for i in range(len(users))])
    texts = read(lm, spans, [site], pool=method.pool)[site].pooled - method.population[site]
    style_figure(path, users, by_writer, vectors, texts, writers, strength=SCORED_STRENGTH)


def _losses(lm: FrozenLM, spans: list[Any], vectors: Tensor, site: Any) -> Tensor:
    """−log p of each span, in nats per token, under each vector, `[span, vector]`."""
    import torch

    from steer import ResidualEdit
    from steer.likelihood import response_losses

    columns = []
    with torch.no_grad():
        for vector in vectors:
            sums, counts = response_losses(lm, spans, [ResidualEdit(site, vector.expand(len(spans), -1))])
            columns.append(sums / counts)
    return torch.stack(columns, dim=1)
