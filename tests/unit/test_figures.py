"""What is believed of an engine after some loads."""

import pytest

from xandrouting.core import figures as module
from xandrouting.core.figures import FigureKey, Figures
from xandrouting.core.model import Figure, LoadOptions

SMALL = LoadOptions(n_ctx=2048, n_parallel=1)
LARGE = LoadOptions(n_ctx=8192, n_parallel=1)
KEY = FigureKey("qwen@7", "cuda:0", 1, SMALL)


def figure(host: int, device: int = 0, load_s: float = 1.0) -> Figure:
    return Figure(host, device, load_s)


def test_the_first_load_is_believed_as_it_is() -> None:
    figures = Figures()
    assert figures.find(*KEY) is None
    assert figures.load_s("qwen@7", "cuda:0") is None
    assert figures.note(*KEY, figure(100, 200, 3.0)) == figure(100, 200, 3.0)
    assert figures.find(*KEY) == figure(100, 200, 3.0)


@pytest.mark.parametrize(
    "other",
    [
        KEY._replace(learned_as="qwen@8"),
        KEY._replace(device="cpu"),
        KEY._replace(placement_cards=2),
        KEY._replace(options=LARGE),
    ],
)
def test_only_the_same_load_tells(other: FigureKey) -> None:
    figures = Figures()
    figures.note(*KEY, figure(100))
    assert figures.find(*other) is None


def test_more_bytes_count_at_once_and_fewer_slowly() -> None:
    figures = Figures()
    figures.note(*KEY, figure(1000, 500))
    assert figures.note(*KEY, figure(2000, 400)) == figure(2000, 450)
    assert figures.note(*KEY, figure(10, 449)) == figure(1800, 449)
    for _ in range(60):
        figures.note(*KEY, figure(1010, 449))
    assert figures.find(*KEY) == figure(1010, 449)


def test_load_seconds_are_a_mean_that_follows() -> None:
    figures = Figures()
    figures.note(*KEY, figure(1, load_s=10.0))
    assert figures.note(*KEY, figure(1, load_s=20.0)).load_s == pytest.approx(13.0)
    assert figures.note(*KEY, figure(1, load_s=3.0)).load_s == pytest.approx(10.0)


def test_the_last_load_of_a_file_tells_for_options_never_loaded() -> None:
    figures = Figures()
    figures.note(*KEY, figure(1, load_s=10.0))
    figures.note(*KEY._replace(options=LARGE), figure(1, load_s=20.0))
    figures.note(*KEY._replace(device="cpu"), figure(1, load_s=30.0))
    assert figures.load_s("qwen@7", "cuda:0") == 20.0
    assert figures.load_s("qwen@7", "cpu") == 30.0
    assert figures.load_s("qwen@8", "cpu") is None


def test_growth_raises_bytes_only() -> None:
    figures = Figures()
    figures.note(*KEY, figure(1000, 0, 5.0))
    assert figures.grow(*KEY, host_bytes=1011, device_bytes=0)
    assert figures.find(*KEY) == figure(1011, 0, 5.0)
    assert figures.grow(*KEY, host_bytes=1, device_bytes=7)
    assert figures.find(*KEY) == figure(1011, 7, 5.0)
    assert not figures.grow(*KEY, host_bytes=900, device_bytes=7)
    assert figures.find(*KEY) == figure(1011, 7, 5.0)


def test_small_steps_of_growth_add_up() -> None:
    figures = Figures()
    figures.note(*KEY, figure(1000))
    grew = [figures.grow(*KEY, host_bytes=1000 + 4 * n, device_bytes=0) for n in range(1, 7)]
    assert grew == [False, False, True, False, False, True]
    assert figures.find(*KEY) == figure(1024)


def test_growth_of_a_load_never_noted_is_nothing() -> None:
    figures = Figures()
    assert not figures.grow(*KEY, host_bytes=5, device_bytes=5)
    assert figures.items() == []


def test_nothing_is_kept_without_a_name() -> None:
    figures = Figures()
    unnamed = KEY._replace(learned_as="")
    assert figures.note(*unnamed, figure(1)) == figure(1)
    assert not figures.grow(*unnamed, host_bytes=5, device_bytes=5)
    assert figures.find(*unnamed) is None
    assert figures.load_s("", "cuda:0") is None
    assert figures.items() == []


def test_the_one_unused_for_longest_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FIGURES", 3)
    figures = Figures()
    a, b, c, d, e = (KEY._replace(learned_as=name) for name in "abcde")
    for key in (a, b, c):
        figures.note(*key, figure(1))
    figures.find(*a)
    figures.note(*d, figure(1))
    assert [key for key, _ in figures.items()] == [c, a, d]
    figures.grow(*c, host_bytes=2, device_bytes=0)
    figures.note(*e, figure(1))
    assert [key for key, _ in figures.items()] == [d, c, e]
    assert [figures.load_s(name, "cuda:0") for name in "abcde"] == [None, None, 1.0, 1.0, 1.0]


def test_items_make_the_same_figures_again() -> None:
    figures = Figures()
    figures.note(*KEY, figure(1, 2, 3.0))
    figures.note(*KEY._replace(options=LARGE), figure(4, 5, 6.0))
    again = Figures(figures.items())
    assert again.items() == figures.items()
    assert again.load_s("qwen@7", "cuda:0") == 6.0
