"""Pictures hold what they are said to show."""

import sys

import numpy as np
import pytest
import torch

from convnn_geo import extras
from convnn_geo.extras import MissingExtraError
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.viz import (
    COLORS,
    draw_clouds,
    draw_neighbors,
    mean_deviation,
    plot_spectrum,
)


def hood(*index, sources=24, mask=None):
    return Neighborhood(torch.tensor(index), sources, mask=mask)


def drawn(axis):
    """Neighbours on a panel as (row, column), one list a pixel."""
    return [
        sorted((int(y), int(x)) for x, y in points.get_offsets()) for points in axis.collections
    ]


def test_neighbors_stand_where_their_index_says():
    image = torch.rand(3, 4, 6)
    hoods = [hood([0, 7], [23, 5]), hood([1, 2], [3, 4])]
    figure = draw_neighbors(image, [(0, 0), (3, 5)], hoods, ["one", "two"])
    photo, first, second = figure.axes
    assert drawn(photo) == []
    assert drawn(first) == [[(0, 0), (1, 1)], [(0, 5), (3, 5)]]
    assert drawn(second) == [[(0, 1), (0, 2)], [(0, 3), (0, 4)]]
    assert [axis.get_title() for axis in figure.axes] == ["photograph", "one", "two"]
    stars = [tuple(line.get_xydata()[0]) for line in second.get_lines()]
    assert stars == [(0, 0), (5, 3)]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["pixel (0, 0) and its 2 neighbours", "pixel (3, 5) and its 2 neighbours"]


def test_photograph_is_colourful_and_panels_are_grey():
    image = torch.rand(3, 4, 6)
    photo, panel = draw_neighbors(image, [(0, 0)], [hood([1])], ["one"]).axes
    shown = photo.get_images()[0].get_array()
    assert np.allclose(shown, image.permute(1, 2, 0).numpy(), atol=0.01)
    grey = panel.get_images()[0].get_array()
    assert np.allclose(grey[..., 0], grey[..., 1]) and grey.min() >= 0.44


def test_empty_slots_are_not_drawn():
    masked = hood([3, 0], mask=torch.tensor([[True, False]]))
    figure = draw_neighbors(torch.rand(1, 4, 6), [(0, 0)], [masked], ["one"])
    assert drawn(figure.axes[1]) == [[(0, 3)]]


def test_backdrop_covers_the_same_pixels():
    figure = draw_neighbors(
        torch.rand(3, 4, 6), [(1, 2)], [hood([3])], ["one"], backdrop=torch.rand(3, 40, 60)
    )
    image = figure.axes[0].get_images()[0]
    assert image.get_extent() == [-0.5, 5.5, 3.5, -0.5]
    assert image.get_array().shape == (40, 60, 3)


def test_picture_is_written(tmp_path):
    from PIL import Image

    figure = draw_neighbors(torch.rand(3, 4, 6), [(0, 0)], [hood([1])] * 5, list("abcde"))
    figure.savefig(tmp_path / "neighbors.png")
    with Image.open(tmp_path / "neighbors.png") as picture:
        assert picture.size == (1320, int(110 * ((4.0 * 4 / 6 + 0.4) * 2 + 0.5)))
        colors = {
            "#{:02X}{:02X}{:02X}".format(*color)
            for _, color in picture.convert("RGB").getcolors(10**6)
        }
    assert COLORS[0] in colors


@pytest.mark.parametrize("panels", range(10))
def test_no_cell_stays_empty(panels):
    figure = draw_neighbors(
        torch.rand(3, 4, 6), [(0, 0)], [hood([1])] * panels, ["a panel"] * panels
    )
    assert len(figure.axes) == 1 + panels
    rows, columns = figure.axes[0].get_gridspec().get_geometry()
    taken = set()
    for axis in figure.axes:
        place = axis.get_subplotspec()
        cells = {(r, c) for r in place.rowspan for c in place.colspan}
        assert not taken & cells
        taken |= cells
    assert len(taken) == rows * columns and rows <= columns <= 5


@pytest.mark.parametrize(("panels", "pixels"), [(1, 1), (3, 3), (5, 7), (6, 2)])
def test_legend_lies_within_the_picture(panels, pixels):
    image = torch.rand(3, 4, 100)
    places = [(3, 99 - number) for number in range(pixels)]
    many = hood(*[list(range(120))] * pixels, sources=400)
    figure = draw_neighbors(image, places, [many] * panels, ["a panel"] * panels)
    figure.draw_without_rendering()
    drawn, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert drawn.x0 >= whole.x0 and drawn.x1 <= whole.x1
    assert drawn.y0 >= whole.y0 and drawn.y1 <= min(a.bbox.y0 for a in figure.axes)


@pytest.mark.parametrize("panels", [1, 3, 4, 5, 6])
@pytest.mark.parametrize(("height", "width"), [(10, 10), (4, 30), (30, 10)])
def test_nothing_of_photographs_is_cropped(panels, height, width):
    one = hood([1], sources=height * width)
    figure = draw_neighbors(
        torch.rand(3, height, width), [(0, 0)], [one] * panels, ["λ = 0 (position)"] * panels
    )
    figure.draw_without_rendering()
    box, whole = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole[0] and box.y1 <= whole[1]


