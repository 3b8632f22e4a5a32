"""Many authors in one batch, against one call per author with steering-vectors, and against the plain batch.

    python -P benchmarks/authors.py HISTORY --instruction "Write a commit message titled: {title}"

needs `pip install --no-deps steering-vectors==0.12.2` and scikit-learn. Both sides add the same vectors at the same
layer to all positions, the one convention that steering-vectors keeps once a cache is in use, and decode greedily in
float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # `python -P` leaves it out
import harness
import source_tree

source_tree.use()

import torch  # noqa: E402
from steering_vectors import SteeringVector  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import steer  # noqa: E402
from steer.embedded import resolve  # noqa: E402


def main() -> None:
    arguments = parse()
    lm = steer.load(arguments.model, dtype=torch.float32)
    bare = AutoModelForCausalLM.from_pretrained(resolve(arguments.model), dtype=torch.float32).to(lm.device)
    histories = [
        (user, history.split(arguments.holdout, arguments.limit)[0])
        for user, history in steer.read_histories(arguments.history, instruction=arguments.instruction)
    ][: arguments.authors]
    method = steer.StyleVector(layer=arguments.layer, neutral="population", positions="all")
    method.train(lm, [history for _, history in histories])
    bank = steer.Bank(tempfile.mkdtemp() + "/bank")
    bank.update({(user, "style"): method.fit(lm, history) for user, history in histories})
    users = [user for user, _ in histories]
    site = str(method.sites[0])
    peers = [
        SteeringVector({arguments.layer: arguments.strength * bank[user, "style"].tensors[site]}) for user in users
    ]
    ids = lm.encode(arguments.prompt)
    length = {"min_new_tokens": arguments.tokens, "max_new_tokens": arguments.tokens, "do_sample": False}

    def steered() -> list[list[int]]:
        return lm.generate_tokens([ids] * len(users), users, bank, strength=arguments.strength, **length)

    def plain() -> list[list[int]]:
        return lm.generate_tokens([ids] * len(users), **length)

    def one_by_one() -> list[list[int]]:
        return [_with_peer(bare, vector, ids, length, lm.pad_token_id) for vector in peers]

    ours, theirs, unsteered = steered(), one_by_one(), plain()
    seconds = harness.in_turn({"plain": plain, "steered": steered, "one by one": one_by_one}, arguments.rounds)
    result = {
        "authors": len(users),
        "tokens": arguments.tokens,
        "layer": arguments.layer,
        "strength": arguments.strength,
        "seconds": seconds,
        "rows with equal tokens": sum(a == b for a, b in zip(ours, theirs, strict=True)),
        "rows that differ from plain": sum(a != b for a, b in zip(ours, unsteered, strict=True)),
        "one by one / steered": harness.ratio(seconds["one by one"], seconds["steered"]),
        "steered / plain": harness.ratio(seconds["steered"], seconds["plain"]),
    }
    print({key: value for key, value in result.items() if key != "seconds"})
    harness.save(arguments.name, result)


def _with_peer(
    model: Any, vector: SteeringVector, ids: list[int], length: dict[str, Any], pad_token_id: int
) -> list[int]:
    batch = torch.tensor([ids], device=model.device)
    with vector.apply(model):
        output = model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), pad_token_id=pad_token_id, **length
        )
    return output[0, len(ids) :].tolist()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("history")
    parser.add_argument("--instruction")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--authors", type=int, default=16)
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--holdout", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", default="Write a commit message titled: fix a leak when reading the index")
    parser.add_argument("--name", default="authors-cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
