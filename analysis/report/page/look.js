// What all charts share: their ink is the page's, so that they follow light, dark and print.
const DATA = JSON.parse(document.getElementById("data").textContent);
const HARMFUL = "#D55E00", BENIGN = "#0072B2", GREY = "#8a8a8a";
const INK = "currentColor";
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
const axis = { labelColor: INK, titleColor: INK, tickColor: INK, domainColor: INK, gridColor: INK, gridOpacity: 0.12,
  domainOpacity: 0.5, tickOpacity: 0.5, labelFont: FONT, titleFont: FONT, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
const legend = { labelColor: INK, titleColor: INK, labelFont: FONT, titleFont: FONT, labelFontSize: 12, titleFontSize: 12, labelLimit: 150 };
const CONFIG = { background: null, axis, legend, view: { stroke: null }, text: { fill: INK, font: FONT },
  header: { labelColor: INK, titleColor: INK, labelFont: FONT, labelFontSize: 12 } };

// No expression is compiled (the page's policy forbids it) and nothing is fetched.
const draw = (place, spec) => vegaEmbed(place, spec, { ast: true, actions: false, renderer: "svg", config: CONFIG,
  tooltip: false, loader: { load: () => Promise.reject(new Error("this page fetches nothing")) } });

const signed = (value) => (value === null ? "–" : (value > 0 ? "+" : "") + value.toFixed(2)).replace("-", "−");
const between = (low, high) => (low === null || high === null ? "" : ` [${signed(low)}, ${signed(high)}]`);
const shown = (name) => (name === "none" ? "undefended" : name);

function make(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;  // never as markup: texts are from data sets
  if (className) made.className = className;
  return made;
}
