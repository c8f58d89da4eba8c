"""Reports: the numbers of the JSON files, escaping, comparison, and what is incomplete."""

import json
import re
from html.parser import HTMLParser

import pytest
from ebmkit_tests.support.sampling_runs import save_run
from typer.testing import CliRunner

from ebmkit.cli import app
from ebmkit.errors import UserError
from ebmkit.report import read_run, render_report, write_report
from ebmkit.report.figures import POINTS, Line, Panel
from ebmkit.report.render import refresh_report
from ebmkit.report.runs import recipe_changes
from ebmkit.storage import DamagedFile
from ebmkit.training import RunFolder, resolve
from ebmkit.training.config import RECIPES

EXTERNAL = r"""(?:src|href|url|@import|fetch|action)\s*[=(]\s*["']?(?!data:|\#)\w"""


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Plots take a second: they are drawn only where a test asks for ``plots``."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("ebmkit.report.render._figures", lambda panels: [])


@pytest.fixture
def plots():
    pass


def text_of(page):
    """The text of a page without tags, styles and scripts."""
    parts = []

    class Reader(HTMLParser):
        inside = ""

        def handle_starttag(self, tag, attrs):
            if tag in ("style", "script"):
                self.inside = tag

        def handle_endtag(self, tag):
            self.inside = "" if tag == self.inside else self.inside

        def handle_data(self, data):
            if not self.inside:
                parts.append(data)

    Reader().feed(page)
    return re.sub(r"\s+", " ", " ".join(parts))


def test_a_report_has_the_numbers_of_the_json_files(make_run, documents):
    text = text_of(render_report([read_run(make_run())]))
    clean = documents["classify.json"]["against_noise"][0]["accuracy"]
    assert f"Accuracy {clean['value']:.2%} {clean['low']:.2%} to {clean['high']:.2%}" in text
    psnr = documents["denoise.json"]["denoisers"]["unconditional"]["psnr"]["25"]
    assert (
        f"PSNR at 25/255 (dB) {psnr['value']:.2f} {psnr['low']:.2f} to {psnr['high']:.2f}" in text
    )
    ece = documents["calibration.json"]["levels"][0]["ece"]
    assert f"ECE {ece['value']:.2%} {ece['low']:.2%} to {ece['high']:.2%}" in text
    assert "40 images; weights last, seed 0" in text
    assert "Training time 4 s 40 steps of 0.1 s (median)" in text
    assert "Training cost 40 GFLOP" in text  # 40 steps of 1 GFLOP


def test_a_report_refers_to_nothing_outside(make_run, plots):
    page = render_report([read_run(make_run())])
    assert not re.search(EXTERNAL, page.replace('href="#', ""))
    assert re.search(EXTERNAL, page + '<img src="x.png">')
    names = set(re.findall(r"https?://[\w./]+", page))
    assert names <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # XML namespaces


def test_names_and_warnings_are_escaped(make_run):
    path = make_run("<script>alert(1)<script>")
    file = path / "evaluation" / "classify.json"
    document = json.loads(file.read_text())
    document["warnings"] = ["<img src=x onerror=alert(2)>", "turned \u202e around"]
    document["per_class"] = dict(
        zip(("'\"><b>", "b", "c"), document["per_class"].values(), strict=True)
    )
    file.write_text(json.dumps(document))
    for runs in ([path], [path, make_run("other")]):
        page = render_report([read_run(run) for run in runs])
        assert "<script>alert" not in page
        assert "<img src=x" not in page
        assert "\u202e" not in page
        assert "&lt;script&gt;alert(1)&lt;script&gt;" in page
        assert "&lt;img src=x onerror=alert(2)&gt;" in page
        assert page.count("<script>") == 1


@pytest.mark.parametrize("name", RECIPES)
def test_the_configuration_of_a_recipe_does_not_differ_from_it(name):
    config = resolve(recipe=name)
    assert recipe_changes(config, {"command": ["ebmkit", "train", "--recipe", name]}) == (name, [])


def test_changed_settings_are_listed_with_both_values(make_run):
    run = read_run(make_run(optimizer={"lr": 0.003}))
    assert run.recipe == "digits"
    assert run.changes == [("optimizer.lr", 0.01, 0.003), ("steps", 360, 40)]
    assert "2 settings differ from recipe digits" in text_of(render_report([run]))


def test_runs_are_compared_by_number_and_data(make_run, documents):
    first, second = make_run("first"), make_run("second", backbone="gradresnet10")
    file = second / "evaluation" / "denoise.json"
    file.write_text(json.dumps(documents["denoise.json"] | {"images": 20}))
    page = render_report([read_run(first), read_run(second)])
    text = text_of(page)
    accuracy = f"{documents['classify.json']['accuracy']:.2%}"
    assert re.search(rf"Accuracy [\w ,]*40 images {accuracy} \S+ to \S+ {accuracy}", text)
    row = r"PSNR at 25/255 \(dB\) [\w ,]*"
    assert re.search(rf"{row}40 images \d\S+ \S+ to \S+ -", text)
    assert re.search(rf"{row}20 of 40 images - \d", text)
    assert "backbone gradresnet18 gradresnet10" in text


