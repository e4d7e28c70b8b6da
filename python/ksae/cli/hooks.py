# SPDX-License-Identifier: Apache-2.0
"""`ksae hooks`."""

from __future__ import annotations

from typing import Annotated

import typer


def hooks(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="smollm2-135m, a folder, or a Hugging Face name"),
    ],
    every: Annotated[bool, typer.Option("--all", help="Each name on a line of its own")] = False,
) -> None:
    """List the points of a language model that --hook names, with their widths.

    ksae hooks smollm2-135m
    """
    import torch

    from ksae import activations

    lm = activations.load_model(model)
    names = activations.hook_names(lm.model)
    if every:
        print("\n".join(names))
        return
    layers = 1 + max(int(name.split(".")[1]) for name in names)
    first = [name for name in names if name.startswith("layers.0.")]
    found = activations.capture(lm.model, first, {"input_ids": torch.tensor([[0, 1]])}, stop=False)
    print(f"{type(lm.model).__name__}, {layers} layers")
    for name in first:
        part, (_, path, side) = name.rpartition(".")[2], activations.resolve_hook(lm.model, name)
        place = f"{side}put of {path}"
        print(f"layers.{{0..{layers - 1}}}.{part:<10}  d = {found[name].shape[-1]:<6}  {place}")
    print("any other module: path.of.module:in or path.of.module:out")
