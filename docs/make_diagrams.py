"""Draws the three diagrams of the documentation as SVG: `python docs/make_diagrams.py`.

Each has a panel of its own and follows the reader's colour scheme, so it can be read on a light and on a dark page.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"
STYLE = """
.panel{fill:#fbfcfe;stroke:#d5dce5}.box{fill:#e6eff9;stroke:#1f5f99}.store{fill:#fdf1dc;stroke:#b26b00}
.end{fill:#e6f4ea;stroke:#2b7a3d}.bad{fill:#fbe9e7;stroke:#b3402e}.note{fill:#f1f3f6;stroke:#9aa6b4}
text{font:14px system-ui,sans-serif;fill:#1b2733}.b{font-weight:600}.s{font-size:12px;fill:#4a5866}
.l{stroke:#44525f;fill:none}.d{stroke:#9aa6b4;stroke-dasharray:4 4}.h{fill:#44525f}
@media(prefers-color-scheme:dark){
.panel{fill:#171c22;stroke:#36424f}.box{fill:#17314b;stroke:#7ab8f5}.store{fill:#3b2c12;stroke:#e0a545}
.end{fill:#16351f;stroke:#6cc483}.bad{fill:#41201b;stroke:#ef8a78}.note{fill:#232b34;stroke:#66737f}
text{fill:#e8edf2}.s{fill:#b3bfca}.l{stroke:#a8b5c1}.d{stroke:#66737f}.h{fill:#a8b5c1}}
""".replace("\n", "")


class Drawing:
    """An SVG of `width` by `height` pixels with a panel behind everything."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            f' role="img" aria-label="{escape(title)}"><title>{escape(title)}</title><style>{STYLE}</style>',
            '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            '<path class="h" d="M0 0L8 4L0 8z"/></marker></defs>',
            f'<rect class="panel" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        ]

    def box(self, x: int, y: int, width: int, lines: list[str], kind: str = "box") -> None:
        """A box whose first line is bold; its height follows from its lines."""
        height = 16 + 19 * len(lines)
        self._parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>')
        for i, line in enumerate(lines):
            self.text(x + width // 2, y + 21 + 19 * i, line, "b" if i == 0 else "s")

    def text(self, x: int, y: int, text: str, style: str = "", anchor: str = "middle") -> None:
        self._parts.append(f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self, points: list[tuple[int, int]]) -> None:
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        self._parts.append(f'<path class="l" d="{path}" marker-end="url(#a)"/>')

    def dashes(self, x: int, y: int, to_x: int, to_y: int) -> None:
        self._parts.append(f'<path class="d" d="M{x} {y}L{to_x} {to_y}"/>')

    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>\n"])


def sequence() -> str:
    """One update, from the published version to the commit that contains it."""
    left, middle, right = 136, 430, 724
    steps: list[tuple[int, int, str, str]] = [
        (left, middle, "publish version 7", "commit.lua"),
        (left, middle, "open a job, queue its order", "dispatch.lua, enqueue.lua"),
        (middle, right, "RQ hands out the signed order", ""),
        (right, middle, "claim the job, pin its base version", "claim.lua"),
        (middle, right, "fetch the base, verify its digest", "base = 7"),
        (right, right, "train on local rows", "heartbeat.lua renews the lease"),
        (right, middle, "store payload, append signed header", "post.lua"),
        (middle, left, "stream entry", "wakeup channel, updates:CLIENT"),
        (left, left, "verify, admit, weigh, add", "head is 9: staleness = 9 − 7 = 2"),
        (left, middle, "head 10, ledger, acknowledgement", "commit.lua"),
    ]
    drawing = Drawing(860, 116 + 58 * len(steps), "One update, from the published version to the commit")
    for x, lines, kind in (
        (left, ["coordinator", "operator’s machine"], "box"),
        (middle, ["Redis", "untrusted transport"], "store"),
        (right, ["worker", "a site with data"], "box"),
    ):
        drawing.box(x - 90, 14, 180, lines, kind)
        drawing.dashes(x, 70, x, 100 + 58 * len(steps))
    for i, (start, end, said, detail) in enumerate(steps):
        y = 104 + 58 * i
        number = f"{i + 1}. "
        if start == end:
            drawing.box(start - 125, y - 24, 250, [number + said, detail], "note")
            continue
        drawing.arrow([(start, y + 6), (end, y + 6)])
        drawing.text((start + end) // 2, y - 2, number + said)
        drawing.text((start + end) // 2, y + 22, detail, "s")
    return drawing.svg()


def states() -> str:
    """The states of a job, and what moves it from one to the next."""
    drawing = Drawing(860, 330, "The states of a job")
    drawing.box(20, 60, 130, ["open", "has a lease"])
    drawing.box(260, 60, 150, ["claimed", "attempt n, base b"])
    drawing.box(520, 60, 130, ["posted", "payload stored"])
    drawing.box(710, 24, 130, ["merged", "in version v"], "end")
    drawing.box(710, 124, 130, ["rejected", "with a reason"], "bad")
    drawing.box(260, 236, 150, ["abandoned", "with a reason"], "bad")
    for (x, y), (to_x, to_y), said, label_x, label_y in (
        ((150, 86), (260, 86), "claim", 205, 78),
        ((410, 86), (520, 86), "post", 465, 78),
        ((650, 76), (710, 56), "commit", 676, 50),
        ((650, 96), (710, 146), "close", 664, 136),
    ):
        drawing.arrow([(x, y), (to_x, to_y)])
        drawing.text(label_x, label_y, said, "s")
    drawing.arrow([(85, 114), (85, 262), (260, 262)])
    drawing.arrow([(335, 114), (335, 236)])
    drawing.arrow([(300, 60), (300, 34), (370, 34), (370, 60)])
    drawing.text(335, 26, "claimed again: attempt n + 1", "s")
    drawing.text(95, 200, "close: lapsed, returned,", "s", "start")
    drawing.text(95, 217, "late, run_ended, epoch_lost", "s", "start")
    drawing.text(345, 176, "close: lapsed, returned, refused,", "s", "start")
    drawing.text(345, 193, "failed, forged, late, run_ended", "s", "start")
    drawing.text(430, 250, "Each job ends exactly once. The step that ends it writes its ledger", "s", "start")
    drawing.text(430, 268, "record and deletes its record, in one script.", "s", "start")
    return drawing.svg()


def trust() -> str:
    """Who holds which key, and what each party has to believe."""
    drawing = Drawing(860, 400, "Who trusts whom")
    drawing.box(
        20,
        40,
        240,
        ["operator: coordinator", "coordinator.key (secret)", "public key of each client", "no rows of any site"],
    )
    drawing.box(
        310,
        40,
        240,
        ["Redis", "holds models, updates, ledger", "no signing key", "can withhold, cannot forge"],
        "store",
    )
    drawing.box(
        600, 20, 240, ["site north: worker", "north.key (secret), own rows", "coordinator.pub", "policy and egress log"]
    )
    drawing.box(
        600,
        140,
        240,
        ["site south: worker", "south.key (secret), own rows", "coordinator.pub", "policy and egress log"],
    )
    drawing.arrow([(260, 70), (310, 70)])
    drawing.arrow([(310, 104), (260, 104)])
    drawing.arrow([(550, 60), (600, 60)])
    drawing.arrow([(600, 90), (550, 90)])
    drawing.arrow([(550, 112), (575, 112), (575, 170), (600, 170)])
    drawing.arrow([(600, 204), (540, 204), (540, 132)])
    lines = (
        "to the sites: orders and versions, signed by the coordinator",
        "to the coordinator: updates, registrations and endings, signed by their client",
        "A site trusts the key in coordinator.pub, its own policy and task code; the coordinator sends no code.",
        "The coordinator trusts each enrolled key for its own client only; limits and robust rules bound one client.",
        "The coordinator sees each update in the clear: signatures do not hide an update.",
        "Sites neither see nor trust each other. Access rules let a worker write only what carries its own name.",
    )
    for i, line in enumerate(lines):
        drawing.text(24, 262 + 24 * i, ("→ ", "← ", "• ", "• ", "• ", "• ")[i] + line, "s", "start")
    return drawing.svg()


DIAGRAMS = {"update-sequence.svg": sequence, "job-states.svg": states, "trust.svg": trust}


def main() -> None:
    for name, draw in DIAGRAMS.items():
        (PICTURES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
