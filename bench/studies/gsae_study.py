# SPDX-License-Identifier: Apache-2.0
"""Does it matter that latents are chosen by gradients? TopK and g-SAE pairs on a real model.

    python -m ksae.bench.studies.gsae_study --cache bench/cache/gsae --out bench/results

For each site, k and seed, TopK and a g-SAE (arXiv 2411.10397) for each beta start from the same
weights and see the same batches; then they are spliced into SmolLM2-135M on held-out text and their
latents are used to steer it. Each such unit is written as it ends, and a unit that is there is
not run again. See bench/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ksae.analysis.evaluate import compare_language_model, evaluate
from ksae.analysis.steering import logit_shift, matched_latents
from ksae.coders import GradTopKSAE, TopKSAE
from ksae.runs.evaluation import about
from ksae.step.train_step import TrainStep

from ..harness.data import fill
from ..harness.measure import describe, machine, write_json
from ..suites.quality import batches, start_of
from . import gsae_data, gsae_report
from .gsae_data import SITES, Pairs, StudyData
from .store import stored

TOPK = "topk"
AT_ONCE = 8  # contexts in one pass of the language model


def name_of(beta: float) -> str:
    return f"beta {beta:g}"


def train(site: Pairs, k: int, seed: int, beta: float | None, args: argparse.Namespace) -> Any:
    """A trained model; beta None is TopK."""
    d = site.x.shape[1]
    start = start_of(args.d_sae, site.x, seed)
    options = {"dead_after": args.dead_after}
    sae = (
        TopKSAE(d, args.d_sae, k, **options)
        if beta is None
        else GradTopKSAE(d, args.d_sae, k, beta=beta, grad_norm="sqrt_d", **options)
    )
    fill(sae, start)
    step = TrainStep(sae, lr=args.lr, decoder_lr=1.0)
    for number, rows in enumerate(batches(site.x, args.batch, args.steps, seed)):
        # a linear fall over the last fifth, as ksae train does
        step.lr = args.lr * min(1.0, (args.steps - number) / (0.2 * args.steps))
        step(site.x[rows]) if beta is None else step(site.x[rows], grad=site.g[rows])
    return sae.eval()


def text(pairs: StudyData, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """About `tokens` held-out tokens: ids and masks."""
    contexts = about(pairs.contexts, tokens)
    ids, mask = contexts.ids.long(), contexts.attended().long()
    return list(zip(ids.split(AT_ONCE), mask.split(AT_ONCE), strict=True))


def unit(
    pairs: StudyData, site: str, k: int, seed: int, betas: list[float], args: argparse.Namespace
) -> dict[str, Any]:
    """Train TopK and a g-SAE for each beta, measure all on the same text."""
    begin = time.perf_counter()
    models: dict[str, nn.Module] = {TOPK: train(pairs.train[site], k, seed, None, args)}
    for beta in betas:
        models[name_of(beta)] = train(pairs.train[site], k, seed, beta, args)
    trained = time.perf_counter()
    held = pairs.held[site]
    results: dict[str, dict[str, float]] = {}
    rates = {}
    for name, sae in models.items():
        plain = evaluate(sae, held.x.split(2048))
        rates[name] = plain.frequency
        results[name] = {key: plain.metrics[key] for key in ("fvu", "nmse", "l0", "dead")}
        if name != TOPK:
            chunks = zip(held.x.split(2048), held.g.split(2048), strict=True)
            with_g = evaluate(sae, [(x, None, g) for x, g in chunks])
            results[name]["fvu_oracle"] = with_g.metrics["fvu"]
    special = pairs.contexts.special_ids
    lm = compare_language_model(
        models,
        pairs.model,
        text(pairs, args.ce_tokens),
        SITES[site],
        exclude=special,
        oracle=[name for name in models if name != TOPK],
    )
    for name in models:
        results[name] |= lm[name]
    # The step is the site's own scale: the mean distance of an activation from the mean.
    c = float((held.x - held.x.mean(0)).norm(dim=1).mean())
    for name in list(models)[1:]:
        latents = matched_latents([rates[TOPK], rates[name]], args.steer_latents)
        for key, model, chosen in zip(
            ("steering_topk", "steering"), (TOPK, name), latents, strict=True
        ):
            few = text(pairs, args.steer_tokens)
            shift = logit_shift(
                models[model], pairs.model, few, SITES[site], chosen, c, exclude=special
            )
            results[name][key] = float(shift.mean())
    return {
        "site": site,
        "k": k,
        "seed": seed,
        "models": results,
        "seconds_training": trained - begin,
        "seconds_measuring": time.perf_counter() - trained,
    }


def work(args: argparse.Namespace) -> list[tuple[str, int, int, list[float]]]:
    """All units, the sweep over beta last: it is at --sweep-k of the first site only."""
    main = [
        (site, k, seed, [args.beta]) for site in args.sites for k in args.ks for seed in args.seeds
    ]
    sweep = [beta for beta in args.sweep if beta != args.beta]
    first = args.sites[0]
    return main + [(first, args.sweep_k, seed, sweep) for seed in args.seeds if sweep]


def missing(record: dict[str, Any], unit_: tuple[str, int, int, list[float]]) -> list[float]:
    """The betas of a unit that have no result yet."""
    here = [u for u in record["units"] if (u["site"], u["k"], u["seed"]) == unit_[:3]]
    return [beta for beta in unit_[3] if not any(name_of(beta) in u["models"] for u in here)]


def add_unit(record: dict[str, Any], result: dict[str, Any]) -> None:
    """A sweep joins the unit of its site, k and seed: TopK is the same run."""
    for u in record["units"]:
        if (u["site"], u["k"], u["seed"]) == (result["site"], result["k"], result["seed"]):
            u["models"] |= {name: m for name, m in result["models"].items() if name != TOPK}
            return
    record["units"].append(result)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--cache", type=Path, default=Path("bench/cache/gsae"), help="folder of the pairs")
    add("--out", type=Path, default=Path("bench/results"), help="default %(default)s")
    add("--tokens", type=int, default=40_000, help="of the text (default %(default)s)")
    add("--sites", nargs="+", choices=list(SITES), default=list(SITES), help="default: all")
    add("--ks", type=int, nargs="+", default=[16, 32, 64], help="default %(default)s")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default %(default)s")
    add("--beta", type=float, default=1.0, help="everywhere (default %(default)s)")
    add("--sweep", type=float, nargs="*", default=[0.3, 3.0], help="more betas, at --sweep-k")
    add("--report", action="store_true", help="only write table and plots of what is there")
    add("--sweep-k", type=int, default=32, help="k of the sweep, at the first site")
    add("--steps", type=int, default=500, help="default %(default)s")
    add("--batch", type=int, default=1024, help="tokens a step (default %(default)s)")
    add("--d-sae", type=int, default=4608, help="latents (default %(default)s)")
    add("--lr", type=float, default=1e-3, help="default %(default)s")
    add("--dead-after", type=int, default=100_000, help="tokens; for AuxK (default %(default)s)")
    add("--ce-tokens", type=int, default=2048, help="held out (default %(default)s)")
    add("--steer-tokens", type=int, default=128, help="held out (default %(default)s)")
    add("--steer-latents", type=int, default=16, help="of each model (default %(default)s)")
    add("--threads", type=int, default=2, help="default %(default)s")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What changes a result: units made under other settings are not mixed."""
    names = ("tokens", "steps", "batch", "d_sae", "lr", "dead_after", "ce_tokens", "steer_tokens")
    return {name: getattr(args, name) for name in (*names, "steer_latents")}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "gsae_study.json"
    record = stored(path, settings_of(args), "units")
    left = [w for w in work(args) if missing(record, w)]
    if args.report:
        gsae_report.write(record, args.out, missing=len(left))
        return 0
    if left:
        pairs = gsae_data.load(args.cache, args.tokens)
        sizes = {"rows": len(pairs.train["resid"].x), "held_out": len(pairs.held["resid"].x)}
        record["machine"] = machine(model="SmolLM2-135M", layer=gsae_data.LAYER, **sizes)
        print(describe(record["machine"] | record["settings"]), flush=True)
    for job in left:
        result = unit(pairs, *job[:3], missing(record, job), args)
        add_unit(record, result)
        write_json(path, record)
        print(gsae_report.line(result), flush=True)
    gsae_report.write(record, args.out, missing=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
