"""How does an address get from a terminal into a phone? As a QR code of half-block characters.

Two modules share one character, the lower half of which is the background: as high as wide, and small enough for a
terminal of 24 lines. The colours are absolute, because a code with the terminal's own would be a negative on most of
them. `python -m launcher.qr` reads the text from stdin. https://www.iso.org/standard/83389.html
"""

from __future__ import annotations

import os
import sys

import segno

QUIET = 4  # modules of margin that the standard asks for
BLACK_ON_WHITE, USUAL = "\033[38;5;16;48;5;231m", "\033[0m"  # from the 256 colours: themes change the first 16
BLOCKS = {(0, 0): " ", (1, 0): "▀", (0, 1): "▄", (1, 1): "█"}  # by whether the upper and the lower module are dark


def qr_text(text: str) -> str:
    """Lines for a terminal that understands ANSI colours, each with its line end."""
    code = segno.make(text, error="l", micro=False)
    rows = [tuple(row) for row in code.matrix_iter(border=QUIET)]
    rows += [(0,) * len(rows[0])] * (len(rows) % 2)
    pairs = zip(rows[::2], rows[1::2], strict=True)
    lines = ("".join(BLOCKS[above, below] for above, below in zip(*pair, strict=True)) for pair in pairs)
    return "".join(f"    {BLACK_ON_WHITE}{line}{USUAL}\n" for line in lines)


def main() -> None:
    """stdin -> stdout."""
    if os.name == "nt":
        os.system("")  # an older console understands colours only after this
    print(qr_text(sys.stdin.read()), end="")


if __name__ == "__main__":
    main()
