"""One author's vectors: steer beside steering-vectors and repeng, on the same pairs.

    python -P benchmarks/extraction.py HISTORY --instruction "Write a commit message titled: {title}"

needs `pip install --no-deps steering-vectors==0.12.2 repeng==0.4.0` and `pip install scikit-learn gguf`; a peer that is
not there is left out, and the file says why. A pair is an answer that the author wrote and another author's text as the
answer to the same prompt. All sides get the same texts in the same order, the same model object in float32 and the same
layers, read the last token, and are timed from texts to vectors; processor time tells more where the machine is shared.

steering-vectors' mean difference is StyleVector's. repeng's "pca_center" is the first axis of the differences, not
centred, as is StyleVector's extractor "pca", up to the sign: StyleVector turns it towards the mean difference, repeng
to where more of the author's answers lie. Its default "pca_diff" centres the differences, which is another direction
for the same work. repeng reads the last layer behind the model's final norm, so its directions are compared at all
others.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # `python -P` leaves it out
import harness
import source_tree

source_tree.use()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import steer  # noqa: E402
from steer.read import record_span  # noqa: E402

Vectors = Mapping[int, Tensor]
# From layers to their vectors.
Fit = Callable[[Sequence[int]], Vectors]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    load = [os.getloadavg()]
    lm = steer.load(arguments.model, dtype=torch.float32)
    histories = dict(steer.read_histories(arguments.history, instruction=arguments.instruction))
    history, texts = paired(lm, histories, arguments)
    peers, missing = with_peers(lm, texts, arguments.batches)
    ours = {
        "mean": with_steer(lm, history, pool="last"),
        "pca": with_steer(lm, history, pool="last", extractor="pca", rescale=False),
    }
    places = {"one layer": [arguments.layer], "all layers": list(range(lm.n_layers))}
    arms, against = {}, {}
    for place, layers in places.items():
        arms |= {f"steer {extractor}, {place}": (fit, layers) for extractor, fit in ours.items()}
        for (peer, extractor, batch), fit in peers.items():
            if place == "one layer" or batch == arguments.batches[0]:
                name = f"{peer} {extractor}, batch {batch}, {place}"
                arms[name], against[name] = (fit, layers), f"steer {extractor}, {place}"
    last, mean = "steer mean, one layer", "steer mean over the response, one layer"
    arms[mean] = (with_steer(lm, history, pool="mean"), places["one layer"])

    vectors: dict[str, Vectors] = {}
    processor: dict[str, list[float]] = {name: [] for name in arms}

    def run(name: str) -> None:
        fit, layers = arms[name]
        start = time.process_time()
        vectors[name] = fit(layers)
        processor[name].append(time.process_time() - start)

    seconds = harness.in_turn({name: partial(run, name) for name in arms}, arguments.rounds)
    processor = {name: all_rounds[1:] for name, all_rounds in processor.items()}
    lengths = [len(lm.tokenizer(text).input_ids) for pair in texts for text in pair]
    result = {
        "model": arguments.model,
        "author": history.user_id,
        "pairs": len(history),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "layer": arguments.layer,
        "layers": lm.n_layers,
        "versions": {name: version(name) for name in ("numpy", *sorted({peer for peer, _, _ in peers}))},
        "missing": missing,
        "load average before and after": [*load, os.getloadavg()],
        "peer / steer": {name: harness.ratio(seconds[name], seconds[other]) for name, other in against.items()},
        "peer / steer, processor time": {
            name: harness.ratio(processor[name], processor[other]) for name, other in against.items()
        },
        "mean over the response / last token": harness.ratio(seconds[mean], seconds[last]),
        "vectors": {name: compared(name, vectors[name], vectors[other]) for name, other in against.items()},
        "the same peer, other batches": {
            name: compared(name, vectors[name], vectors[first])
            for name in against
            if (first := first_batch(name, arguments.batches)) != name
        },
        "seconds": seconds,
        "processor seconds": processor,
    }
    for key, value in result.items():
        rows = value.items() if key in ("vectors", "the same peer, other batches") or "peer / steer" in key else ()
        print(key, "" if rows else value, *(f"\n   {name}: {row}" for name, row in rows))
    harness.save(arguments.name, result)


def paired(
    lm: steer.FrozenLM, histories: Mapping[str, steer.History], arguments: argparse.Namespace
) -> tuple[steer.History, list[tuple[str, str]]]:
    """The author's first records, with the others' texts in turn as `neutral`, and the same pairs as plain texts.

    A pair is left out if it is too long, or if its text is not split into the tokens that steer reads.
    """
    author = arguments.author or max(histories, key=lambda user: len(histories[user]))
    others = [history.records for user, history in histories.items() if user != author]
    records, texts = [], []
    for i, record in enumerate(histories[author]):
        turn, whose = divmod(i, len(others))
        neutral = others[whose][turn % len(others[whose])].response
        spans = [record_span(lm, replace(record, response=response)) for response in (record.response, neutral)]
        own, other = (lm.tokenizer.decode(span.ids) for span in spans)
        same = all(
            lm.tokenizer(text).input_ids == list(span.ids) for text, span in zip((own, other), spans, strict=True)
        )
        if same and max(len(span.ids) for span in spans) <= arguments.longest:
            records.append(replace(record, fields={"neutral": neutral}))
            texts.append((own, other))
    return steer.History(author, tuple(records[: arguments.pairs])), texts[: arguments.pairs]


def with_steer(lm: steer.FrozenLM, history: steer.History, **settings: Any) -> Fit:
    def fit(layers: Sequence[int]) -> Vectors:
        state = steer.StyleVector(layer=layers, neutral="field:neutral", **settings).fit(lm, history)
        return {layer: state.tensors[f"resid_post[{layer}]"] for layer in layers}

    return fit


def with_peers(
    lm: steer.FrozenLM, texts: Sequence[tuple[str, str]], batches: Sequence[int]
) -> tuple[dict[tuple[str, str, int], Fit], dict[str, str]]:
    """The peers' ways to fit, by name, extractor and batch size, and why some are missing."""
    fits: dict[tuple[str, str, int], Fit] = {}
    missing = {}
    for peer, extractor, build in (
        ("steering-vectors", "mean", with_steering_vectors),
        ("repeng", "pca", with_repeng),
    ):
        try:
            fits |= {(peer, extractor, batch): build(lm, texts, batch) for batch in batches}
        except ImportError as error:
            missing[peer] = str(error)
            print(f"{peer} is left out: {error}", file=sys.stderr)
    return fits, missing


