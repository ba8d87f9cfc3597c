"""Axes say what is there, legends cover nothing, and a figure is the same two files for the same numbers."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.common import figures
from pipelines.configuration import methods
from pipelines.configuration.config import Config
from pipelines.experiment import setup
from pipelines.federation import portrait
from pipelines.results import report
from pipelines.results.history import evaluated_rounds
from pipelines.results.subject import Subject
from pipelines.studies import continual, zeroth_order
from pipelines.studies.zeroth_order_config import Synthetic


def labels_of(axis) -> list[tuple[float, str]]:
    low, high = sorted(axis.get_view_interval())
    places = axis.get_majorticklocs()
    labels = axis.get_major_formatter().format_ticks(places)
    return [(place, label) for place, label in zip(places, labels, strict=True) if low <= place <= high]


def legends_cover_nothing(figure: Figure) -> bool:
    """Whether no legend lies on the area of any axes, where lines and bars are, nor on the text around them."""
    FigureCanvasAgg(figure).draw()
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    assert legends
    boxes = [legend.get_window_extent() for legend in legends]
    for axis in figure.axes:
        others = [axis.patch, axis.xaxis.label, axis.yaxis.label, *axis.get_xticklabels(), axis.title, axis._left_title]
        # A pixel of touch is the rounding of the layout.
        areas = [other.get_window_extent().padded(-1) for other in others if other is axis.patch or other.get_text()]
        if any(box.overlaps(area) for box in boxes for area in areas):
            return False
    size = figure.bbox
    return all(box.x0 >= -1 and box.y0 >= -1 and box.x1 <= size.x1 + 1 and box.y1 <= size.y1 + 1 for box in boxes)


@pytest.mark.parametrize(
    ("low", "high"), [(0.71, 0.905), (0, 1), (0.95, 0.99), (0.9995, 1), (0.003, 0.0062), (0.4, 0.4 + 1e-5)]
)
def test_percent_axes_label_what_is_there(low, high):
    """Limits whose ticks matplotlib puts at 77.5 and 82.5, at whole numbers, and at very fine steps."""
    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], [low, high])
    axis.yaxis.set_major_formatter(figures.Percent())
    FigureCanvasAgg(figure).draw()
    shown = labels_of(axis.yaxis)
    assert len(shown) >= 3
    for place, label in shown:
        assert float(label.removesuffix(" %").replace("\N{MINUS SIGN}", "-")) == pytest.approx(100 * place, abs=1e-8)
    assert len({label for _, label in shown}) == len(shown)


def test_percent_labels_have_no_more_decimals_than_they_need():
    percent = figures.Percent()
    percent.set_locs([0.7, 0.8, 0.9])
    assert percent(0.7) == "70 %"
    percent.set_locs([0.775, 0.825])
    assert [percent(0.775), percent(0.825)] == ["77.5 %", "82.5 %"]
    percent.set_locs([-1e-17, 0.1])
    assert percent(-1e-17) == "0 %"


def fake_histories(names, rng, seeds=2, evaluations=4, clients=6):
    return {
        name: {
            "test/accuracy": rng.uniform(0.7, 0.9, (seeds, evaluations)),
            "round/loss": rng.uniform(0.1, 1, (seeds, evaluations)),
            "round/participants": np.full((seeds, evaluations), 3),
            "client/accuracy": rng.uniform(0.71, 0.9, (seeds, clients)),
        }
        for name in names
    }


@pytest.fixture(scope="module")
def subject():
    config = Config(
        dataset="iris", clients=6, cohort_size=3, min_size=2, model="logistic_regression", seeds=2, rounds=4
    )
    title = f"{portrait.title(config, setup.federate(config))}, logistic_regression"
    return Subject(config, title, [], dict.fromkeys(methods.names(), "global"), [], {}, False, "")


@pytest.mark.parametrize("number", [1, 3, 8])
def test_the_figures_of_a_run(subject, number):
    names = ["fedavg", "scaffold_m_vr", *methods.names()][:number]
    histories = fake_histories(names, np.random.default_rng(0))
    with figures.style():
        curves = report.curves(subject, histories, evaluated_rounds(4, 1))
        clients = report.client_histogram(subject, histories)
        assert legends_cover_nothing(curves)
        assert legends_cover_nothing(clients)
    lines = [line for line in curves.axes[0].lines if not line.get_label().startswith("target")]
    assert [line.get_label() for line in lines] == [methods.paper_name(name) for name in histories]
    looks = {(line.get_color(), str(line.get_linestyle()), str(line._unscaled_dash_pattern)) for line in lines}
    assert len(looks) == len(lines)
    for axis in (curves.axes[0].yaxis, *(axis.xaxis for axis in clients.axes)):
        for place, label in labels_of(axis):
            assert float(label.removesuffix(" %")) == pytest.approx(100 * place)


def test_all_methods_can_be_told_apart():
    looks = [figures.look(i) for i in range(len(methods.names()))]
    assert len({str(look) for look in looks}) == len(looks)


def test_methods_are_named_as_papers_name_them():
    shown = {name: methods.paper_name(name) for name in methods.names()}
    assert shown["fedavg"] == "FedAvg"
    assert shown["fedavg_m"] == "FedAvg-M"
    assert shown["scaffold_m_vr"] == "SCAFFOLD-M-VR"
    assert shown["fzoos"] == "FZooS"
    assert shown["local_sgd"] == "Local SGD"
    assert len(set(shown.values())) == len(shown)
    for name, paper in shown.items():
        assert paper != name, f"the card of {name} must begin with `Name: what it is`"
    for title, (factory, options) in zeroth_order.METHODS.items():
        assert title == " ".join([shown[factory], *options.values()])


def test_the_figure_of_a_zeroth_order_study():
    rng = np.random.default_rng(0)
    results = {
        name: {"value": rng.uniform(1, 2, (2, 4)), "queries": np.tile(np.arange(4.0), (2, 1))}
        for name in zeroth_order.METHODS
    }
    results["FZooS"] |= {"cosine": rng.uniform(0, 1, (2, 3)), "error": rng.uniform(1.2, 1.5, (2, 3))}
    with figures.style():
        figure = zeroth_order.figure(Synthetic(seeds=2), results, 0.0)
        assert legends_cover_nothing(figure)


def test_the_heat_maps_of_continual_runs():
    scores = [continual.Scores(np.full((2, 2), value), np.full(2, 0.1), 1.0) for value in (0.765, 0.785)]
    with figures.style():
        figure = continual.heat_map({"ewc": scores, "joint": scores})
    assert [axis.get_title() for axis in figure.axes[:2]] == ["EWC", "Joint"]
    table = continual.results_tex({"ewc": scores, "joint": scores})
    assert r"EWC & 77.50 $\pm$ 1.41 \% & 0.00 $\pm$ 0.00 \%" in table


def test_files_are_the_same_for_the_same_numbers(tmp_path):
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        with figures.style():
            figure = Figure(figsize=(3, 2), layout="constrained")
            axis = figure.subplots()
            axis.plot([0, 1], [0, 1], label="a line")
            figures.legend_below(figure, axis)
            figures.title(figure, "a title")
            figures.write(folder / "lines.png", figure)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"lines.png", "lines.pdf"}
    assert written[0]["lines.pdf"].startswith(b"%PDF")
    assert b"Date" not in written[0]["lines.pdf"]