def test_runs_of_different_kinds_have_dashes(make_run):
    bare = make_run("bare", evaluated=False)
    text = text_of(render_report([read_run(make_run("whole")), read_run(bare)]))
    assert re.search(r"Accuracy [^-]*% -", text)
    assert "bare The model is not evaluated yet" in text


def test_equal_names_are_distinguished(make_run, tmp_path):
    runs = [read_run(make_run(f"{group}/run", evaluated=False)) for group in ("a", "b")]
    assert "run-2" in text_of(render_report(runs))


def test_an_unfinished_run_says_so(make_run):
    path = make_run(steps=20, evaluated=False)
    text = text_of(render_report([read_run(path)]))
    assert "The run is unfinished: 20 of 40 steps are done" in text
    holder = {"host": "elsewhere", "process": 7, "what": "training", "since": "today"}
    (path / ".holder.json").write_text(json.dumps(holder))
    text = text_of(render_report([read_run(path)]))
    assert "The run is being written: 20 of 40 steps are done. process 7 on 'elsewhere'" in text


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    run = RunFolder.create(tmp_path / "run", resolve({}))
    assert "0 of 360 steps are done" in text_of(render_report([read_run(run.path)]))


def test_an_imported_model_has_a_report(tmp_path):
    text = text_of(render_report([read_run(save_run(tmp_path / "imported"))]))
    assert "An imported model for digits." in text


def test_damaged_results_are_left_out_and_named(make_run, documents):
    path = make_run()
    (path / "evaluation" / "denoise.json").write_text('{"suite": "denoise"')
    page = text_of(render_report([read_run(path)]))
    assert "evaluation/denoise.json is left out: it is not JSON" in page
    assert f"Accuracy {documents['classify.json']['accuracy']:.2%}" in page
    metrics = path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().replace(b"0.01", b"0.02", 1))
    assert "metrics.jsonl is left out" in text_of(render_report([read_run(path)]))
    config = path / "config.yaml"
    config.write_bytes(config.read_bytes()[:-20])
    with pytest.raises(DamagedFile, match=r"config\.yaml.* is damaged"):
        read_run(path)


@pytest.mark.parametrize("field", ["against_noise", "per_class", "images"])
def test_results_of_another_version_are_shown_without_a_table(make_run, documents, field):
    path = make_run()
    document = {k: v for k, v in documents["classify.json"].items() if k != field}
    (path / "evaluation" / "classify.json").write_text(json.dumps(document))
    assert "another version or incomplete" in text_of(render_report([read_run(path)]))


def test_only_a_report_is_replaced(make_run, tmp_path):
    path = make_run(evaluated=False)
    out = write_report([path])
    assert out == path / "report.html"
    assert write_report([path]) == out
    own = tmp_path / "notes.html"
    own.write_text("<html>my notes</html>")
    with pytest.raises(UserError, match=r"notes\.html' exists and is no report"):
        write_report([path], own)
    assert own.read_text() == "<html>my notes</html>"
    with pytest.raises(UserError, match="there is no folder"):
        write_report([path], tmp_path / "absent" / "report.html")


def test_a_failing_report_is_a_warning(make_run):
    path = make_run(evaluated=False)
    (path / "report.html").write_text("my page")
    with pytest.warns(UserWarning, match=r"report\.html is not written: .* is no report"):
        refresh_report(path)


def test_the_command_names_the_file_or_the_mistake(make_run, tmp_path):
    path, out = make_run(evaluated=False), tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "page.html" in result.output
    assert out.read_text().startswith("<!doctype html>")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "none")])
    assert isinstance(result.exception, UserError)
    assert "there is no run folder" in str(result.exception)


def test_long_curves_are_thinned_and_keep_their_ends():
    x = list(range(10_000))
    svg, data = Panel("title", "step", [Line("a", x, x)]).figure()
    assert len(data["lines"][0]["x"]) <= POINTS + 1
    assert data["lines"][0]["x"][0] == 0
    assert data["lines"][0]["x"][-1] == 9999
    assert len(svg) < 20_000


def test_colours_of_a_plot_are_those_of_the_page():
    svg, _ = Panel("a < b", "step", [Line("x", [0, 1], [1, 2])]).figure()
    assert "var(--c0)" in svg
    assert "var(--ink)" in svg or "var(--muted)" in svg
    assert not re.search("#[0-9a-f]{6}", svg)
    assert 'aria-label="a &lt; b"' in svg
