"""`steer bank import` and `steer bank export`: states as files, and vector files of other programs."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast
from urllib.parse import unquote

import typer

from steer.cli import options
from steer.cli.extract import progress_bar
from steer.errors import Damage, SteerError
from steer.files import draft_folder, is_free

if TYPE_CHECKING:
    from steer import Bank, UserState
    from steer.bank import Row
    from steer.bank.writing import Conflict
    from steer.inject.positions import Positions

_FORMATS = ("safetensors", "gguf")
# Names of files may have 255 bytes, with the ending.
_LONGEST = 200
_TOO_LONG = "%sha256-"

BankFolder = Annotated[Path, typer.Argument(help="The folder of the bank.", metavar="BANK")]
Name = Annotated[str, typer.Option(help="Name of the states in the bank.")]


ByHash = Annotated[
    bool,
    typer.Option("--by-hash", help="The users are given by their hashes, as a bank that keeps only those lists them."),
]
Hashed = Annotated[bool, typer.Option("--hashed", help="A new bank keeps hashes of user ids in place of the ids.")]


def user_id(text: str, by_hash: bool) -> str:
    """The id of a user, or the hash in its place."""
    from steer.bank import UserHash

    return UserHash(text) if by_hash else text


def sound(rows: Iterator[Row], damages: list[SteerError]) -> Iterator[Row]:
    """The rows of a bank; what is damaged, which they tell at the end, goes into a list."""
    try:
        yield from rows
    except SteerError as error:
        damages.append(error)


def import_(
    folder: BankFolder,
    files: Annotated[
        list[Path],
        typer.Argument(help="Files that end in .safetensors, .gguf or .pt, or folders of them.", metavar="FILE..."),
    ],
    user: Annotated[
        str | None,
        typer.Option(help="Whose state it is; else the name of each file is its user's.", show_default=False),
    ] = None,
    name: Name = "style",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The model that the vectors are for: they are checked against it, and refused by others. A short name "
            "(see `steer models`), a folder, or a hub id.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="Take the vectors of these layers only: 18, or several: 12,18.", show_default=False),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Add the vectors at all, response, generated or prompt; as the file says.", show_default=False
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace states that are there under the name.")] = False,
    hashed: Hashed = False,
    by_hash: ByHash = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Put states from files into a bank: steer's own, and vectors of other programs.

    If one cannot be read, none is put there.

    Example:

        steer bank import people.bank ada.gguf ben.gguf --model smollm2-135m

        steer bank import people.bank tesla.pt --user ada --layer 20
    """
    from steer import Bank
    from steer.interop import vector_files

    layers = None if layer is None else options.parse_layers(layer)
    if by_hash and is_free(folder):
        raise SteerError(f"--by-hash: {folder} is no bank yet, which could know users by their hashes")
    sources = {user_id(whose, by_hash): file for whose, file in _by_user(_expanded(files), user).items()}
    lm = None if model is None else options.load(model, device, dtype)
    states: dict[str, UserState] = {}
    with progress_bar() as progress:
        task = progress.add_task("files", total=len(sources))
        for whose, file in sources.items():
            states[whose] = vector_files.read(file, lm=lm, layers=layers, positions=cast("Positions | None", positions))
            progress.advance(task)
    conflict: Conflict = "replace" if replace else "error"
    # A new bank is there with the states in it, or not at all.
    place = draft_folder(folder.resolve()) if is_free(folder) else nullcontext(folder)
    with place as path, Bank(path, hashed=hashed or None) as store:
        for whose in [] if replace else states:
            if name in store.names_of(whose):
                raise SteerError(f"{whose!r} has a state {name!r} already; nothing was imported. --replace replaces it")
        # Again, as somebody may have stored one in the meantime.
        store.update({(whose, name): state for whose, state in states.items()}, conflict=conflict)
    store = Bank(folder, create=False)
    rows = [
        {
            "user": whose,
            "file": str(sources[whose]),
            "method": state.provenance.method,
            "sites": list(state.provenance.sites),
            "bytes": state.nbytes,
        }
        for whose, state in states.items()
    ]
    if as_json:
        print(json.dumps({"bank": str(folder), "name": name, "states": rows}, ensure_ascii=False))
    else:
        _print(rows, "sites")
        options.err.print(f"{len(rows)} states named {name!r} in {folder}")
    wanted = {state.provenance.artifact for state in states.values()} - {None}
    for digest in sorted(digest for digest in wanted if digest and not store.has_artifact(digest)):
        options.err.print(
            f"These states need the artifact {digest[:10]}…, which the bank has not: bank.put_artifact(…)"
        )


