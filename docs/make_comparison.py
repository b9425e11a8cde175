"""Run the comparisons of docs/comparison.md, and write their tables and a picture for each data set into it.

.venv/bin/python docs/make_comparison.py            # all of them: half an hour on one idle core
.venv/bin/python docs/make_comparison.py hospitals  # one part (digits, hospitals, choices): the other tables stay
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedqueue.config.loading import load_config
from fedqueue.errors import ConfigurationError

DOCS = Path(__file__).parent
PAGE = DOCS / "comparison.md"


@dataclass(frozen=True)
class Data:
    """A data set: the arguments that all its comparisons share, its splits, and its clients' speeds."""

    config: str
    common: tuple[str, ...]
    splits: dict[str, tuple[str, ...]]
    speeds: dict[str, tuple[str, ...]]
    tuned: dict[str, dict[str, str]]
    """Split → strategy → settings that were chosen for it; a strategy without any takes fedbuff's."""
    fedcompass: str
    cohort: str


def rates(fadas_step: float, **strategies: float) -> dict[str, str]:
    """Strategy → the override of its learning rate; FADAS trains with fedbuff's rate and has one more on the server."""
    tuned = {name: f"training.learning_rate={rate:g}" for name, rate in strategies.items()}
    return {**tuned, "fadas": f"{tuned['fedbuff']} aggregation.strategy_options.learning_rate={fadas_step:g}"}


DATA = {
    "digits": Data(
        config="examples/digits/federation.toml",
        common=(
            "--updates", "240", "--seeds", "3", "--seed-key", "task.options.seed", "--set", "stop.seconds=100000",
        ),
        splits={
            "Dirichlet 0.3": ("--set", "task.options.scheme=dirichlet"),
            "IID": ("--set", "task.options.scheme=iid"),
        },
        speeds={
            "equal": (),
            "1:2:4": ("--speeds", "1:2:4"),
            "one client 20 times slower": ("--speeds", "20:1:1:1:1:1:1:1"),
        },
        tuned={
            "Dirichlet 0.3": rates(fedavg=0.6, fedasync=0.6, fedbuff=0.6, ca2fl=0.6, fadas_step=0.01),
            "IID": rates(fedavg=1, fedasync=1, fedbuff=0.6, ca2fl=0.6, fadas_step=0.01),
        },
        fedcompass="dispatch.fedcompass.min_steps=10 dispatch.fedcompass.max_steps=50",
        cohort="aggregation.cohort_size=6 dispatch.over_selection=1.3",
    ),
    "hospitals": Data(
        config="examples/hospitals/federation.toml",
        common=(
            "--updates", "240", "--seeds", "3", "--set", "task.options.central_test=true",
            "--set", "stop={versions=100000, target={loss=0.375}}",
        ),
        splits={
            "each hospital its own rows": ("--set", "task.options.mixed=false"),
            "all rows dealt out at random": ("--set", "task.options.mixed=true"),
        },
        speeds={
            "equal": (),
            "1:2:4": ("--speeds", "1:2:4"),
            "one client 20 times slower": ("--speeds", "20:1:1:1"),
        },
        tuned={
            "each hospital its own rows": rates(fedavg=0.2, fedasync=0.05, fedbuff=0.1, ca2fl=0.2, fadas_step=0.01),
            "all rows dealt out at random": rates(fedavg=0.2, fedasync=0.2, fedbuff=0.2, ca2fl=0.2, fadas_step=0.03),
        },
        fedcompass="dispatch.fedcompass.min_steps=4 dispatch.fedcompass.max_steps=20",
        cohort="aggregation.cohort_size=3 dispatch.over_selection=1.3",
    ),
}  # fmt: skip


