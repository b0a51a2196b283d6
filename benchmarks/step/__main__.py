"""Time and memory of a whole distillation step, its own matrix products, and the script that one would write first.

python -m benchmarks.step --help
"""

import tempfile
from pathlib import Path

from benchmarks.report import ROOT, Report, parser
from benchmarks.step import questions
from benchmarks.step.contenders import CLOCKS
from benchmarks.step.growth_plot import draw
from benchmarks.step.questions import Measurement
from benchmarks.step.sizes import DEVICE_SIZES, FEATURE_SIZES, GROWTHS, SIZES

QUESTIONS = ("step", "memory", "features", "growth", "replicas", "device")
MEASURED = ("megadistill", "benchmarks/*.py", "benchmarks/step")
FIGURE = ROOT / "docs/results/step-growth.png"
HELP = """\
questions (all, when --only does not choose):
  step      the whole step (stream, teacher, student, loss, optimizer), in turn with its own matrix products (recorded
            as a step runs, executed alone from memory that lies there; then as plain calls, each of which allocates its
            output, which a step that keeps its buffers can beat), with the obvious script (a stock ZeRO-3 engine,
            the whole teacher in each process, all logits, F.kl_div) and with TRL's GKDTrainer where it is installed;
            all of them in the same processes of one thread each
  memory    peak of resident memory in two steps, each contender in processes of its own, above that after two steps of
            a tiny model (code and caches are not counted)
  features  what each feature is worth: the step with one more of them at a time, then with checkpointing
  growth    time a token as the sequence or the vocabulary grows, beside the products' own; draws a figure, too
  replicas  two ranks that share a student, in turn with two that have a replica each (distributed.shard: 1): time, and
            what a rank calls and sends in a step; of deep and wide
  device    tokens a second of one accelerator, a rank on each of them: labels 8B, distillation 8B to 4B

sizes: deep (V 2,000, deep bodies), wide (V 32,000), widest (V 128,000). memory, features and growth are asked of the
most ranks alone, features of deep and wide. A ratio is the median over rounds of this / that in the same round. All of
it takes about 18 minutes on two quiet cores, a third less with --ranks 2."""


def main() -> None:
    options = parser("step", __doc__, HELP, QUESTIONS)
    options.add_argument("--size", nargs="+", choices=list(SIZES), default=["deep", "wide", "widest"])
    options.add_argument("--ranks", nargs="+", type=int, default=[2, 1], help="default: 2 and 1")
    options.add_argument("--rounds", dest="repeats", type=int, help="the same as --repeats (default 5)")
    options.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a machine that others use too")
    options.set_defaults(repeats=5)
    arguments = options.parse_args()
    report = Report(threads=1, repeats=arguments.repeats, measured=MEASURED)
    report.print_machine()
    world = max(arguments.ranks)
    with tempfile.TemporaryDirectory() as folder:
        measurement = Measurement(Path(folder), report, arguments.clock)
        for name in arguments.size:
            size = SIZES[name]
            if "step" in arguments.only:
                for each in arguments.ranks:
                    questions.step(measurement, name, size, world=each)
            if "memory" in arguments.only:
                questions.memory(measurement, name, size, world=world)
            if "features" in arguments.only and name in FEATURE_SIZES:
                questions.features(measurement, name, size, world=world)
            if "replicas" in arguments.only and name in FEATURE_SIZES:
                questions.replicas(measurement, name, size)
        if "growth" in arguments.only:
            points = {
                grows: questions.growth(measurement, grows, sizes, world=world) for grows, sizes in GROWTHS.items()
            }
            if not arguments.no_csv:
                draw(points, FIGURE)
        if "device" in arguments.only:
            for name, (size, bar) in DEVICE_SIZES.items():
                questions.device(measurement, name, size, bar=bar)
    if not arguments.no_csv:
        report.append_to(arguments.csv)


if __name__ == "__main__":
    main()
