# SPDX-License-Identifier: Apache-2.0
"""Which package of Python's standard library a docstring is from: sparse probing without a network.

    python -m ksae.bench.studies.probe runs/sae --hook layers.9.resid_post

The labelled text is Python's own, read from the source files beside the interpreter. A table of the
accuracy with k latents of each coder, beside the k neurons of the activations themselves and all of
them. See ksae.analysis.probing.
"""

from __future__ import annotations

import argparse
import ast
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksae.activations import SMOLLM2, documents, load_model, tokenize
from ksae.activations.hooks import capture
from ksae.analysis.probing import KS, mean_codes, sparse_probing
from ksae.errors import UserError
from ksae.interop.load import load

from ..harness.measure import describe, machine

CLASSES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "xml")
SHORTEST = 40  # characters of a text
AT_ONCE = 32  # contexts in a forward pass


def docstrings(package: str) -> list[str]:
    """Those of the modules, classes and functions of a package, in a fixed order, each once."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / package
    found: dict[str, None] = {}
    for file in sorted(folder.rglob("*.py")):
        if "test" in file.relative_to(folder).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= SHORTEST:
                    found[text] = None
    return list(found)


def split(texts: dict[str, list[str]], each: int, seed: int) -> list[dict[str, list[str]]]:
    """Texts to train and to test on: as many of each class, two thirds to train on.

    Raises:
        UserError: a class has fewer than three.
    """
    generator = torch.Generator().manual_seed(seed)
    each = min(each, *(len(found) for found in texts.values()))
    if each < 3:
        least = min(texts, key=lambda name: len(texts[name]))
        raise UserError(f"probe: {least} has {len(texts[least])} docstrings, 3 are needed")
    parts: list[dict[str, list[str]]] = [{}, {}]
    for name, found in texts.items():
        order = torch.randperm(len(found), generator=generator)[:each].tolist()
        cut = each * 2 // 3
        for part, chosen in zip(parts, (order[:cut], order[cut:]), strict=True):
            part[name] = [found[i] for i in chosen]
    return parts


def activations(lm: Any, texts: Sequence[str], hook: str, length: int) -> list[Tensor]:
    """Of the first `length` tokens of each text, special ones left out: [tokens, d] float32."""
    short = documents([text[: 16 * length] for text in texts])
    contexts = tokenize(short, lm.tokenizer, length=length)
    numbers = contexts.documents.tolist()
    contexts = contexts.select(torch.tensor([numbers.index(n) for n in range(len(texts))]))
    parts = (contexts.ids, contexts.attended(), contexts.mask())
    rows = zip(*(torch.split(part, AT_ONCE) for part in parts), strict=True)
    found: list[Tensor] = []
    for ids, attended, used in rows:
        inputs = {"input_ids": ids.long(), "attention_mask": attended.long()}
        x = capture(lm.model, [hook], inputs)[hook].float()
        found += [x[i][used[i]] for i in range(len(x))]
    return found


def table(results: dict[str, dict[int | None, float]]) -> str:
    """Markdown: a row for each coder, and for the activations."""
    ks = list(dict.fromkeys(k for row in results.values() for k in row))
    head = [f"k={k}" if k is not None else "all" for k in ks]
    lines = ["| | " + " | ".join(head) + " |", "|" + "---|" * (len(ks) + 1)]
    for name, row in results.items():
        cells = [f"{row[k]:.3f}" if k in row else "" for k in ks]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("coders", nargs="+", help="autoencoders of --hook: files or folders of runs")
    add("--model", default=SMOLLM2, help="language model (default %(default)s)")
    add("--hook", required=True, help="where the coders read")
    add("--texts", type=int, default=90, help="of each class (default %(default)s)")
    add("--length", type=int, default=64, help="tokens of a text (default %(default)s)")
    add("--ks", type=int, nargs="+", default=list(KS), help="default %(default)s")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2, help="default %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    coders = {name: load(name) for name in args.coders}
    parts = split({name: docstrings(name) for name in CLASSES}, args.texts, args.seed)
    lm = load_model(args.model, offline=True)
    rows = [
        {name: activations(lm, texts, args.hook, args.length) for name, texts in part.items()}
        for part in parts
    ]
    own = [{n: torch.stack([x.mean(0) for x in xs]) for n, xs in part.items()} for part in rows]
    results = {"activations": sparse_probing(own[0], own[1], [*args.ks, None], seed=args.seed)}
    for name, coder in coders.items():
        train, test = ({n: mean_codes(coder, xs) for n, xs in part.items()} for part in rows)
        results[name] = sparse_probing(train, test, args.ks, seed=args.seed)
    sizes = [len(next(iter(part.values()))) for part in parts]
    conditions = {"classes": len(CLASSES), "texts": f"{sizes[0]} + {sizes[1]} a class"}
    print(describe(machine(model=args.model, hook=args.hook, **conditions)))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
