"""Help, `--version`, mistyped commands and `import ebmkit` do not import PyTorch."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
from ebmkit_tests.support.command_line import ebmkit_command

import ebmkit
from ebmkit.cli import app
from ebmkit.cli.app import COMMANDS as GROUPS
from ebmkit.cli.options import setting_keys
from ebmkit.cli.tools import Kind, tables
from ebmkit.experiments import EXPERIMENTS
from ebmkit.export import What
from ebmkit.sampling.inverse import TASKS
from ebmkit.synonyms import KEYS, SYNONYMS

HEAVY = {"torch", "torchvision", "sympy", "scipy", "sklearn", "matplotlib", "numpy", "h5py"}
COMMANDS = typer.main.get_command(app).commands

RUN_AND_PRINT_MODULES = """
import atexit, runpy, sys
atexit.register(lambda: print("MODULES", *sys.modules))
sys.argv[0] = "ebmkit"
runpy.run_module("ebmkit", run_name="__main__", alter_sys=False)
"""


def run_in_new_process(code, *arguments):
    """Exit code, output, and imported top-level modules of a new process."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    output, _, modules = done.stdout.partition("MODULES")
    assert modules, done.stderr
    return done.returncode, output + done.stderr, {name.split(".")[0] for name in modules.split()}


@pytest.mark.parametrize(
    ("arguments", "code", "message", "also_absent"),
    [
        (["--help"], 0, "Train and evaluate:", {"pydantic"}),
        (["--version"], 0, f"ebmkit {ebmkit.__version__}\n", {"pydantic"}),
        (["--hlep"], 2, "No such option: --hlep", {"pydantic"}),
        (["trian"], 2, "No such command 'trian'", set()),  # Typer itself imports pydantic
        (["train", "--help"], 0, "--objective", set()),
        pytest.param(["-h"], 0, "Use a model:", {"pydantic"}, marks=pytest.mark.slow),
        (["train", "--stpes", "3"], 2, "No such option: --stpes. Did you mean --steps?", set()),
        *(
            pytest.param(arguments, 2, message, set(), marks=pytest.mark.slow)
            for arguments, message in (
                (["train", "--learning-rate", "3"], "Did you mean --lr?"),
                (["export", "run"], "Missing option '--out'"),
            )
        ),
    ],
)
def test_help_version_and_errors_import_no_heavy_module(arguments, code, message, also_absent):
    ended, output, modules = run_in_new_process(RUN_AND_PRINT_MODULES, *arguments)
    assert ended == code, output
    assert message in output
    assert modules & (HEAVY | also_absent) == set()


def test_importing_the_package_imports_only_the_standard_library():
    _, _, modules = run_in_new_process("import sys; old = {*sys.modules}; import ebmkit; "
                          "print('MODULES', *({*sys.modules} - old))")  # fmt: skip
    assert {m for m in modules if m not in sys.stdlib_module_names} == {"ebmkit"}


