# SPDX-License-Identifier: Apache-2.0
"""Long work is not silent where the output is no terminal: a line at each tenth."""

from __future__ import annotations

import io

import pytest
import torch
from tiny_lm import contexts, language_model

from ksae.activations import StreamSource, harvest
from ksae.activations.progress import BAR, Progress

HOOK = "layers.0.resid_post"


def tenths(said: str, what: str) -> list[int]:
    """The counts that the lines about `what` tell."""
    lines = [line for line in said.splitlines() if line.startswith(f"{what}: ")]
    return [int(line.split(": ")[1].split("/")[0].replace(",", "")) for line in lines]


def test_ten_lines_whatever_the_pieces(capfd):
    for pieces in ([1] * 1000, [100] * 10, [7] * 142 + [6]):
        with Progress(1000, "work") as shown:
            for piece in pieces:
                shown.update(piece)
        counts = tenths(capfd.readouterr().err, "work")
        assert len(counts) == 10 and counts[-1] == 1000
        assert [10 * count // 1000 for count in counts] == list(range(1, 11))


def test_what_was_done_before_is_not_said_again(capfd):
    with Progress(1000, "work", done=550) as shown:
        for _ in range(45):
            shown.update(10)
    assert tenths(capfd.readouterr().err, "work") == [600, 700, 800, 900, 1000]


def test_nothing_is_said_if_nothing_is_wanted_or_there_is_nothing(capfd):
    with Progress(10, "work", shown=False) as shown:
        shown.update(10)
    with Progress(0, "work") as shown:
        shown.update(0)
    assert capfd.readouterr().err == ""


def test_batches_are_counted_once_they_were_used(capfd):
    batches = [torch.zeros(4, 2), (torch.zeros(4, 2), None)]
    with Progress(8, "work") as shown:
        stream = shown.over(iter(batches))
        next(stream)
        assert capfd.readouterr().err == ""
        assert len(list(stream)) == 1
    assert tenths(capfd.readouterr().err, "work") == [4, 8]


@pytest.mark.parametrize("kept", [False, True])
def test_a_harvest_says_each_tenth(tmp_path, capfd, kept):
    lm, text = language_model(), contexts(80)
    out = tmp_path / "cache" if kept else None
    source = harvest(lm, text, HOOK, out, batch_size=2)
    counts = tenths(capfd.readouterr().err, f"harvest {HOOK}")
    assert len(counts) == 10 and counts[-1] == source.num_tokens
    harvest(lm, text, HOOK, out, batch_size=2, progress=False)
    assert capfd.readouterr().err == ""


def test_one_context_shows_the_widths_of_a_harvest():
    lm, text = language_model(), contexts(80)
    few = StreamSource(lm, text.select(torch.tensor([0])), HOOK, batch_size=1)
    whole = harvest(lm, text, HOOK, progress=False)
    assert (few.d_in, few.d_out, few.dtype) == (whole.d_in, whole.d_out, whole.dtype)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [80, 120])
def test_the_bar_is_seen_in_80_columns(monkeypatch, columns):
    from tqdm import tqdm

    from ksae.runs.log import BESIDE_A_BAR, _summary

    screen = Terminal()
    record = {
        "loss": 0.12345,
        "fvu": 0.12345,
        "l0": 32.0,
        "dead": 0.123,
        "tokens_per_second": 61234.5,
    }
    with tqdm(total=10_000, initial=3000, bar_format=BAR, file=screen, ncols=columns) as bar:
        bar.set_postfix_str(_summary(record, BESIDE_A_BAR))
    line = max(screen.getvalue().split("\r"), key=len)
    assert len(line.rstrip("\n")) <= columns
    bar_itself = line.split("|")[1]
    assert len(bar_itself) >= 10
    assert all(word in line for word in ("fvu 0.1235", "dead 12.3%", "61.2k tokens/s", "left"))
