"""Fill documentation pages from the program itself, and convert formulas to MathML."""

from __future__ import annotations

import html
import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer
from latex2mathml.converter import convert

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers in a page."""
    for marker, make in MARKERS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return re.sub("<!-- report: (.+) -->", report, markdown)


FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace LaTeX by MathML, which browsers render without a script."""
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    tag, bracket, latex = match.groups()
    display = "block" if bracket == "[" else "inline"
    spaced = re.sub(r"\\log ?(?=[A-Za-z]|\\(?!big|left|\|))", r"\\log\\, ", html.unescape(latex))
    return f"<{tag}>{convert(spaced.strip(), display=display)}</{tag}>"


def balance_table() -> str:
    """`benchmarks/results/balance.json` as tables, one per data set."""
    results = json.loads((RESULTS / "balance.json").read_text())
    lines: list[str] = []
    for dataset in ("cifar10", "digits"):
        rows = [row for name, row in results.items() if name.split()[0] == dataset]
        if not rows:
            continue
        noisy = " / ".join(f"{value:.1f}" for value in rows[0]["psnr_noisy"].values())
        lines += [
            f"**{dataset}**, {rows[0]['steps']} steps; accuracy on {rows[0]['accuracy_images']:,} "
            f"test images, PSNR on the first {rows[0]['psnr_images']:,} (noisy: {noisy} dB)",
            "",
            "| objective and settings | accuracy | 15 | 25 | 50 |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            trained = row["trained_for"]
            accuracy = f"{row['accuracy']:.1%}" if trained["ce"] else "-"
            values = [f"{v:.2f}" if trained["dsm"] else "-" for v in row["psnr"].values()]
            name = row["name"].removeprefix(f"{dataset} ")
            lines.append(f"| {name} (`{row['objective']}`) | {accuracy} | {' | '.join(values)} |")
        commits = sorted({row["environment"]["git_commit"] or "unknown" for row in rows})
        environment = rows[0]["environment"]
        lines += [
            "",
            f"PyTorch {environment['torch']}, {environment['cores']} CPU cores, code at "
            f"{', '.join(commits)}, seed 0 unless stated.",
            "",
        ]
    return "\n".join(lines)


def sizes_table() -> str:
    """`benchmarks/results/sizes.json` as a table."""
    results = json.loads((RESULTS / "sizes.json").read_text())
    ways = list(dict.fromkeys(row["way"] for row in results["rows"]))
    cells = {(row["way"], row["sigma"]): row for row in results["rows"]}
    sigmas = sorted({sigma for _, sigma in cells})
    lines = [
        "| method | " + " | ".join(f"{s}" for s in sigmas) + " | best factor | sigma ratio | s |",
        "|---|" + "---|" * (len(sigmas) + 3),
    ]
    for way in ways:
        own = [cells[way, sigma] for sigma in sigmas]
        mean = {k: sum(r[k] for r in own) / len(own) for k in ("best_scale", "sigma_ratio")}
        seconds = min(row["seconds"] for row in own)
        lines.append(
            f"| {way} | "
            + " | ".join(f"{row['psnr']:.2f}" for row in own)
            + f" | {mean['best_scale']:.2f} | {mean['sigma_ratio']:.2f} | {seconds:.2f} |"
        )
    environment = results["environment"]
    lines += [
        "",
        f"{results['images']} of {results['of']} images (every eighth), PSNR in dB; *best factor*: "
        "the factor of the score that gives the highest PSNR, mean over levels; *sigma ratio*: "
        "estimated over true noise level; *s*: seconds per image on one thread of a busy machine. "
        f"PyTorch {environment['torch']}, code at {environment['git_commit']}.",
    ]
    return "\n".join(lines)


def command_reference() -> str:
    """Every command with its arguments and options, from the objects that parse them."""
    from ebmkit.cli import app

    lines: list[str] = []
    _describe(typer.main.get_command(app), "ebmkit", lines)
    return "\n".join(lines)


def _describe(command: Any, name: str, lines: list[str]) -> None:
    from ebmkit.cli.options import argument_name

    children = getattr(command, "commands", None)
    if children:
        for child in children.values():
            _describe(child, f"{name} {child.name}", lines)
        return
    paragraphs = (command.help or "").replace("\n\n", "\0").replace("\n", " ").split("\0")
    usage = " ".join([name, *map(argument_name, command.arguments), "[OPTIONS]"])
    lines += [f"## {name}", "", "```", usage, "```", "", *paragraphs, ""]
    if command.epilog:
        lines += ["For example:", "", "```", command.epilog, "```", ""]
    context = command.make_context(name, [], resilient_parsing=True)
    arguments, options = command.help_rows(context)
    rows = [(f"`{names}`", *_help_cells(text)) for names, text in arguments]
    for names, text in options:
        flags, _, kind = names.partition(" ") if " / " not in names else (names, "", "flag")
        while kind.startswith("-"):  # -n, --count INTEGER
            second, _, kind = kind.partition(" ")
            flags += f" {second}"
        meaning, kind_range, default = _help_cells(text, kind or "flag")
        if flags != "--help":
            rows.append((f"`{flags}`", meaning, kind_range, default))
    lines += _table(("argument or option", "meaning", "type", "default"), rows)


def _help_cells(text: str, kind: str = "") -> tuple[str, str, str]:
    """Meaning, type with its range, and default, of a help text that ends in ``[...]``."""
    meaning, extra = re.fullmatch(r"(.*?)((?:\s+\[[^\[\]]*\])*)", text, re.DOTALL).groups()
    groups = re.findall(r"\[([^\[\]]*)\]", extra)
    items = [item for group in groups for item in re.split(r"; (?=\S+[<>]|required)", group)]
    values = [item.removeprefix("default: ") for item in items if item.startswith("default: ")]
    ranges = [item for item in items if re.match(r"\S+[<>]", item)]
    default = "required" if "required" in items else "; ".join(values)
    shown = ", ".join([kind, *(f"`{bound}`" for bound in ranges)]) if kind else ""
    return meaning, shown, default


def command_summary() -> str:
    """Every command and the first line of its help."""
    from ebmkit.cli.app import COMMANDS

    rows = []
    for group in COMMANDS.values():
        for name, function in group.items():
            summary = (function.__doc__ or "").partition("\n")[0].replace("|", "\\|")
            rows.append((f"[`ebmkit {name}`](cli.md#ebmkit-{name.replace(' ', '-')})", summary))
    return "\n".join(_table(("command", "what it does"), rows))


def objectives() -> str:
    """The table of `ebmkit list objectives`."""
    from ebmkit.cli.tools import described

    rows = [(f"`{name}`", text) for name, text in described("objectives").items()]
    return "\n".join(_table(("objective", "what it trains"), rows))


def architecture() -> str:
    """The drawing, inline, so that it has the colours of the page."""
    return (Path(__file__).parent / "images/architecture.svg").read_text()


def strip_caption() -> str:
    """What `docs/images/strip.png` shows, from `benchmarks/results/strip.json`."""
    found = json.loads((RESULTS / "strip.json").read_text())
    model, count = found["model"], len(found["labels"])
    right = sum(a == b for a, b in zip(found["predicted"], found["labels"], strict=True))
    before, after = (sum(found[key]) / count for key in ("psnr_noisy", "psnr"))
    return (
        f"The first test image of each class, not chosen: classified ({right} of {count} right), "
        f"with noise of {255 * found['sigma']:.0f}/255 ({before:.1f} dB on average), and denoised "
        f"without the noise level ({after:.1f} dB) by the same network: `{model['objective']}`, "
        f"{model['parameters']:,} parameters, {model['steps']} steps on {model['dataset']}. "
        "`benchmarks/strip.py RUN --data-dir DIR` draws it."
    )


def photograph_caption() -> str:
    """What `docs/images/photograph.jpg` shows, from `benchmarks/results/photograph.json`."""
    found = json.loads((RESULTS / "photograph.json").read_text())
    return (
        f"A photograph with noise of {255 * found['sigma']:.0f}/255 ({found['psnr_noisy']:.1f} dB) "
        f"and denoised by `ebmkit denoise photo.png` ({found['psnr']:.1f} dB) with the pretrained "
        f"model `{found['model']}`, which estimates the noise level as "
        f"{255 * found['sigma_estimated']:.1f}/255. `benchmarks/photograph.py` draws it."
    )


def repository() -> str:
    """`REPOSITORY=URL`, from `[project.urls]`; a placeholder until the project is published."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    return f"REPOSITORY={project.get('urls', {}).get('Repository', 'https://...')}"


def component_tables() -> str:
    """The tables behind `ebmkit list`."""
    from ebmkit.cli.tools import tables

    lines: list[str] = []
    for kind, table in tables().items():
        lines += [f"### {kind}", ""]
        lines += _table(("name", "description"), [(f"`{k}`", v) for k, v in table.items()])
    return "\n".join(lines)


def config_fields() -> str:
    """Every field of a run's configuration, from the models that validate it."""
    from ebmkit.training import TrainConfig

    rows = list(_fields(TrainConfig, ""))
    return "\n".join(_table(("field", "meaning"), rows))


def _fields(model: Any, prefix: str) -> Any:
    for name, field in model.model_fields.items():
        nested = getattr(field.annotation, "model_fields", None)
        if nested:
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            default = "" if field.is_required() else f" [default: `{field.default}`]"
            yield f"`{prefix}{name}`", (field.description or "") + default


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def speed_table(kind: str) -> str:
    """Rows of `benchmarks/results/speed-cpu.json` of a ``kind``: train, inference or scaling."""
    results = json.loads((RESULTS / "speed-cpu.json").read_text())
    rows = [row for row in results["rows"] if row_kind(row["name"]) == kind]
    lines = [
        "| measurement | library | ms | images/s | MB | ratio to (a) (quartiles) | to others |",
        "|---|---|---|---|---|---|---|",
    ]
    before = None
    for row in rows:
        what, who = row["name"].rsplit(": ", 1)
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        if row["ratio_range"] and row["ratio"] != 1:
            ratio += " ({:.2f} to {:.2f})".format(*row["ratio_range"])
        others = "; ".join(
            f"{name} {found[0]:.2f}"
            for name, found in row["ratios"].items()
            if not name.startswith("plain") and who.startswith("ebmkit")
        )
        lines.append(
            f"| {what if what != before else ''} | {who} | {1e3 * row['median_s']:.1f} | "
            f"{row['images_per_s']:,.0f} | {row['peak_mb']:,.0f} | {ratio} | {others} |"
        )
        before = what
    return "\n".join([*lines, "", circumstances(results["environment"])])


def row_kind(name: str) -> str:
    """Which of the tables a row belongs to."""
    first = name.split()[0]
    return first if first in ("train", "scaling") else "inference"


def precision_table() -> str:
    """`benchmarks/results/precision.json` as a table."""
    rows = json.loads((RESULTS / "precision.json").read_text()).values()
    lines = [
        "| recipe | trained in | accuracy | PSNR 15 / 25 / 50 | evaluated in bf16 | ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain, low = (
            " / ".join(f"{v:.2f}" for v in row[key].values()) for key in ("psnr", "psnr_in_bf16")
        )
        lines.append(
            f"| {row['recipe']} | {row['name']} | {row['accuracy']:.1%} | {plain} | {low} | "
            f"{1e3 * row['step_seconds']:.0f} |"
        )
    last = list(rows)[-1]
    note = f"First {last['images']:,} test images at most, seed 0. "
    return "\n".join([*lines, "", note + circumstances(last["environment"])])


def processes_table() -> str:
    """`benchmarks/results/processes.json` as a table."""
    found = json.loads((RESULTS / "processes.json").read_text())
    names = {"same batch": "two, same batch", "double batch": "two, double batch"}
    lines = [
        "| processes, one thread each | seconds a step | efficiency |",
        "|---|---|---|",
        f"| one | {found['step_seconds']['one']:.3f} | |",
    ]
    for name, row in names.items():
        lines.append(
            f"| {row} | {found['step_seconds'][row]:.3f} | {found['efficiency'][name]:.0%} |"
        )
    return "\n".join([*lines, "", f"{found['what']}. " + circumstances(found["environment"])])


def layout_table() -> str:
    """`benchmarks/results/layout.json` as two tables."""
    found = json.loads((RESULTS / "layout.json").read_text())
    lines = [
        "| ms | contiguous | channels last | contiguous, plain mean | channels last, plain mean |",
        "|---|---|---|---|---|",
    ]
    for what in ("dsm step", "ce step", "score"):
        cells = [
            f"{1e3 * found['layout_seconds'][f'{what}, {layout}, {pooling}']:.1f}"
            for pooling in ("own mean", "PyTorch's mean")
            for layout in ("contiguous", "channels last")
        ]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    lines += ["", "| freed memory | ms of a dsm step |", "|---|---|"]
    for name, seconds in found["allocator_seconds"].items():
        lines.append(f"| {name} | {1e3 * seconds:.1f} |")
    return "\n".join([*lines, "", f"{found['what']}. " + circumstances(found["environment"])])


def mixture_table() -> str:
    """`benchmarks/results/mixture.json` as a table."""
    found = json.loads((RESULTS / "mixture.json").read_text())
    names = (
        "log p, nats (rms)", "log p, nats (max)", "p(c|y) (mean abs)", "p(c|y) (max)",
        "sigma * score (rms)", "sigma * score (max)",
    )  # fmt: skip
    lines = [f"| objective | {' | '.join(names).replace('c|y', 'c given y')} | CPU s |"]
    lines.append("|---|" + "---|" * (len(names) + 1))

    def line(label: str, errors: list[dict[str, float]], seconds: str) -> str:
        cells = []
        for name in names:
            values = [own[name] for own in errors]
            cells.append(f"{sum(values) / len(values):.3f} (to {max(values):.3f})")
        return f"| {label} | {' | '.join(cells)} | {seconds} |"

    for name, row in found["rows"].items():
        runs = row["runs"]
        seconds = f"{sum(run['cpu_seconds'] for run in runs) / len(runs):.0f}"
        before = [run["errors_before"] for run in runs if "errors_before" in run]
        levels = list(runs[0]["levels"])
        if len(levels) > 1:
            for level in levels:
                label = f"{name}, at sigma {level}"
                lines.append(line(label, [run["levels"][level] for run in runs], seconds))
        elif before:
            right = [run["errors"] for run in runs]
            lines.append(line(f"{name}, {row['remedy']}", right, seconds))
            lines.append(line(f"{name}, uncorrected", before, seconds))
        else:
            lines.append(line(name, [run["errors"] for run in runs], seconds))
    commits = {run["git_commit"] for row in found["rows"].values() for run in row["runs"]}
    environment = found["environment"] | {"git_commit": " and ".join(sorted(commits))}
    count = len(next(iter(found["rows"].values()))["runs"])
    note = f"{found['what']}; mean over {count} seeds, in brackets the worst seed. "
    return "\n".join([*lines, "", note + circumstances(environment)])


def jem_table(dataset: str) -> str:
    """`benchmarks/results/jem.json` as a table: a column for each run on ``dataset``."""
    found = json.loads((RESULTS / "jem.json").read_text()).values()
    rows = [row for row in found if row["dataset"] == dataset]

    def share(estimate: dict[str, Any]) -> str:
        return "{:.0f} ({:.0f} to {:.0f})".format(
            *(100 * estimate[key] for key in ("value", "low", "high"))
        )

    def psnr(row: dict[str, Any]) -> str:
        return " / ".join(f"{v:.2f}" for v in row["psnr"].values()) if row["psnr"] else "-"

    lines = {
        "network": [f"{row['backbone']}, {row['parameters']:,}" for row in rows],
        "steps": [f"{row['steps']:,}" for row in rows],
        "TFLOP of training": [f"{row['flops'] / 1e12:.0f}" for row in rows],
        "hours (busy cores)": [f"{row['seconds'] / 3600:.2f}" for row in rows],
        "divergences": [str(row["breaches"]) for row in rows],
        "accuracy, % (95 %)": [
            f"{100 * row['accuracy']:.1f} "
            f"({100 * row['accuracy_interval'][0]:.1f} to {100 * row['accuracy_interval'][1]:.1f})"
            for row in rows
        ],
        "ECE, %": [f"{100 * row['ece']:.1f}" for row in rows],
        "PSNR at 15 / 25 / 50, dB": [psnr(row) for row in rows],
    }
    for name in rows[0]["auroc"]:
        for score, label in JEM_SCORES.items():
            cells = [share(row["auroc"][name][score]) for row in rows]
            lines[f"AUROC, {name}, {label}, %"] = cells
    for norm, label in (("linf", "l_inf"), ("l2", "l2")):
        for i, epsilon in enumerate(rows[0]["epsilons"][norm]):
            size = f"{255 * epsilon:.3g}/255" if norm == "linf" else f"{epsilon:g}"
            cells = [share(row["robust"][norm][i]) for row in rows]
            lines[f"under PGD, {label} {size}, %"] = cells
    first = rows[0]
    commits = ", ".join(sorted({row["environment"]["git_commit"] for row in rows}))
    return "\n".join(
        [
            "| | " + " | ".join(f"`{row['name']}`" for row in rows) + " |",
            "|---|" + "---|" * len(rows),
            *(f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items()),
            "",
            f"{DATA[dataset]}, {first['images']:,} test images; AUROC on the first "
            f"{first['ood_images']:,} against as many others; attacks (PGD, 20 steps, one start) "
            f"on the first {first['attacked_images']}; PSNR on the first 1,000 at most. "
            "`benchmarks/jem.py --data-dir DIR`, seed "
            f"{first['seed']}, {first['environment']['cores']} CPU cores shared with other work, "
            f"PyTorch {first['environment']['torch']}, code at {commits}.",
        ]
    )


def restore_table() -> str:
    """`benchmarks/results/restore-*.json` as a table: PSNR of each task and method."""
    lines = [
        "| run | beta | task | restored | simple methods |",
        "|---|---|---|---:|---|",
    ]
    environment: dict[str, Any] = {}
    for name in ("digits", "cifar10", "cifar10-beta1"):
        found = json.loads((RESULTS / f"restore-{name}.json").read_text())
        environment = found["environment"]
        for row in found["rows"]:
            own = row["psnr"].pop("restored")
            simple = ", ".join(f"{who} {one['value']:.2f}" for who, one in row["psnr"].items())
            lines.append(
                f"| {found['dataset']}, {found['images']} test images | {found['beta']:g} | "
                f"{row['task']} | {own['value']:.2f} ({own['low']:.2f} to {own['high']:.2f}) | "
                f"{simple} |"
            )
    return "\n".join([*lines, "", circumstances(environment)])


DATA = {"cifar10": "CIFAR-10 (9,980 of its 10,000 test images are available)", "digits": "Digits"}
JEM_SCORES = {"log-density": "log p", "confidence": "max softmax", "gradient": "-norm of the score"}


def jem_digits() -> str:
    """`benchmarks/results/jem-digits.json` in words."""
    found = json.loads((RESULTS / "jem-digits.json").read_text())
    low, high = (100 * end for end in found["accuracy_interval"])
    seen = {
        start: "{:.0f} % ({:.0f} to {:.0f})".format(
            *(100 * one[key] for key in ("value", "low", "high"))
        )
        for start, one in found["recognised"].items()
    }
    return (
        f"**Digits** (`examples/jem_digits.py`, recipe `digits-jem`, {found['steps']} steps, seed "
        f"{found['seed']}): accuracy {100 * found['accuracy']:.1f} % (95 %: {low:.1f} to "
        f"{high:.1f}) on all {found['images']} test images, {found['breaches']} divergences, "
        f"{found['seconds'] / 60:.1f} minutes. A separately trained classifier (accuracy "
        f"{100 * found['judge_accuracy']:.1f} % on the test images) recognises the requested digit "
        f"in samples from p(x|c), chains of {found['chain_steps']} steps: {seen['noise']} of the "
        f"chains from uniform noise and {seen['gaussian']} of those from the Gaussian of their "
        f"class, {found['samples']} samples each. " + circumstances(found["environment"])
    )


def time_to_quality_tables() -> str:
    """`benchmarks/results/time-to-quality-*.json` as tables, one for each data set measured."""
    lines: list[str] = []
    for data in ("digits", "cifar10"):
        path = RESULTS / f"time-to-quality-{data}.json"
        lines += [f"**{data}**", ""]
        if not path.exists():
            lines += ["Not measured yet.", ""]
            continue
        found = json.loads(path.read_text())
        quality = "gain, dB" if data == "digits" else "PSNR, dB"
        measured = f"steps | TFLOP | seconds | accuracy | {quality}"
        lines += [f"| target: accuracy, {quality} | recipe | {measured} |"]
        lines += ["|---|---|---:|---:|---:|---:|---|"]
        recipes = {run["who"]: run["recipe"] for run in found["runs"]}
        for row in found["marks"]:
            accuracy, psnr = row["mark"]
            cells = [f"{accuracy:.1%}, {' / '.join(map(str, psnr))}", f"`{recipes[row['who']]}`"]
            if "steps" in row:
                cells += [f"{row['steps']:,.0f}", f"{row['tflop']:,.1f}", f"{row['seconds']:,.0f}"]
                cells += [f"{row['accuracy']:.1%}", " / ".join(f"{v:.2f}" for v in row["psnr"])]
            else:
                cells += [f"not reached by {row['longest_tried']:,}", "", "", "", ""]
            lines.append(f"| {' | '.join(cells)} |")
        commits = sorted({run["commit"] or "unknown" for run in found["runs"]})
        seeds = len({run["seed"] for run in found["runs"]})
        told = circumstances(found["environment"] | {"git_commit": ", ".join(commits)})
        lines += ["", f"{seeds} seed{'s' if seeds > 1 else ''}, seconds of training. {told}", ""]
    return "\n".join(lines)


def denormals_table() -> str:
    """`benchmarks/results/denormals.json` as a table."""
    found = json.loads((RESULTS / "denormals.json").read_text())
    lines = ["| denormal numbers | seconds per step, one process each | median |", "|---|---|---:|"]
    for name in ("kept", "flushed"):
        times = sorted(found["seconds_per_step"][name])
        each = ", ".join(f"{time:.3f}" for time in times)
        lines.append(f"| {name} | {each} | {times[len(times) // 2]:.3f} |")
    lines += ["", f"Recipe `{found['recipe']}` at step {found['step']:,}; ratio of medians "]
    lines[-1] += f"{found['ratio']:.2f}. {circumstances(found['environment'])}"
    return "\n".join(lines)


def blind_table() -> str:
    """`benchmarks/results/blind-digits.json` as a table."""
    found = json.loads((RESULTS / "blind-digits.json").read_text())
    rows = found["psnr"]
    lines = [f"| sigma (of 255) | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    for level in next(iter(rows.values())):
        values = (f"{row[level]:.2f}" for row in rows.values())
        lines.append(f"| {level} | {' | '.join(values)} |")
    made, measured = found["trained"], found["measured"]["git_commit"]
    lines += [
        "",
        f"Trained at {made['git_commit']} on {made['cores']} CPU cores, PyTorch {made['torch']}, "
        f"seed 0; measured at {measured} by `benchmarks/blind.py RUN`.",
    ]
    return "\n".join(lines)


def report(match: re.Match[str]) -> str:
    """The report of `docs/results/NAME.json`, as ``ebmkit reproduce`` writes it.

    NAME is that of an experiment, or begins with it: ``table1``, ``guidance-digits``.
    """
    from ebmkit.experiments import EXPERIMENTS

    name = match[1]
    (target,) = (target for target in EXPERIMENTS if target in (name, name.partition("-")[0]))
    path = Path(__file__).parent / "results" / f"{name}.json"
    return EXPERIMENTS[target].text(json.loads(path.read_text()))


def pretrained_models() -> str:
    """The pretrained models: a table, and the card of each."""
    from ebmkit.cli.models import KEY_FIGURES
    from ebmkit.pretrained import DEFAULTS, as_markdown, list_models, read_card, size_of

    cards = {name: read_card(name) for name in list_models()}
    lines = ["| name | description | MB | key figures | default of |", "|---|---|---:|---|---|"]
    for name, card in cards.items():
        figures = "; ".join(f"{figure.name}: {figure}" for figure in card.figures[:KEY_FIGURES])
        uses = ", ".join(f"`{command}`" for command, model in DEFAULTS.items() if model == name)
        size = f"{size_of(name) / 1e6:.1f}"
        lines.append(f"| [{name}](#{name}) | {card.description} | {size} | {figures} | {uses} |")
    return "\n".join(
        [*lines, "", *(as_markdown(name, card) + "\n" for name, card in cards.items())]
    )


def circumstances(environment: dict[str, Any]) -> str:
    """Hardware, versions and commit, in a sentence."""
    return (
        f"{environment['cores']} CPU cores, PyTorch {environment['torch']}, code at "
        f"{environment['git_commit']}."
    )


MARKERS = {
    "<!-- commands -->": command_reference,
    "<!-- command summary -->": command_summary,
    "<!-- objectives -->": objectives,
    "<!-- architecture -->": architecture,
    "<!-- strip -->": strip_caption,
    "<!-- photograph -->": photograph_caption,
    "<!-- repository -->": repository,
    "<!-- tables -->": component_tables,
    "<!-- fields -->": config_fields,
    "<!-- balance -->": balance_table,
    "<!-- sizes -->": sizes_table,
    "<!-- speed: train -->": partial(speed_table, "train"),
    "<!-- speed: inference -->": partial(speed_table, "inference"),
    "<!-- speed: scaling -->": partial(speed_table, "scaling"),
    "<!-- precision -->": precision_table,
    "<!-- processes -->": processes_table,
    "<!-- layout -->": layout_table,
    "<!-- denormals -->": denormals_table,
    "<!-- restore -->": restore_table,
    "<!-- time-to-quality -->": time_to_quality_tables,
    "<!-- jem digits -->": jem_digits,
    "<!-- jem: cifar10 -->": partial(jem_table, "cifar10"),
    "<!-- jem: digits -->": partial(jem_table, "digits"),
    "<!-- mixture -->": mixture_table,
    "<!-- blind -->": blind_table,
    "<!-- pretrained -->": pretrained_models,
}