def test_public_names_are_listed_importable_and_declared_for_static_tools():
    tree = ast.parse(Path(ebmkit.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    declared = {alias.name for node in block.body for alias in node.names}
    assert declared | {"__version__"} == set(ebmkit.__all__) <= set(dir(ebmkit))
    for node in block.body:
        for alias in node.names:
            assert getattr(ebmkit, alias.name) is getattr(sys.modules[node.module], alias.name)
    assert ebmkit.evaluation is sys.modules["ebmkit.evaluation"]
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = ebmkit.laod


def help_of(command, parameter):
    (found,) = (p for p in COMMANDS[command].params if p.name == parameter)
    return found.help


def test_names_in_help_and_choices_match_the_tables():
    """Options repeat the names of tables whose modules import PyTorch."""
    targets = set(re.findall(r"[a-z]+[-a-z0-9.]*[a-z0-9]", help_of("reproduce", "target")))
    assert {*EXPERIMENTS, "all"} <= targets
    assert help_of("restore", "task") == ", ".join(TASKS)
    assert help_of("list", "kind") == ", ".join(tables())
    assert get_args(Kind) == tuple(tables())
    ended = ebmkit_command("export", "run", "--out", "x", "--what", "all", cwd=".")
    assert ended.returncode == 2
    assert all(repr(what) in ended.stderr for what in get_args(What))


@pytest.mark.slow
def test_list_imports_only_the_table_asked_for():
    code = (
        "import sys; from ebmkit.cli.tools import described; print(*described('samplers'));"
        "print('evaluation', 'ebmkit.evaluation' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "langevin" in done.stdout, done.stderr
    assert "evaluation False" in done.stdout


def test_help_uses_standard_metavars():
    names = COMMANDS.keys() - {"data"}
    shown = {name: ebmkit_command(name, "--help", cwd=".").stdout for name in names}
    assert "Usage: ebmkit denoise [OPTIONS] [RUN] IMAGE...\n" in shown["denoise"]
    assert "Usage: ebmkit reproduce [OPTIONS] TARGET [ROW]...\n" in shown["reproduce"]
    for option in ("--steps INTEGER", "--out PATH", "--set KEY=VALUE", "--backbone TEXT"):
        assert f"{option} " in shown["train"]
    assert "--what [classifier|denoiser|blind-denoiser]" in shown["export"]
    for text in shown.values():
        assert "9223372036854775807" not in text
        assert not any(f"<{kind}" in text for kind in ("str", "int", "path", "list", "f"))


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal_and_breaks_no_name(columns):
    """Commands have one line each; words joined by hyphens stay whole."""

    def shown(*arguments):
        return ebmkit_command(*arguments, "-h", cwd=".", COLUMNS=str(columns)).stdout

    overview = shown()
    for group, commands in GROUPS.items():
        assert f"\n{group}:\n" in overview
        for name, function in commands.items():
            row = f"  {name.ljust(9)}  {function.__doc__.splitlines()[0]}\n"
            assert row in overview
            lines = shown(*name.split()).splitlines()
            assert max(map(len, lines)) <= columns - 2
            assert not any(re.search(r"[a-z0-9]-$", line) for line in lines), name
            assert lines[-2] == "Example:"
            assert lines[-1].startswith(f"  ebmkit {name} ")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "--weight-decay", "0.1"], "Write --set optimizer.weight_decay=0.1\n"),
        (["train", "--optimizer=sgd"], "Write --set optimizer.kind=sgd\n"),
        (["train", "--max_grad_norm", "1"], "Write --set optimizer.clip_norm=1\n"),
        (["cost", "--label-smoothing", "0.1"], "Write --set objective.ce.label_smoothing=0.1\n"),
        (["train", "--cutout"], "Write --set streams.classify.augmentation.cutout=VALUE or --set "),
        (["train", "--num_workers", "2"], "Did you mean --workers?"),
        (["train", "-b", "64"], "Did you mean --batch-size?"),
        (["sample", "run", "--step-size", "1e-4"], "Write --set step_size=1e-4\n"),
        (["denoise", "run", "x.png", "--noise-level", "25"], "Did you mean --sigma?"),
        (["evaluate", "run", "--aggressive"], "No such option: --aggressive"),
    ],
)
def test_unknown_option_suggests_the_right_one_or_the_setting(arguments, hint):
    ended = ebmkit_command(*arguments, cwd=".")
    assert ended.returncode == 2
    assert hint in ended.stderr


def test_suggested_options_and_settings_exist():
    options = {o for c in COMMANDS.values() for p in c.params for o in (*p.opts, *p.secondary_opts)}
    assert {f"--{name}" for name in SYNONYMS} <= options
    assert set(KEYS.values()) <= set(setting_keys("train"))


def test_shell_completion_lists_commands_and_options():
    def completed(words):
        environment = {"_EBMKIT_COMPLETE": "complete_bash", "COMP_WORDS": words}
        ended = ebmkit_command(cwd=".", **environment, COMP_CWORD=str(len(words.split(" ")) - 1))
        return ended.stdout.split()

    assert completed("ebmkit cl") == ["classify"]
    assert "--epochs" in completed("ebmkit train --ep")
