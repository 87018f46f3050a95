"""python -m convert SOURCE [--base BASE] --out DIR, or python -m convert judges --kind KIND SOURCE --out DIR."""

import argparse
import sys

import convert
from spqr_jax import params as params_lib


def main(argv: list[str]) -> int:
    if argv[:1] == ["judges"]:
        from convert import judges_onnx

        judges_onnx.main(argv[1:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m convert", description=__doc__)
    parser.add_argument("source", help="a diffusers directory")
    parser.add_argument("--base", help="the pipeline that a partial checkpoint changes")
    parser.add_argument("--out", required=True, help="diffusers directory to write")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args(argv)
    try:
        pipeline = convert.load(arguments.source, base=arguments.base, dtype=arguments.dtype)
    except (OSError, ValueError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    for component, params in pipeline.params.items():
        print(f"{component}: {len(params_lib.flatten(params))} tensors, {params_lib.count(params):,} parameters")
    convert.save_diffusers(pipeline, arguments.out)
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
