"""Tokens as text that can be looked at: what is invisible is marked, and half a character is shown as its bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = {" ": "␣", "\n": "↵", "\t": "⇥"}

# Byte-level tokenizers write each byte as a printable character: most as themselves, the others from U+0100 on.
_THEMSELVES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _THEMSELVES]
_BYTES = {chr(byte): byte for byte in _THEMSELVES} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of one token, its leading space included; bytes that are no whole character as `\\xe6`."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = tokenizer.convert_tokens_to_string([piece])
    if "\ufffd" in text and "\ufffd" not in piece:
        return _bytes_of(piece).decode("utf-8", "backslashreplace")
    # Decoders of whole texts drop the space that SentencePiece puts in front of the first word.
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def visible(text: str) -> str:
    """The text on one line, with signs for spaces and line ends; control and format characters as escapes."""
    return "".join(_MARKS.get(character) or printable(character) for character in text)


def printable(text: Iterable[str]) -> str:
    """The text with control and format characters as escapes, so that no text can steer a terminal or a page."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _bytes_of(piece: str) -> bytes:
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(match[1])
    return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in piece)