def export(
    folder: BankFolder,
    out: Annotated[Path, typer.Argument(help="The folder for the files; made if there is none.", metavar="FOLDER")],
    user: Annotated[
        list[str] | None, typer.Option(help="Only this user; may be repeated. All by default.", show_default=False)
    ] = None,
    name: Name = "style",
    format_: Annotated[
        str,
        typer.Option(
            "--format", help="safetensors, which keeps everything, or gguf, for llama.cpp, repeng and EasySteer."
        ),
    ] = "safetensors",
    model_hint: Annotated[
        str | None,
        typer.Option(help="With gguf: the model's architecture, such as llama, for who reads it.", show_default=False),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace files that are there.")] = False,
    by_hash: ByHash = False,
    as_json: options.Json = False,
) -> None:
    """Write states from a bank to files, one a user.

    A file is named after its user; what is no letter, digit, dash, dot or underscore is written %2F and so on.

    Example:

        steer bank export people.bank vectors --format gguf --user ada
    """
    from steer import Bank
    from steer.interop import state_files, vector_files

    if format_ not in _FORMATS:
        why = ". A .pt file is a pickle, and none is written" if format_ == "pt" else ""
        raise SteerError(f"--format {format_} is not one of {', '.join(_FORMATS)}{why}")
    if model_hint is not None and format_ != "gguf":
        raise SteerError(
            f"--model-hint is for --format gguf; {format_} files name the model that a state was read from"
        )
    store = Bank(folder, create=False)
    damages: list[SteerError] = []
    if user is None:
        users = [row.user for row in sound(store.rows(), damages) if row.name == name]
        if not users and not damages:
            raise SteerError(
                f"{store.path}: nobody has a state {name!r}; there are {', '.join(store.names()) or 'none'}"
            )
    else:
        users = [user_id(whose, by_hash) for whose in dict.fromkeys(user)]
        for whose in users:
            if name not in store.names_of(whose):
                # It says what there is.
                store[whose, name]
    targets = _targets(store, out, users, name, format_, replace)
    places: set[str] = set()
    rows: list[dict[str, Any]] = []
    with progress_bar() as progress:
        task = progress.add_task("users", total=len(targets))
        for whose, file in targets.items():
            progress.advance(task)
            try:
                state = store[whose, name]
                digest = state.provenance.artifact if format_ == "gguf" else None
                artifact = None if digest is None else store.artifact(digest)
            except Damage as damage:
                damages.append(damage)
                continue
            if format_ == "gguf":
                vector_files.write_gguf(file, state, artifact=artifact, model_hint=model_hint or "")
                places.add(state.provenance.settings.get("positions", "all"))
            else:
                state_files.write(file, state)
            rows.append({"user": whose, "file": str(file), "bytes": file.stat().st_size})
    if as_json:
        result = {"bank": str(folder), "name": name, "format": format_, "files": rows}
        print(json.dumps(result, ensure_ascii=False))
    else:
        _print(rows)
        options.err.print(f"{len(rows)} files in {out}")
    if elsewhere := sorted(places - {"all"}):
        options.err.print(f"Other programs add these vectors at all tokens; here it was at: {', '.join(elsewhere)}")
    for error in damages:
        options.err.print(f"left out: {error}", soft_wrap=True)
    if damages:
        raise SteerError(f"{folder}: damaged, so that states are left out; `steer bank verify {folder}` lists them")


def file_stems(users: Sequence[str]) -> dict[str, str]:
    """The name of each user's file, without its ending.

    Bytes of UTF-8 that are no ASCII letter, digit, dash, dot or underscore are written `%2F`, as is a dot or a dash in
    front. Where two users differ in capitals only, these are written so too, as some systems do not tell them apart.
    A name that would be longer than 200 is `%sha256-` and the hash of the user id.
    """
    alike = Counter(user.lower() for user in users)
    return {user: _stem(user, capitals=alike[user.lower()] > 1) for user in users}


def user_of(file: Path) -> str:
    """Whose file it is, by its name. Raises SteerError if that does not tell."""
    if file.stem.startswith(_TOO_LONG):
        raise SteerError(f"{file}: the user id was too long for the name of a file; say it with --user")
    try:
        return unquote(file.stem, errors="strict")
    except UnicodeDecodeError:
        raise SteerError(f"{file}: its name is that of no user; say whose it is with --user") from None


def _stem(user: str, capitals: bool) -> str:
    marked = r"[^a-z0-9_.-]|^[.-]" if capitals else r"[^A-Za-z0-9_.-]|^[.-]"
    stem = re.sub(marked, lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), user)
    return stem if len(stem) <= _LONGEST else _TOO_LONG + hashlib.sha256(user.encode()).hexdigest()


def _expanded(files: Iterable[Path]) -> list[Path]:
    """The files, and those in the folders whose endings are known."""
    from steer.interop.vector_files import ENDINGS

    found: list[Path] = []
    for file in files:
        inside = sorted(path for path in file.iterdir() if path.suffix.lower() in ENDINGS) if file.is_dir() else [file]
        if not inside:
            raise SteerError(f"{file}: the folder has no files that end in {', '.join(ENDINGS)}")
        found += inside
    return found


def _by_user(files: Sequence[Path], user: str | None) -> dict[str, Path]:
    if user is not None and len(files) > 1:
        raise SteerError(
            f"--user {user} is for one file, and there are {len(files)}; leave it out to go by their names"
        )
    sources: dict[str, Path] = {}
    for file in files:
        whose = user_of(file) if user is None else user
        if whose in sources:
            raise SteerError(f"{sources[whose]} and {file} are both for the user {whose!r}")
        sources[whose] = file
    return sources


def _targets(store: Bank, out: Path, users: list[str], name: str, ending: str, replace: bool) -> dict[str, Path]:
    """Where each user's file goes. Raises SteerError if that would fail, before any is written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteerError(f"{out}: cannot be made a folder ({error.strerror})") from None
    targets = {user: out / f"{stem}.{ending}" for user, stem in file_stems(users).items()}
    if not replace and (there := [file for file in targets.values() if file.exists()]):
        raise SteerError(f"{there[0]} exists; nothing was written. --replace replaces it")
    return targets


def _print(rows: Sequence[dict[str, Any]], *more: str) -> None:
    cells = ([row["user"], row["file"], *(", ".join(row[key]) for key in more), str(row["bytes"])] for row in rows)
    options.print_table(("user", "file", *more, "bytes"), cells)