def test_neighbours_cover_their_pixels_in_tall_photographs():
    from matplotlib.transforms import Bbox

    def side(height, width):
        image = torch.rand(3, height, width)
        figure = draw_neighbors(image, [(0, 0)], [hood([1], sources=height * width)], ["a panel"])
        figure.draw_without_rendering()
        axis = figure.axes[1]
        pixel = Bbox(axis.transData.transform([(0, 0), (1, 1)])).width
        return axis.collections[0].get_sizes()[0] ** 0.5 * figure.dpi / 72 / pixel

    assert side(40, 10) == pytest.approx(side(10, 10), rel=0.1)
    assert side(40, 10) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.rand(4, 6)}, "image: expected 3 dimensions"),
        ({"image": torch.rand(2, 4, 6)}, "1 or 3 channels"),
        ({"pixels": [(4, 0)]}, r"\(4, 0\) is outside the image of 4 rows and 6 columns"),
        ({"pixels": [(0, 0), (0, 1)]}, r"expected index \(2, k\)"),
        ({"neighborhoods": [hood([1], sources=25)]}, "24 pixels as sources, got 25"),
        ({"titles": []}, "a title a panel"),
    ],
)
def test_wrong_input_is_refused(change, message):
    right = {
        "image": torch.rand(3, 4, 6),
        "pixels": [(0, 0)],
        "neighborhoods": [hood([1])],
        "titles": ["one"],
    }
    with pytest.raises(ValueError, match=message):
        draw_neighbors(**{**right, **change})


def test_spectrum_shows_means_and_every_run():
    figure = plot_spectrum([0, 0.5, 1], [[0.9, 0.8], [0.7, 0.7], [0.6, 0.5]], {"plain": [0.4, 0.5]})
    axis = figure.axes[0]
    line = next(line for line in axis.get_lines() if len(line.get_xdata()) == 3)
    assert np.allclose(line.get_xydata(), [[0, 85], [0.5, 70], [1, 55]])
    dots = next(c for c in axis.collections if len(c.get_offsets()) == 6)
    assert np.allclose(dots.get_offsets()[:, 1], [90, 80, 70, 70, 60, 50])
    flat = next(line for line in axis.get_lines() if len(line.get_xdata()) == 2)
    assert np.allclose(flat.get_ydata(), 45)


def test_legend_names_bands_where_there_are_deviations():
    def legend(*runs):
        figure = plot_spectrum([0, 1], [runs, runs], {"plain": runs})
        return [text.get_text() for text in figure.legends[0].get_texts()]

    assert legend(0.9, 0.8) == [
        "ConvNN: mean ± standard deviation",
        "ConvNN: each run",
        "plain: mean ± standard deviation",
    ]
    assert legend(0.9) == ["ConvNN: a single run", "ConvNN: each run", "plain: a single run"]


@pytest.mark.parametrize(("lam", "runs"), [([], []), ([0], []), ([0, 1], [[0.5], []])])
def test_spectrum_refuses_missing_runs(lam, runs):
    with pytest.raises(ValueError, match="expected runs"):
        plot_spectrum(lam, runs)


def test_mean_and_sample_deviation():
    assert mean_deviation([2.0]) == (2.0, 0.0)
    mean, deviation = mean_deviation([0.1, 0.4, 0.7])
    assert (mean, deviation) == pytest.approx((0.4, 0.3))
    with pytest.raises(ValueError, match="at least one"):
        mean_deviation([])


def test_clouds_share_axes_and_one_scale_of_heights(tmp_path):
    low = torch.tensor([[0.0, 1.0, 0.5], [2.0, 3.0, 1.0]])
    high = torch.tensor([[1.0, 4.0, 2.5]])
    figure = draw_clouds([low, high], ["a", "b"], ("row", "column", "ink"))
    first, second, scale = figure.axes
    assert [first.get_title(), second.get_title()] == ["a", "b"]
    assert [first.get_ylabel(), second.get_xlabel(), scale.get_ylabel()] == ["row", "column", "ink"]
    points = first.collections[0]
    assert points.get_offsets().tolist() == [[1, 0], [3, 2]]  # columns across, rows
    assert points.get_clim() == second.collections[0].get_clim() == (0.5, 2.5)
    assert second.collections[0].get_sizes()[0] > points.get_sizes()[1] > points.get_sizes()[0]
    assert first.get_ylim() == second.get_ylim() and first.get_ylim()[0] > first.get_ylim()[1]
    figure.savefig(tmp_path / "clouds.png")
    assert (tmp_path / "clouds.png").stat().st_size > 1000


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize(
    "size", [(8.0, 8.0, 4.0), (8.0, 6.0, 4.0), (2.0, 9.0, 1.0), (9.0, 2.0, 1.0)]
)
def test_nothing_of_clouds_is_cropped(count, size):
    cloud = torch.rand(50, 3) * torch.tensor(size)
    figure = draw_clouds([cloud] * count, ["a digit"] * count)
    figure.draw_without_rendering()
    box, whole = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole[0] and box.y1 <= whole[1]


@pytest.mark.parametrize(
    ("clouds", "titles", "labels", "message"),
    [
        ([torch.rand(9, 3)] * 2, ["a"], ("r", "c", "h"), "title a cloud"),
        ([], [], ("r", "c", "h"), "title a cloud"),
        ([torch.rand(4, 2)], ["a"], ("r", "c", "h"), r"expected \(n, 3\)"),
        ([torch.rand(0, 3)], ["a"], ("r", "c", "h"), "at least one point"),
        ([torch.rand(4, 3)], ["a"], ("r", "c"), "labels: expected one an axis"),
    ],
)
def test_clouds_refuse_wrong_input(clouds, titles, labels, message):
    with pytest.raises(ValueError, match=message):
        draw_clouds(clouds, titles, labels)


def test_nothing_is_kept_in_pyplot():
    plot_spectrum([0, 1], [[0.5], [0.5]])
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_missing_matplotlib_is_named(monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError(name="matplotlib")

    monkeypatch.setattr(extras.importlib, "import_module", import_module)
    with pytest.raises(MissingExtraError, match=r"pip install 'convnn-geo\[viz\]'"):
        plot_spectrum([0, 1], [[0.5], [0.5]])
