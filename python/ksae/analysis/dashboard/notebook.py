# SPDX-License-Identifier: Apache-2.0
"""One latent of a dashboard in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from ksae.analysis.dashboard.folder import read
from ksae.errors import UserError


@dataclass(frozen=True)
class View:
    """A latent's strongest contexts, statistics and logit lens, shown by a notebook as HTML with no
    script, by a terminal as text."""

    latent: int
    label: str | None
    tokens_read: int  # of the text
    record: dict[str, Any]
    texts: list[str]  # of the numbered tokens
    contexts: int  # shown

    def __repr__(self) -> str:
        lines = [self._title()]
        for context in self.record["contexts"][: self._shown()]:
            text = "".join(
                f"«{token}»" if peak else token for token, _, peak in self._passage(context)
            )
            lines.append(f"  {self._peak(context):8.4g}  {text}".replace("\n", "⏎"))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        largest = self.record["max"] or 1
        rows = []
        for context in self.record["contexts"][: self._shown()]:
            spans = "".join(
                _span(token, value, value / largest) for token, value, _ in self._passage(context)
            )
            rows.append(
                f'<div style="display:flex;gap:1em;padding:3px 0"><span style="min-width:4em;'
                f'text-align:right;opacity:.7">{self._peak(context):.4g}</span>'
                f'<code style="white-space:pre-wrap;background:none">{spans}</code></div>'
            )
        lens = "".join(
            f"<div>{name}: {', '.join(_token(self.texts[i]) for i in self.record[name][0])}</div>"
            for name in ("promoted", "demoted")
            if name in self.record
        )
        return f"<div><b>{escape(self._title())}</b>{''.join(rows)}{lens}</div>"

    def _title(self) -> str:
        label = f": {self.label}" if self.label else ""
        share = self.record["fired"] / self.tokens_read
        return f"Latent {self.latent}{label} (fires on {share:.3%} of {self.tokens_read:,} tokens)"

    def _shown(self) -> int:
        top: int = self.record["top"]
        return min(self.contexts, top)

    def _passage(self, context: list[Any]) -> list[tuple[str, float, bool]]:
        """Text, activation and whether it is the firing one, of each token."""
        _, _, peak, tokens, flat = context
        values = dict(zip(flat[::2], flat[1::2], strict=True))
        return [(self.texts[t], values.get(i, 0.0), i == peak) for i, t in enumerate(tokens)]

    def _peak(self, context: list[Any]) -> float:
        return next(value for _, value, peak in self._passage(context) if peak)


def show(
    folder: str | PathLike[str], latent: int, *, F: int | None = None, contexts: int = 8
) -> View:
    """A view of one latent, from a folder that `ksae dashboard` made.

    Args:
        F: the latents that the dashboard must have; None: any number.
        contexts: at most this many.

    Raises:
        UserError: no dashboard, one of another width, or no such latent.
    """
    meta, index, texts = (read(Path(folder), name) for name in ("meta", "index", "tokens"))
    if F is not None and meta["F"] != F:
        raise UserError(f"show: {folder} must be of a coder with {F} latents, got {meta['F']}")
    if not 0 <= latent < meta["F"]:
        raise UserError(f"show: latent must be in [0, {meta['F']}), got {latent}")
    records = read(Path(folder), f"latents/{latent // meta['chunk']}")
    record = records[latent % meta["chunk"]]
    label = index["labels"].get(str(latent))
    return View(latent, label, meta["tokens"], record, texts, contexts)


def _span(token: str, value: float, share: float) -> str:
    text = escape(token.replace("\n", "⏎"))
    if value <= 0:
        return text
    heat = max(0.1, min(1.0, share)) * 0.8
    return f'<span title="{value:.4g}" style="background:rgba(255,150,40,{heat:.2f})">{text}</span>'


def _token(text: str) -> str:
    return f"<code>{escape(text.replace(chr(10), '⏎').replace(' ', '·'))}</code>"
