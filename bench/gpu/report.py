# SPDX-License-Identifier: Apache-2.0
"""Results of gpu/run.py: JSON and markdown, written anew after each measurement; goals."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Record:
    """What is known so far, on disk."""

    def __init__(self, folder: Path, name: str, minutes: float) -> None:
        self.base = folder / f"gpu_{name}_{time.strftime('%Y-%m-%d')}"
        self.data: dict[str, Any] = {
            "finished": False, "start": time.time(), "minutes": minutes, "begun": [],
            "machine": {}, "build": {}, "tests": {}, "ceilings": {}, "choice": {}, "profile": {},
            "rows": [], "problems": [],
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.save()

    @classmethod
    def resume(cls, path: Path) -> Record:
        """The record that another process began; one of them writes at a time."""
        record = cls.__new__(cls)
        record.base = path.with_suffix("")
        record.reload()
        return record

    def reload(self) -> dict[str, Any]:
        """What is on disk now."""
        self.data = json.loads(self.path.read_text())
        return self.data

    @property
    def path(self) -> Path:
        return self.base.with_name(self.base.name + ".json")

    def begin(self, name: str) -> None:
        """A section begins: whatever becomes of it, it is not tried again."""
        print(f"{name}, {self.left():.0f} s left", flush=True)
        self.data["begun"].append(name)
        self.save()

    def left(self) -> float:
        """Seconds."""
        return float(self.data["minutes"] * 60 - (time.time() - self.data["start"]))

    def note(self, section: str, **values: Any) -> None:
        self.data[section].update(values)
        self.save()

    def row(self, **values: Any) -> None:
        self.data["rows"].append(values)
        self.save()

    def problem(self, what: str) -> None:
        print(f"PROBLEM {what}", flush=True)
        self.data["problems"].append(what)
        self.save()

    def save(self) -> None:
        self.data["seconds"] = round(time.time() - self.data["start"], 1)
        for suffix, text in (
            (".json", json.dumps(self.data, indent=1)),
            (".md", report(self.data)),
        ):
            scratch = self.base.with_name(self.base.name + suffix + ".part")
            scratch.write_text(text + "\n")
            scratch.replace(self.base.with_name(self.base.name + suffix))


def goals(rows: list[dict[str, Any]]) -> list[tuple[str, float, str, float, bool]]:
    """(what, measured, relation, wanted, reached) for what was measured."""
    found = {(r["shape"], r["op"], r["way"]): r for r in rows if "median" in r}

    def ratio(shape: str, op: str, a: str, b: str) -> float | None:
        pair = found.get((shape, op, a)), found.get((shape, op, b))
        return pair[0]["median"] / pair[1]["median"] if pair[0] and pair[1] else None

    def field(shape: str, op: str, name: str) -> float | None:
        return found.get((shape, op, "ksae"), {}).get(name)

    wanted: list[tuple[str, float | None, str, float]] = []
    for shape, encode, step in (("A", 1.12, 2.3), ("B", 1.5, 2.9)):
        for op in ("select", "select float32"):
            wanted.append((f"{shape} {op}: of copy", field(shape, op, "fraction"), ">=", 0.7))
            faster = ratio(shape, op, "torch.topk", "ksae")
            wanted.append((f"{shape} {op}: torch.topk / ksae", faster, ">=", 5))
        wanted.append((f"{shape} decode: of gather", field(shape, "decode", "fraction"), ">=", 0.7))
        part = field(shape, "latent pass", "fraction")
        wanted.append((f"{shape} latent pass: of bytes", part, ">=", 0.65))
        share = ratio(shape, "encode + select", "ksae", "product alone")
        wanted.append((f"{shape} encode + select / product", share, "<=", encode))
        wanted.append((f"{shape} step / product", field(shape, "step", "products"), "<=", step))
        faster = ratio(shape, "step", "dense torch", "ksae")
        wanted.append((f"{shape} dense torch step / ksae's", faster, ">=", 3))
    # of the fused Triton kernels
    way = "fused Triton"
    for shape, encode, screened in (("A", 1.12, 1.5), ("B", 1.25, 1.8)):
        share = ratio(shape, "encode + select", way, "product alone")
        wanted.append((f"{shape} fused encode / product", share, "<=", encode))
        share = ratio(shape, "grad encode + select", way, "products alone")
        wanted.append((f"{shape} fused grad encode / both products", share, "<=", 1.15))
        for of in ("ksae", way):
            share = ratio(shape, "encode float32", of, "bf16 product alone")
            wanted.append((f"{shape} float32 by {of} / bf16 product", share, "<=", screened))
    extra = found.get(("A", "encode + select", way), {}).get("extra_bytes")
    gigabytes = None if extra is None else extra / 1e9
    wanted.append(("A fused encode: GB of its own", gigabytes, "<=", 0.2))
    return [
        (what, got, relation, want, got >= want if relation == ">=" else got <= want)
        for what, got, relation, want in wanted
        if got is not None
    ]


def report(data: Mapping[str, Any]) -> str:
    """The record as markdown."""
    lines = [f"# {data['machine'].get('gpu', 'GPU')}", ""]
    lines += [f"- {name}: {value}" for name, value in data["machine"].items()]
    lines += [f"- ceiling, {name}: {value:.4g}/s" for name, value in data["ceilings"].items()]
    built, tests = data["build"].get("status", "not run"), data["tests"]
    ran = "not run"
    if "pytest" in tests:
        ran = f"{tests['pytest']} ({tests['passed']} passed, {len(tests['failed'])} failed)"
    lines += [f"- build: {built}; tests marked gpu: {ran}; finished: {data['finished']}"]
    lines += [f"- failed: {name}" for name in tests.get("failed", [])]
    rows = [found["row"] for found in data["choice"].values() if "row" in found]
    lines += [f"- for the table in ksae/backends/serving.py: {row}" for row in rows]
    lines += [f"- PROBLEM: {text}" for text in data["problems"]]
    header = ("shape", "op", "way", "ms", "quartiles", "of ceiling", "products", "wall", "extra MB")
    lines += ["", f"| {' | '.join(header)} |", "|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for r in data["rows"]:
        cells = [r["shape"], r["op"], r["way"]]
        if "median" in r:
            cells += [f"{r['median'] * 1e3:.4g}", f"{r['q1'] * 1e3:.4g}-{r['q3'] * 1e3:.4g}"]
            cells += [f"{r['fraction']:.2f}"]
        else:
            cells += [r["note"], "", ""]
        cells += [f"{r['products']:.2f}" if "products" in r else ""]
        cells += [f"{r['wall'] * 1e3:.4g}" if "wall" in r else ""]
        cells += [f"{r['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in r else ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| goal | measured | wanted | reached |", "|---|---:|---:|---|"]
    for what, got, relation, want, reached in goals(data["rows"]):
        lines.append(f"| {what} | {got:.3g} | {relation} {want} | {'yes' if reached else 'NO'} |")
    for step, kernels in data["profile"].items():
        calls = sum(kernel["calls"] for kernel in kernels)
        lines += [
            "",
            f"Step {step}: {calls} calls",
            "",
            "| kernel | calls | us |",
            "|---|---:|---:|",
        ]
        lines += [f"| {e['kernel']} | {e['calls']} | {e['us']} |" for e in kernels]
    return "\n".join(lines)
