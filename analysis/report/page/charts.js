// Shared by all charts: colors follow the page's text color, so that charts fit light, dark and print.
const DATA = JSON.parse(document.getElementById("data").textContent);
const HARMFUL = "#D55E00", BENIGN = "#0072B2", GREY = "#8a8a8a";
const INK = "currentColor";
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
const axis = { labelColor: INK, titleColor: INK, tickColor: INK, domainColor: INK, gridColor: INK, gridOpacity: 0.12,
  domainOpacity: 0.5, tickOpacity: 0.5, labelFont: FONT, titleFont: FONT, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
const legend = { labelColor: INK, titleColor: INK, labelFont: FONT, titleFont: FONT, labelFontSize: 12, titleFontSize: 12, labelLimit: 150 };
const CONFIG = { background: null, axis, legend, view: { stroke: null }, text: { fill: INK, font: FONT },
  header: { labelColor: INK, titleColor: INK, labelFont: FONT, labelFontSize: 12 } };

// Vega interprets expressions (`ast`), because the content security policy forbids compiling them; nothing is fetched.
const drawChart = (container, spec) => vegaEmbed(container, spec, { ast: true, actions: false, renderer: "svg", config: CONFIG,
  tooltip: false, loader: { load: () => Promise.reject(new Error("this page fetches nothing")) } });

const formatSigned = (value) => (value === null ? "–" : (value > 0 ? "+" : "") + value.toFixed(2)).replace("-", "−");
const formatInterval = (low, high) => (low === null || high === null ? "" : ` [${formatSigned(low)}, ${formatSigned(high)}]`);
const formatDefense = (name) => (name === "none" ? "undefended" : name);

function makeElement(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;  // never as markup: texts come from data sets
  if (className) element.className = className;
  return element;
}
