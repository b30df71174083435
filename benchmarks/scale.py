"""Tables of docs/scale.md, from the results of `gpt4moe compile --json` in benchmarks/results/compile.

    python benchmarks/scale.py [--write] [--json]

Prints what each compiled program takes of a chip; --write puts the tables between the marks in docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/compile"
DOCUMENT = ROOT / "docs/scale.md"
# Which component the products of a source file, or of a function in it, belong to; what the compiler names no source
# for is `other`. None of these runs has dense layers: its plain feed-forwards are cross-attention's.
COMPONENTS = {
    "attention.py": "attention",
    "layers.py": "attention",
    "attention_kernel.py": "attention_core",
    "splash_attention_kernel.py": "attention_core",
    "experts.py": "experts",
    "grouped_tpu.py": "experts",
    "grouped_loop.py": "experts",
    "grouped_matmul.py": "experts",
    "ragged-dot-none": "experts",
    "moe.py": "router",
    "vocabulary.py": "head",
    "transformer.py": "head",
    "layers.py:FeedForward.__call__": "vision",
    "layers.py:Linear.__call__": "vision",
    "bidirectional.py": "vision",
    "cross_attention.py": "vision",
}
BEGIN, END = "<!-- tables: python benchmarks/scale.py --write -->", "<!-- end of tables -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    results = read_results()
    if arguments.write:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), tables(results)))
    print(json.dumps(results) if arguments.json else tables(results))


def read_results() -> dict[str, dict]:
    """Returns the documents of `compile` by the name of their run file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def with_tables(document: str, text: str) -> str:
    """Returns the document with `text` between its marks."""
    before, _, rest = document.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def tables(results: dict[str, dict]) -> str:
    """Returns memory, arithmetic and collectives of every result as Markdown."""
    parts = [_memory(results), _arithmetic(results)]
    parts += [f"Products of `{name}`, on one chip:\n\n{_products(document)}" for name, document in results.items()]
    parts += [f"Collectives of `{name}`, one step:\n\n{_collectives(document)}" for name, document in results.items()]
    return "\n\n".join(parts)


def _memory(results: dict[str, dict]) -> str:
    head = ("run", "program", "chips", "mesh", "arguments", "temporaries", "code", "total", "HBM", "fits")
    rows = [
        (
            f"`{name}`",
            document["program"],
            f"{document['chips']:,} ({document['slices']} x {document['topology']})",
            " ".join(f"{axis} {size}" for axis, size in document["mesh"].items()),
            *(_gigabytes(document[f"{part}_bytes"]) for part in ("argument", "temporary", "generated_code", "total")),
            _gigabytes(document["memory_bytes"]),
            "yes" if document["fits"] else f"no, by {_gigabytes(document['missing_bytes'])}",
        )
        for name, document in results.items()
    ]
    return _table(head, rows)


def _arithmetic(results: dict[str, dict]) -> str:
    head = (
        "run", "FLOPs a chip", "over analytic", "over 6N (2N decoding)", "useful", "useful, recomputation aside",
        "s of compute, compiler's estimate", "s at peak", "s to read the arguments", "s to compile", "date",
    )  # fmt: skip
    rows = [
        (
            f"`{name}`",
            f"{document['flops_per_chip']:.4g}",
            f"{document['compiled_over_executed']:.4f}",
            f"{document['compiled_over_model_flops']:.3f}",
            f"{document['useful_fraction']:.3f}",
            f"{document['useful_fraction_without_recomputation']:.3f}",
            f"{document['compute_seconds']:.3g}",
            f"{document['flops_seconds']:.3g}",
            f"{document['argument_seconds']:.2g}",
            f"{document['compile_seconds']:.0f}",
            document["date"],
        )
        for name, document in results.items()
    ]
    return _table(head, rows)


def _products(document: dict) -> str:
    """Compiled FLOPs by the file that asks for them beside the analytic count of its component."""
    compiled = dict.fromkeys(document["executed_flops"], 0.0) | {"other": 0.0}
    for item in document["products"]:
        source, file = item["source"], item["source"].partition(":")[0]
        compiled[COMPONENTS.get(source) or COMPONENTS.get(file, "other")] += item["flops"]
    rows = [
        (name, f"{flops:.4g}", f"{analytic:.4g}", f"{flops - analytic:+.3g}")
        for name, flops in compiled.items()
        if (analytic := document["executed_flops"].get(name, 0.0)) or flops
    ]
    return _table(("component", "compiled FLOPs", "analytic", "difference"), rows)


def _collectives(document: dict) -> str:
    rows = [
        (item["kind"], ", ".join(item["axes"]), f"{item['count']:,}", f"{item['bytes_sent'] / 1e9:,.3f}")
        for item in document["collectives"]
    ]
    return _table(("collective", "axes", "count", "GB sent by a chip"), rows)


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    main()