def with_steering_vectors(lm: steer.FrozenLM, texts: Sequence[tuple[str, str]], batch: int) -> Fit:
    from steering_vectors import train_steering_vector

    def fit(layers: Sequence[int]) -> Vectors:
        vector = train_steering_vector(
            lm.model,
            lm.tokenizer,
            texts,
            layers=list(layers),
            layer_type="decoder_block",
            read_token_index=-1,
            batch_size=batch,
        )
        return {layer: vector.layer_activations[layer].cpu() for layer in layers}

    return fit


def with_repeng(lm: steer.FrozenLM, texts: Sequence[tuple[str, str]], batch: int) -> Fit:
    if not hasattr(np, "float_"):
        # repeng 0.4.0 asks for numpy < 2, for the sake of this name in two annotations.
        np.float_ = np.float64
    from repeng import ControlVector, DatasetEntry

    dataset = [DatasetEntry(own, other) for own, other in texts]

    def fit(layers: Sequence[int]) -> Vectors:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            vector = ControlVector.train(
                lm.model, lm.tokenizer, dataset, method="pca_center", hidden_layers=list(layers), batch_size=batch
            )
        return {layer: torch.from_numpy(vector.directions[layer]) for layer in layers}

    return fit


def compared(name: str, theirs: Vectors, ours: Vectors) -> dict[str, float]:
    """The worst layer's cosine, largest difference, and norm of the difference over that of the vector.

    Directions of repeng are turned to ours first; `same sign` is the share of layers where they pointed there.
    """
    axis, layers = name.startswith("repeng"), list(theirs)
    if axis and len(layers) > 1:
        layers.remove(max(layers))
    pairs = [(theirs[layer].double(), ours[layer].double()) for layer in layers]
    signs = [(a @ b).sign() if axis else torch.ones(()) for a, b in pairs]
    turned = [(a * sign, b) for (a, b), sign in zip(pairs, signs, strict=True)]
    return {
        "cosine": min(torch.cosine_similarity(a, b, dim=0).item() for a, b in turned),
        "largest difference": max((a - b).abs().max().item() for a, b in turned),
        "relative difference": max(((a - b).norm() / b.norm()).item() for a, b in turned),
        "same sign": sum(sign.item() > 0 for sign in signs) / len(signs),
    }


def first_batch(name: str, batches: Sequence[int]) -> str:
    """The same arm with the first of the batch sizes."""
    head, _, place = name.split(", ")
    return f"{head}, batch {batches[0]}, {place}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("history")
    parser.add_argument("--instruction")
    parser.add_argument("--author", help="by default the one with the most records")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a text, with its prompt")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 32], help="the peers' batch sizes; all layers with the first only"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="extraction-cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
