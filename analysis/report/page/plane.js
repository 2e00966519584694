// The shift-discrimination plane: one point per defense, selectable by mouse, touch and keyboard.
const TICKS = [-100, -50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100];

function findAxisRange(points, keys, stretched, linearRange) {
  const values = points.flatMap((point) => keys.map((key) => point[key])).filter((value) => value !== null);
  const low = Math.min(0, ...values), high = Math.max(0, ...values);
  if (stretched) return [1.5 * low - 0.3 * linearRange, 1.5 * high + 0.3 * linearRange];
  const margin = 0.1 * (high - low) || 1;
  return [low - margin, high + margin];
}

function buildPlaneSpec(plane, linearRange, width) {
  const { points, stretched, unit } = plane;
  const [shiftTitle, separationTitle] = unit === "SD" ? ["shift: change of the midpoint (SD)", "discrimination: change of the separation (SD)"]
    : ["shift (nats): refuses more", "discrimination (nats): separates better"];
  const families = new Map(points.map((point) => [point.family_name, point.family]));
  const familyColor = (name) => (name in DATA.shapes ? `var(--family-${name})` : INK);
  const xRange = findAxisRange(points, ["x", "x_low", "x_high"], stretched, linearRange);
  const yRange = findAxisRange(points, ["y", "y_low", "y_high"], stretched, linearRange);
  const scale = (name, domain, range) => ({ name, domain, range, nice: false, zero: false,
    ...(stretched ? { type: "symlog", constant: linearRange } : { type: "linear" }) });
  const ticks = (domain) => (stretched ? { values: TICKS.filter((tick) => tick >= domain[0] && tick <= domain[1]) } : {});
  const position = { x: { scale: "x", field: "x" }, y: { scale: "y", field: "y" } };
  const fill = { scale: "color", field: "family_name" };
  const intervalStyle = { stroke: fill, opacity: { value: 0.5 }, strokeWidth: { value: 1.3 } };
  const zeroStyle = { stroke: { value: INK }, opacity: { value: 0.35 } };
  return {
    $schema: "https://vega.github.io/schema/vega/v6.json",
    width, height: Math.max(320, Math.min(560, width * 0.75)), padding: 4, autosize: { type: "fit-x", contains: "padding" },
    data: [{ name: "rows", values: points }],
    scales: [scale("x", xRange, "width"), scale("y", yRange, "height"),
      { name: "color", type: "ordinal", domain: [...families.keys()], range: [...families.values()].map(familyColor) },
      { name: "shape", type: "ordinal", domain: [...families.keys()], range: [...families.values()].map((family) => DATA.shapes[family] || "triangle-right") }],
    axes: [
      { scale: "x", orient: "bottom", grid: true, title: `${shiftTitle} →`, labelOverlap: true, format: "~r", ...ticks(xRange) },
      { scale: "y", orient: "left", grid: true, title: width < 500 ? `discrimination (${unit}) →` : `${separationTitle} →`, labelOverlap: true, format: "~r", ...ticks(yRange) }],
    legends: [{ fill: "color", shape: "shape", orient: "bottom", columns: Math.max(2, Math.floor(width / 150)), symbolSize: 90 }],
    marks: [
      { type: "rule", encode: { enter: { x: { scale: "x", value: 0 }, y: { value: 0 }, y2: { signal: "height" }, ...zeroStyle } } },
      { type: "rule", encode: { enter: { y: { scale: "y", value: 0 }, x: { value: 0 }, x2: { signal: "width" }, ...zeroStyle } } },
      { type: "rule", from: { data: "rows" }, encode: { enter: { x: { scale: "x", field: "x_low" }, x2: { scale: "x", field: "x_high" }, y: position.y, ...intervalStyle } } },
      { type: "rule", from: { data: "rows" }, encode: { enter: { y: { scale: "y", field: "y_low" }, y2: { scale: "y", field: "y_high" }, x: position.x, ...intervalStyle } } },
      { type: "symbol", name: "points", from: { data: "rows" }, encode: { enter: { ...position, size: { value: width < 500 ? 70 : 110 }, shape: { scale: "shape", field: "family_name" },
        fill: [{ test: "datum.untrusted", value: "var(--paper)" }, fill], stroke: [{ test: "datum.untrusted", ...fill }, { value: "var(--paper)" }], strokeWidth: { value: 1 } } } },
      { type: "text", from: { data: "points" }, interactive: false, encode: { enter: { text: { field: "datum.name" }, fontSize: { value: 11 }, fill: { value: INK } } },
        transform: [{ type: "label", size: { signal: "[width, height]" }, offset: [3], anchor: ["right", "left", "top", "bottom", "top-right", "bottom-right", "top-left", "bottom-left"] }] }],
  };
}

function describePoint(point, unit) {
  return `${point.name} (${point.family}): ${point.verdict}; ${point.rates}; shift ${formatSigned(point.x)}${formatInterval(point.x_low, point.x_high)}, ` +
    `discrimination ${formatSigned(point.y)}${formatInterval(point.y_low, point.y_high)} ${unit}${point.untrusted ? " (margin not trusted)" : ""}`;
}

// The chart is one stop of the Tab key; arrow keys move between points from left to right, Enter or Space opens one.
function makePointsAccessible(container, unit, showDescription, openDefense) {
  const marks = [...container.querySelectorAll(".points path")].filter((mark) => mark.__data__);
  const getPoint = (mark) => mark.__data__.datum;
  marks.sort((first, second) => getPoint(first).x - getPoint(second).x);
  marks.forEach((mark, index) => {
    const point = getPoint(mark);
    mark.setAttribute("tabindex", index === 0 ? "0" : "-1");
    mark.setAttribute("role", openDefense ? "button" : "img");
    mark.setAttribute("aria-label", describePoint(point, unit));
    mark.removeAttribute("aria-roledescription");
    mark.dataset.defense = point.name;
    const focusMark = (target) => {
      marks.forEach((other) => other.setAttribute("tabindex", other === target ? "0" : "-1"));
      target.focus();
    };
    mark.addEventListener("focus", () => showDescription(describePoint(point, unit)));
    mark.addEventListener("mouseenter", () => showDescription(describePoint(point, unit)));
    if (openDefense) mark.addEventListener("click", () => openDefense(point.name));
    mark.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) focusMark(marks[(index + step + marks.length) % marks.length]);
      else if (openDefense && (event.key === "Enter" || event.key === " ")) openDefense(point.name);
      else return;
      event.preventDefault();
    });
  });
}
