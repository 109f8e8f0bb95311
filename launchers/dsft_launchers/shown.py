"""Text of others (rows, models, tokenizers, folders, errors) for a terminal or a log: nothing in it controls either."""

import re
import sys

CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of writing
    "\u2028\u2029"  # lines for a terminal or a pager, and none for what reads a log by lines
    "\ud800-\udfff]"  # halves of characters, which no stream takes
)
BREAKS = re.compile("[\t\n]")


def shown(text: object) -> str:
    """Return text with each character that controls a terminal written out by its number; lines stay lines."""
    return CONTROLS.sub(_written_out, str(text))


def in_a_line(text: object) -> str:
    """Return text as shown does, and with its line breaks and tabs written out: a name, a key, a reason in a line."""
    return BREAKS.sub(lambda found: repr(found[0])[1:-1], shown(text))


def say(line: object) -> None:
    """Write one line of ours to stderr, where no other text begins a line as ours do (see entry.LossyStream)."""
    write = getattr(sys.stderr, "write_ours", sys.stderr.write)
    write(f"{in_a_line(line)}\n")
    sys.stderr.flush()


def _written_out(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
