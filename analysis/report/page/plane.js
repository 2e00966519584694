// The shift-discrimination plane: a point for each defense, reached by mouse, finger and keyboard.
const TICKS = [-100, -50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100];

function span(points, keys, far, linear) {
  const values = points.flatMap((one) => keys.map((key) => one[key])).filter((one) => one !== null);
  const low = Math.min(0, ...values), high = Math.max(0, ...values);
  if (far) return [1.5 * low - 0.3 * linear, 1.5 * high + 0.3 * linear];
  const room = 0.1 * (high - low) || 1;
  return [low - room, high + room];
}

function planeSpec(plane, linear, width) {
  const { points, stretched: far } = plane;
  const families = [...new Set(points.map((one) => one.family))];
  const color = (name) => (name in DATA.shapes ? `var(--family-${name})` : INK);
  const x = span(points, ["x", "xl", "xh"], far, linear), y = span(points, ["y", "yl", "yh"], far, linear);
  const scale = (name, domain, range) => ({ name, domain, range, nice: false, zero: false,
    ...(far ? { type: "symlog", constant: linear } : { type: "linear" }) });
  const ticks = (domain) => (far ? { values: TICKS.filter((one) => one >= domain[0] && one <= domain[1]) } : {});
  const at = { x: { scale: "x", field: "x" }, y: { scale: "y", field: "y" } };
  const fill = { scale: "color", field: "family" };
  const bar = { stroke: fill, opacity: { value: 0.5 }, strokeWidth: { value: 1.3 } };
  const zero = { stroke: { value: INK }, opacity: { value: 0.35 } };
  return {
    $schema: "https://vega.github.io/schema/vega/v6.json",
    width, height: Math.max(320, Math.min(560, width * 0.75)), padding: 4, autosize: { type: "fit-x", contains: "padding" },
    data: [{ name: "rows", values: points }],
    scales: [scale("x", x, "width"), scale("y", y, "height"),
      { name: "color", type: "ordinal", domain: families, range: families.map(color) },
      { name: "shape", type: "ordinal", domain: families, range: families.map((one) => DATA.shapes[one] || "triangle-right") }],
    axes: [
      { scale: "x", orient: "bottom", grid: true, title: "shift (nats): refuses more →", labelOverlap: true, format: "~r", ...ticks(x) },
      { scale: "y", orient: "left", grid: true, title: width < 500 ? "discrimination (nats) →" : "discrimination (nats): separates better →", labelOverlap: true, format: "~r", ...ticks(y) }],
    legends: [{ fill: "color", shape: "shape", orient: "bottom", columns: Math.max(2, Math.floor(width / 150)), symbolSize: 90 }],
    marks: [
      { type: "rule", encode: { enter: { x: { scale: "x", value: 0 }, y: { value: 0 }, y2: { signal: "height" }, ...zero } } },
      { type: "rule", encode: { enter: { y: { scale: "y", value: 0 }, x: { value: 0 }, x2: { signal: "width" }, ...zero } } },
      { type: "rule", from: { data: "rows" }, encode: { enter: { x: { scale: "x", field: "xl" }, x2: { scale: "x", field: "xh" }, y: at.y, ...bar } } },
      { type: "rule", from: { data: "rows" }, encode: { enter: { y: { scale: "y", field: "yl" }, y2: { scale: "y", field: "yh" }, x: at.x, ...bar } } },
      { type: "symbol", name: "points", from: { data: "rows" }, encode: { enter: { ...at, size: { value: width < 500 ? 70 : 110 }, shape: { scale: "shape", field: "family" },
        fill: [{ test: "datum.hollow", value: "var(--paper)" }, fill], stroke: [{ test: "datum.hollow", ...fill }, { value: "var(--paper)" }], strokeWidth: { value: 1 } } } },
      { type: "text", from: { data: "points" }, interactive: false, encode: { enter: { text: { field: "datum.name" }, fontSize: { value: 11 }, fill: { value: INK } } },
        transform: [{ type: "label", size: { signal: "[width, height]" }, offset: [3], anchor: ["right", "left", "top", "bottom", "top-right", "bottom-right", "top-left", "bottom-left"] }] }],
  };
}

function told(one) {
  return `${one.name} (${one.family}): shift ${signed(one.x)}${between(one.xl, one.xh)}, discrimination ` +
    `${signed(one.y)}${between(one.yl, one.yh)} nats; ${one.verdict.replaceAll(" -", " −")}${one.hollow ? "; not trusted" : ""}`;
}

// One stop of the Tab key; arrows move among the points from left to right, Enter or Space opens one.
function reachable(place, tell, open) {
  const points = [...place.querySelectorAll(".points path")].filter((one) => one.__data__);
  const datum = (point) => point.__data__.datum;
  points.sort((one, other) => datum(one).x - datum(other).x);
  points.forEach((point, index) => {
    const of = datum(point);
    point.setAttribute("tabindex", index === 0 ? "0" : "-1");
    point.setAttribute("role", open ? "button" : "img");
    point.setAttribute("aria-label", told(of));
    point.removeAttribute("aria-roledescription");
    point.dataset.defense = of.name;
    const go = (next) => {
      points.forEach((one) => one.setAttribute("tabindex", one === next ? "0" : "-1"));
      next.focus();
    };
    point.addEventListener("focus", () => tell(told(of)));
    point.addEventListener("mouseenter", () => tell(told(of)));
    if (open) point.addEventListener("click", () => open(of.name));
    point.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) go(points[(index + step + points.length) % points.length]);
      else if (open && (event.key === "Enter" || event.key === " ")) open(of.name);
      else return;
      event.preventDefault();
    });
  });
}
