"""Predict what every phase needs before a GPU is asked for: memory, disk, steps and time; no weights are loaded.

    python training/plan.py --config configs/math_8b.yaml --gpus 8 --gpu-memory 80

Models are built on the meta device and one micro batch is traced through them, so that it runs anywhere.  Of stage 2, whose step
is hundreds of passes, a few layers are traced and the others added, which are like them.
Ends with status 0 where every phase fits, 1 where one does not (and says what makes it fit), 2 where a setting is missing
or a phase cannot start (whose reason is printed; the others are planned).
"""

from __future__ import annotations

if not __package__:  # started as a program
    import preflight  # noqa: F401

import argparse
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from ladir.config.loader import parse_args
from ladir.data.records import BadRecords
from ladir.errors import UnusableError
from training.planning.models import PlanError
from training.planning.predict import Planner
from training.planning.prediction import Machine
from training.planning.report import print_report
from training.runtime.ds_config import DeepSpeedConfigError
from training.runtime.topology import GIB, GPU_MEMORY, Topology, gpu_memory


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, not {text}")
    return int(text)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=_count, required=True, metavar="N", help="GPUs (processes) of the job")
    told = gpu_memory(os.environ)
    parser.add_argument(
        "--gpu-memory",
        type=float,
        default=told,
        required=told is None,
        metavar="GIB",
        help=f"memory of one GPU, in GiB (the variable {GPU_MEMORY}, which slurm/submit.sh reads as well)",
    )
    parser.add_argument("--gpus-per-node", type=_count, default=8, metavar="N", help="GPUs that share a host's memory (8)")
    parser.add_argument("--reserve", type=float, default=3.0, metavar="GIB", help="kept for CUDA, NCCL, fragmentation (3)")
    parser.add_argument("--tflops", type=float, default=989.0, help="dense bf16 peak of one GPU in TFLOP/s (989: H100 SXM)")
    parser.add_argument("--launch-us", type=float, default=20.0, metavar="US", help="microseconds to launch an operator (20)")
    parser.add_argument(
        "--no-graphs", action="store_true", help="denoising steps are not replayed: of a CPU, whose launches cost as well"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="share of that peak that is reached (0.4)")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    try:
        config, arguments = parse_args(argv, __doc__ or "", _add_arguments)
    except UnusableError as error:
        sys.stderr.write(f"plan.py: {error}\n")
        return 2
    machine = Machine(
        Topology.of(arguments.gpus, arguments.gpus_per_node, arguments.gpu_memory),
        reserve=int(arguments.reserve * GIB),
        flops=arguments.tflops * 1e12,
        mfu=arguments.mfu,
        launch_seconds=arguments.launch_us * 1e-6,
        replays=not arguments.no_graphs,
    )
    try:
        planner = Planner(config, machine)
        predictions = list(planner.predictions())
        left_out = list(planner.left_out())
    except (PlanError, DeepSpeedConfigError, BadRecords, UnusableError) as error:
        sys.stderr.write(f"plan.py: {error}\n")
        return 2
    print_report(Console(), predictions, machine, planner.data.measured, left_out, planner.refused)
    if planner.refused:
        return 2
    return 0 if all(p.fits for p in predictions) else 1


if __name__ == "__main__":
    sys.exit(main())
