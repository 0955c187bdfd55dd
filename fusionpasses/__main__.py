"""``python -m fusionpasses COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fusionpasses import doctor
from fusionpasses.bench import run as bench
from fusionpasses.errors import FusionError


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusionpasses", description="torch.compile fusion passes for MXFP4")
    commands = parser.add_subparsers(dest="command", required=True)
    measured = "every norm + quant op beside a copy, eager torch, Inductor and peers"
    command = commands.add_parser("bench", help=measured, description=measured)
    bench.add_arguments(command)
    command.set_defaults(run=bench.main)
    examined = "what is installed, which GPU, every probe with its reason, and who would run each op"
    command = commands.add_parser("doctor", help=examined, description=f"{examined}. {doctor.EXIT}")
    doctor.add_arguments(command)
    command.set_defaults(run=doctor.main)
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except FusionError as error:
        print(f"fusionpasses {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