DIGITS = ("examples/digits/federation.toml", *DATA["digits"].common, "--speeds", "1:2:4")
FADAS = "aggregation.strategy=fadas aggregation.strategy_options.delay_threshold=1 training.learning_rate=0.6"
DIVIDE = "aggregation.strategy_options.delay_rule=divide"
CHOICES = {
    "The divisor of FedBuff: `aggregation.normalize`": (
        *DIGITS, "--set", "training.learning_rate=0.6",
        "--variant", "count: aggregation.normalize=count",
        "--variant", "weights: aggregation.normalize=weights",
    ),
    "What FedAsync mixes in: `aggregation.mixing`": (
        *DIGITS, "--set", "aggregation.strategy=fedasync", "--set", "training.learning_rate=0.6",
        "--variant", "model: aggregation.mixing=model",
        "--variant", "delta: aggregation.mixing=delta",
        "--variant", "delta, alpha 0.2: aggregation.mixing=delta aggregation.alpha=0.2",
    ),
    "How FADAS treats a delay: `delay_rule`": (
        *DIGITS,
        "--variant", f"bound, 0.01: {FADAS} aggregation.strategy_options.learning_rate=0.01",
        "--variant", f"divide, 0.01: {FADAS} aggregation.strategy_options.learning_rate=0.01 {DIVIDE}",
        "--variant", f"bound, 0.03: {FADAS} aggregation.strategy_options.learning_rate=0.03",
        "--variant", f"divide, 0.03: {FADAS} aggregation.strategy_options.learning_rate=0.03 {DIVIDE}",
    ),
    "BatchNorm's statistics: `aggregation.running_statistics`": (
        *DIGITS, "--set", "task.options.model=cnn", "--set", "training.learning_rate=0.1",
        "--variant", "mean: aggregation.running_statistics=mean",
        "--variant", "drift: aggregation.running_statistics=drift",
        "--variant", "frozen: aggregation.running_statistics=frozen",
    ),
    "Why CA²FL diverged on IID digits with equal speeds": (
        *DIGITS[:-2], "--set", "task.options.scheme=iid",
        "--variant", "fedbuff, undamped: aggregation.staleness.function=constant training.learning_rate=0.6",
        "--variant", "ca2fl: aggregation.strategy=ca2fl training.learning_rate=0.6",
        "--variant", "ca2fl, 0.1: aggregation.strategy=ca2fl training.learning_rate=0.1",
        "--variant", "ca2fl, 4 at once: aggregation.strategy=ca2fl dispatch.concurrency=4 training.learning_rate=0.6",
        "--variant", "ca2fl, server 0.5: aggregation.strategy=ca2fl server_optimizer.learning_rate=0.5 "
        "training.learning_rate=0.6",
    ),
}  # fmt: skip
"""A choice that a paper leaves open → the arguments of `fedqueue compare` that measure it."""


def known(data: Data, strategy: str) -> bool:
    try:
        load_config(DOCS.parent / data.config, [f"aggregation.strategy={strategy}"])
    except ConfigurationError:
        return False
    return True


def variants(data: Data, split: str) -> Iterator[str]:
    """Every strategy, and two schedules, as variants with the settings that were chosen for them."""
    tuned = data.tuned[split]
    for strategy in ("fedavg", "fedasync", "fedbuff", "fadas", "ca2fl"):
        if known(data, strategy):
            yield f"{strategy}: aggregation.strategy={strategy} {tuned.get(strategy, tuned['fedbuff'])}"
    fedcompass = f"dispatch.schedule=fedcompass {data.fedcompass}"
    yield f"fedbuff+fedcompass: aggregation.strategy=fedbuff {fedcompass} {tuned['fedbuff']}"
    yield f"fedavg+over: aggregation.strategy=fedavg {data.cohort} {tuned['fedavg']}"


def command(data: Data, split: str, speeds: str) -> list[str]:
    """Arguments of `fedqueue` for one table."""
    words = [word for variant in variants(data, split) for word in ("--variant", variant)]
    return ["compare", data.config, *data.common, *data.splits[split], *data.speeds[speeds], *words]


def table(arguments: list[str], folder: Path) -> str:
    """Run `fedqueue` with these arguments, with results in `folder`; returns the Markdown table."""
    program = [sys.executable, "-m", "fedqueue_coordinator", *arguments, "--output", str(folder)]
    subprocess.run(program, check=True, stdout=subprocess.DEVNULL, cwd=DOCS.parent)  # noqa: S603
    lines = (folder / "comparison.md").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def choices() -> Iterator[str]:
    for title, words in CHOICES.items():
        sys.stderr.write(f"{title}\n")
        arguments = ["compare", *words]
        with tempfile.TemporaryDirectory() as folder:
            yield f"\n### {title}\n\n    fedqueue {shlex.join(arguments)}\n\n{table(arguments, Path(folder))}\n"


def sections(name: str) -> Iterator[str]:
    """Generated parts of the page for a data set, one by one, as its runs end."""
    data = DATA[name]
    pictures = DOCS / "pictures"
    pictures.mkdir(exist_ok=True)
    for split in data.splits:
        yield f"\n### {name}: {split}\n\n    fedqueue {shlex.join(command(data, split, 'equal'))}\n"
        for speeds, arguments in data.speeds.items():
            sys.stderr.write(f"{name}, {split}, {speeds}\n")
            with tempfile.TemporaryDirectory() as folder:
                rows = table(command(data, split, speeds), Path(folder))
                drawn = (split, speeds) == (next(iter(data.splits)), list(data.speeds)[-1])
                if drawn:
                    (pictures / f"comparison-{name}.png").write_bytes((Path(folder) / "comparison.png").read_bytes())
            option = f", with `{shlex.join(arguments)}`" if arguments else ""
            yield f"\n**{speeds}**{option}:\n\n{rows}\n"
            if drawn:
                yield f"\n![{name}, {split}, {speeds}](pictures/comparison-{name}.png)\n"


def write(name: str) -> None:
    """Replace the text between the part's two marks in the page."""
    begin, end = (f"<!-- {name}: {mark} -->\n" for mark in ("begin", "end"))
    generated = "".join(choices() if name == "choices" else sections(name))
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(begin)[0], page.split(end)[1]
    PAGE.write_text(before + begin + generated + "\n" + end + after, encoding="utf-8")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or (*DATA, "choices"):
        write(wanted)
