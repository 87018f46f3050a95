"""Small SVG charts for the page: interval bars, radars, lines from before to after, curves and a scatter plot.

Colours are CSS classes (c0, c1, ... and the ink of the page), so charts follow the light and the dark theme; no style
attribute is used, because the page's content-security policy allows none. All text goes through markupsafe.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from markupsafe import Markup, escape

COLOURS = 7  # classes c0..c6 in report.css: the Okabe-Ito palette
SHAPES = ("circle", "square", "triangle", "diamond")


class Estimate(NamedTuple):
    """A figure and its interval; low and high are None where none was computed."""

    value: float
    low: float | None
    high: float | None


class Series(NamedTuple):
    """One closed line of a radar: values in [0, 1] by axis (None: not measured, the line skips it)."""

    label: str
    values: Sequence[float | None]
    colour: str
    dashed: bool = False
    attributes: Mapping[str, str] = MappingProxyType({})


class Point(NamedTuple):
    """One point of the scatter plot, with intervals along both axes."""

    label: str
    x: Estimate
    y: Estimate
    colour: str
    shape: str
    attributes: dict[str, str]


class Line(NamedTuple):
    """One line of the before/after chart."""

    label: str
    before: Estimate | None
    after: Estimate | None
    attributes: dict[str, str]


def element(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """An SVG element; `class_` and `data_profile` become `class` and `data-profile`, None leaves an attribute out."""
    pairs = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    head = "".join(f' {key}="{escape(_text(value))}"' for key, value in pairs.items())
    body = "".join(escape(child) for child in children)
    return Markup(f"<{name}{head}>{body}</{name}>")  # every value is escaped; a page has 100,000 of them


def interval_bar(figure: Estimate, domain: tuple[float, float]) -> Markup:
    """A bar from zero (or the domain's lower end) to the value, with the interval as a whisker over it."""
    low, high = domain

    def x(value: float) -> float:
        return 100 * (min(max(value, low), high) - low) / (high - low)

    zero, end = x(0.0), x(figure.value)
    parts = [element("rect", x=min(zero, end), y=3, width=max(abs(end - zero), 0.5), height=6, class_="bar")]
    if low < 0 < high:
        parts.append(element("line", x1=zero, x2=zero, y1=0, y2=12, class_="zero"))
    if figure.low is not None and figure.high is not None:
        parts.append(element("line", x1=x(figure.low), x2=x(figure.high), y1=6, y2=6, class_="whisker"))
        parts += [element("line", x1=x(e), x2=x(e), y1=3, y2=9, class_="whisker") for e in (figure.low, figure.high)]
    parts.append(element("circle", cx=end, cy=6, r=2.2, class_="dot"))
    return element("svg", *parts, viewBox="-3 0 106 12", class_="interval", aria_hidden="true")


def radar(axes: Sequence[str], series: Sequence[Series], *, title: str) -> Markup:
    """A radar plot over at least three axes, each from 0 in the centre to 1 on the rim."""
    if len(axes) < 3:
        raise ValueError(f"radar {title!r}: needs at least 3 axes, found {len(axes)}; show a table instead.")
    radius, angles = 78, [2 * math.pi * i / len(axes) - math.pi / 2 for i in range(len(axes))]

    def at(share: float, angle: float) -> tuple[float, float]:
        return radius * share * math.cos(angle), radius * share * math.sin(angle)

    parts = [element("title", title)]
    for share in (0.25, 0.5, 0.75, 1.0):
        parts.append(element("polygon", points=_points([at(share, a) for a in angles]), class_="grid"))
    for name, angle in zip(axes, angles, strict=True):
        (x, y), (tx, ty) = at(1, angle), at(1.12, angle)
        parts.append(element("line", x1=0, y1=0, x2=x, y2=y, class_="grid"))
        anchor = "middle" if abs(tx) < 8 else "start" if tx > 0 else "end"
        parts.append(element("text", _short(name, 16), x=tx, y=ty + 3.5, text_anchor=anchor))
    for line in series:
        parts.append(_radar_line(line, [at(v, a) for v, a in zip(line.values, angles, strict=True) if v is not None]))
    return element("svg", *parts, viewBox="-160 -104 320 208", class_="radar", role="img")


def _radar_line(line: Series, corners: list[tuple[float, float]]) -> Markup:
    shown = ", ".join("not measured" if value is None else f"{value:.3f}" for value in line.values)
    parts = [element("title", f"{line.label}: {shown}")]
    if len(corners) > 2:
        dashed = "dashed" if line.dashed else None
        parts.append(element("polygon", points=_points(corners), class_=dashed))
    if not line.dashed:
        parts += [element("circle", cx=x, cy=y, r=2.4) for x, y in corners]
    return element("g", *parts, class_=f"series {line.colour}", **line.attributes)


def before_after(lines: Sequence[Line], *, title: str, top: float) -> Markup:
    """Harmful share before (hollow) and after (filled) fine-tuning, in percent from 0 to `top`, with intervals."""
    width, left, step = 560, 190, 30

    def x(value: float) -> float:
        return left + (width - left - 20) * min(value, top) / top

    height = step * len(lines) + 30
    parts = [element("title", title)]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        place = x(tick * top)
        parts.append(element("line", x1=place, x2=place, y1=4, y2=height - 22, class_="grid"))
        parts.append(element("text", f"{tick * top:.4g}%", x=place, y=height - 6, text_anchor="middle"))
    for i, line in enumerate(lines):
        parts.append(_before_after_line(line, 20 + i * step, x))
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", class_="before-after", role="img")


def _before_after_line(line: Line, y: float, x: Callable[[float], float]) -> Markup:
    parts: list[Markup] = [element("text", _short(line.label, 30), x=178, y=y + 4, text_anchor="end")]
    if line.before is not None and line.after is not None:
        parts.append(element("line", x1=x(line.before.value), x2=x(line.after.value), y1=y, y2=y, class_="link"))
    for figure, name, offset in ((line.before, "before", -5), (line.after, "after", 5)):
        if figure is None:
            continue
        if figure.low is not None and figure.high is not None:
            ends = {"x1": x(figure.low), "x2": x(figure.high), "y1": y + offset, "y2": y + offset}
            parts.append(element("line", **ends, class_=f"whisker {name}"))
        tip = element("title", f"{line.label}, {name}: {_estimate_text(figure, 1)}%")
        parts.append(element("circle", tip, cx=x(figure.value), cy=y, r=5, class_=name))
    if line.before is None or line.after is None:
        parts.append(element("text", "not measured", x=200, y=y + 4, class_="gap"))
    return element("g", *parts, **line.attributes)


def scatter(points: Sequence[Point], *, x_label: str, y_label: str, title: str) -> Markup:
    """Points with intervals along both axes; y runs from 0 to 1, x over the points and their intervals."""
    width, height, left, bottom = 640, 400, 58, 46
    low, high = padded([end for p in points for end in _ends(p.x)])

    def x(value: float) -> float:
        return left + (width - left - 16) * (value - low) / (high - low)

    def y(value: float) -> float:
        return 14 + (height - bottom - 14) * (1 - value)

    parts = [element("title", title)]
    for tick in ticks(low, high):
        parts.append(element("line", x1=x(tick), x2=x(tick), y1=y(0), y2=y(1), class_="grid"))
        parts.append(element("text", f"{tick:.4g}", x=x(tick), y=y(0) + 17, text_anchor="middle"))
    for i in range(6):
        parts.append(element("line", x1=left, x2=width - 16, y1=y(i / 5), y2=y(i / 5), class_="grid"))
        parts.append(element("text", f"{i / 5:.1f}", x=left - 8, y=y(i / 5) + 4, text_anchor="end"))
    parts.append(element("text", x_label, x=(left + width) / 2, y=height - 8, text_anchor="middle", class_="label"))
    turn = f"rotate(-90 15 {y(0.5):.1f})"
    parts.append(element("text", y_label, x=15, y=y(0.5), transform=turn, text_anchor="middle", class_="label"))
    parts += [_scatter_point(point, x, y) for point in points]
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", class_="scatter", role="img")


def _scatter_point(point: Point, x: Callable[[float], float], y: Callable[[float], float]) -> Markup:
    cx, cy = x(point.x.value), y(point.y.value)
    parts = [element("title", f"{point.label}: P {_estimate_text(point.x, 3)}, R {_estimate_text(point.y, 3)}")]
    if point.x.low is not None and point.x.high is not None:
        parts.append(element("line", x1=x(point.x.low), x2=x(point.x.high), y1=cy, y2=cy, class_="whisker"))
    if point.y.low is not None and point.y.high is not None:
        parts.append(element("line", x1=cx, x2=cx, y1=y(point.y.low), y2=y(point.y.high), class_="whisker"))
    parts.append(marker(point.shape, cx, cy))
    return element("g", *parts, class_=f"point {point.colour}", **point.attributes)


def curve(
    steps: Sequence[int],
    values: Sequence[Estimate],
    *,
    title: str,
    level: float | None,
    mark: tuple[float, float] | None,
) -> Markup:
    """Percent [T] against steps [T] in a band of intervals; a dashed line at `level`, a diamond at `mark`."""
    width, height, left, bottom = 460, 250, 44, 40
    last = max(steps[-1], 1)

    def x(step: float) -> float:
        return left + (width - left - 16) * step / last

    def y(value: float) -> float:
        return 12 + (height - bottom - 12) * (1 - value / 100)

    parts = [element("title", title)]
    for tick in (0.0, 25.0, 50.0, 75.0, 100.0):
        parts.append(element("line", x1=left, x2=width - 16, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(element("text", f"{tick:g}%", x=left - 6, y=y(tick) + 4, text_anchor="end"))
    for tick in ticks(0.0, float(last)):
        parts.append(element("text", f"{tick:g}", x=x(tick), y=height - 22, text_anchor="middle"))
    parts.append(element("text", "fine-tuning steps", x=(left + width) / 2, y=height - 6, text_anchor="middle"))
    if level is not None:
        tip = element("title", f"unaligned, before: {level:.1f}%")
        parts.append(element("line", tip, x1=left, x2=width - 16, y1=y(level), y2=y(level), class_="level"))
    band = [(x(s), y(v.low)) for s, v in zip(steps, values, strict=True) if v.low is not None]
    band += [(x(s), y(v.high)) for s, v in reversed(list(zip(steps, values, strict=True))) if v.high is not None]
    parts.append(element("polygon", points=_points(band), class_="band"))
    parts.append(element("polyline", points=_points([(x(s), y(v.value)) for s, v in zip(steps, values, strict=True)])))
    for step, value in zip(steps, values, strict=True):
        tip = element("title", f"step {step}: {_estimate_text(value, 1)}%")
        parts.append(element("circle", tip, cx=x(step), cy=y(value.value), r=3.5))
    if mark is not None:
        parts.append(element("g", marker("diamond", x(mark[0]), y(mark[1])), class_="half"))
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", class_="curve", role="img")


def marker(shape: str, cx: float, cy: float, size: float = 6) -> Markup:
    """One of SHAPES, centred."""
    if shape == "square":
        return element("rect", x=cx - 0.85 * size, y=cy - 0.85 * size, width=1.7 * size, height=1.7 * size)
    if shape == "triangle":
        return element("polygon", points=_points([(cx, cy - size), (cx + size, cy + size), (cx - size, cy + size)]))
    if shape == "diamond":
        corners = [(cx, cy - 1.3 * size), (cx + 1.3 * size, cy), (cx, cy + 1.3 * size), (cx - 1.3 * size, cy)]
        return element("polygon", points=_points(corners))
    return element("circle", cx=cx, cy=cy, r=size)


def legend_mark(colour: str, shape: str = "square", *, hollow: bool = False) -> Markup:
    """The mark beside a name in a legend."""
    class_ = f"point {colour}" + (" hollow" if hollow else "")
    return element("svg", element("g", marker(shape, 7, 7, 5), class_=class_), viewBox="0 0 14 14", class_="mark")


def ticks(low: float, high: float) -> list[float]:
    """Round values within a range, at most six: steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 5)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """The range of the values, wider by a share on both sides. It is never empty."""
    low, high = min(values), max(values)
    margin = share * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _ends(figure: Estimate) -> list[float]:
    return [end for end in figure if end is not None]


def _estimate_text(figure: Estimate, digits: int) -> str:
    if figure.low is None or figure.high is None:
        return f"{figure.value:.{digits}f}"
    return f"{figure.value:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def _points(corners: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
