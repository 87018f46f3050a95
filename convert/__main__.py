"""The command line of `convert`.

    python -m convert SOURCE [--base BASE] --out DIR          # weights to a diffusers directory
    python -m convert judges --kind KIND SOURCE --out DIR     # a judge to ONNX graphs, see convert.graphs.export

Exit status: 0, or 2 with one line of explanation.
"""

import argparse
import sys
from pathlib import Path

import convert
from spqr_jax import params as params_lib
from spqr_jax.files import storage
from spqr_jax.pipeline import Pipeline


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    if argv[:1] == ["judges"]:
        from convert.graphs import export

        export.main(argv[1:])
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a pipeline, component, checkpoint or adapter (see convert.load)")
    parser.add_argument("--base", help="the pipeline that a partial checkpoint changes")
    parser.add_argument("--out", required=True, help="diffusers directory to write")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--strength", default=1.0, type=float, help="factor of a LoRA or SPM adapter")
    arguments = parser.parse_args(argv)
    try:
        recognised = convert.recognise(arguments.source)
        print(f"{arguments.source}: {recognised.kind}: {recognised.detail}", flush=True)
        pipeline = convert.load(
            arguments.source, base=arguments.base, dtype=arguments.dtype, strength=arguments.strength
        )
        convert.save_diffusers(pipeline, arguments.out)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    report(pipeline, Path(arguments.source), Path(arguments.out))
    return 0


def report(pipeline: Pipeline, source: Path, out: Path) -> None:
    """Prints counts and dtypes of every component, and the sha256 of the file read and of every weight file written."""
    if source.is_file():
        print(f"sha256 {storage.sha256(source)}  {source}")
    for component, params in pipeline.params.items():
        leaves = params_lib.flatten(params)
        dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves.values()}))
        print(f"{component}: {len(leaves)} tensors, {params_lib.count(params):,} parameters, {dtypes}")
    for path in sorted(out.rglob("*.safetensors")):
        print(f"sha256 {storage.sha256(path)}  {path}")
    print(f"written to {out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
