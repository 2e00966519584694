// One defense next to the undefended model: ROC curves, margins and queries.
const INITIAL_ROWS = 40;  // queries shown before "Show all"

function computeRoc(queries, margins, threshold, label) {
  const scored = margins.map((margin, index) => [margin, queries[index][2]]).filter(([margin]) => margin !== null);
  const sortedMargins = (harmful) => scored.filter((pair) => pair[1] === harmful).map((pair) => pair[0]).sort((a, b) => a - b);
  const [benign, harmful] = [sortedMargins(0), sortedMargins(1)];
  if (!benign.length || !harmful.length) return [];
  const shareAbove = (sorted, cutoff) => {  // by bisection
    let low = 0, high = sorted.length;
    while (low < high) { const middle = (low + high) >> 1; if (sorted[middle] > cutoff) high = middle; else low = middle + 1; }
    return 1 - low / sorted.length;
  };
  const cutoffs = [...new Set([...scored.map((pair) => pair[0]), threshold])].sort((a, b) => b - a);
  return [...cutoffs, -Infinity].map((cutoff, index) => ({ label, order: index, benign: shareAbove(benign, cutoff),
    harmful: shareAbove(harmful, cutoff), isThreshold: cutoff === threshold }));
}

function buildRocSpec(rows, label, width) {
  const color = { field: "label", type: "nominal", title: null, scale: { domain: ["undefended", label], range: [GREY, "#009E73"] }, legend: { orient: "bottom" } };
  const x = { field: "benign", type: "quantitative", title: "share of benign queries refused", scale: { domain: [0, 1] } };
  const y = { field: "harmful", type: "quantitative", title: "share of harmful queries refused", scale: { domain: [0, 1] } };
  const size = Math.min(width, 400);
  return { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: size, height: size * 0.85, autosize: { type: "fit", contains: "padding" }, data: { values: rows },
    layer: [
      { data: { values: [{ benign: 0, harmful: 0 }, { benign: 1, harmful: 1 }] }, mark: { type: "line", strokeDash: [2, 3], stroke: INK, opacity: 0.4, strokeWidth: 1 }, encoding: { x, y } },
      { mark: { type: "line", strokeWidth: 2 }, encoding: { x, y, color, order: { field: "order" } } },
      { transform: [{ filter: "datum.isThreshold" }], mark: { type: "point", filled: true, size: 90, opacity: 1 }, encoding: { x, y, color } }] };
}

function buildMarginsSpec(queries, undefended, defended, threshold, label, width) {
  const rows = [["undefended", undefended], [label, defended]].flatMap(([name, margins]) => margins.map((value, index) =>
    ({ label: name, value, class: queries[index][2] ? "harmful" : "benign" }))).filter((row) => row.value !== null);
  const values = rows.map((row) => row.value), mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const sd = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length);
  const bandwidth = Math.max(0.05, 0.6 * sd * (values.length / 4) ** -0.2) || 0.25;
  const padding = 3 * bandwidth, extent = [Math.min(threshold, ...values) - padding, Math.max(threshold, ...values) + padding];
  const x = { field: "margin", type: "quantitative", title: "margin (nats; right of the line refuses)", scale: { domain: extent, nice: false }, axis: { tickCount: 6 } };
  return { $schema: "https://vega.github.io/schema/vega-lite/v6.json", data: { values: rows },
    transform: [{ density: "value", groupby: ["label", "class"], extent, bandwidth, as: ["margin", "density"] }],
    facet: { row: { field: "label", type: "nominal", title: null, sort: ["undefended", label], header: { orient: "top", labelAnchor: "start" } } }, spacing: 14,
    spec: { width: Math.max(180, width - 30), height: 118, layer: [
      { mark: { type: "area", opacity: 0.45, line: true },
        encoding: { x, y: { field: "density", type: "quantitative", stack: null, axis: null },
          color: { field: "class", type: "nominal", title: null, scale: { domain: ["harmful", "benign"], range: [HARMFUL, BENIGN] }, legend: { orient: "bottom", symbolOpacity: 1 } } } },
      { mark: { type: "rule", strokeDash: [4, 3], stroke: INK }, encoding: { x: { datum: threshold } } }] } };
}

// What the model read for a query under a defense, and the number of copies; null if it is not known.
function findPrompt(run, attack, defense, [id, queryText]) {
  const entry = ((run.prompts || {})[attack] || {})[defense];
  const text = !entry || !queryText ? undefined : entry.around ? entry.around.join(queryText) : entry.examples[id];
  return text === undefined ? null : { text, readings: entry.readings };
}

// Changes of the margins, largest first; queries that were not scored in both conditions are left out.
function listChanges(run, attack, defense) {
  const { none: undefended, [defense]: defended } = run.margins[attack];
  const refuses = (margin) => margin > run.threshold;
  return run.queries.map((query, index) => ({ query, before: undefended[index], after: defended[index] }))
    .filter((row) => row.before !== null && row.after !== null)
    .map((row) => ({ ...row, change: row.after - row.before, flipped: refuses(row.before) !== refuses(row.after),
      classes: [refuses(row.before), refuses(row.after)].map((refused) => (refused ? "refuses" : "complies")) }))
    .sort((first, second) => Math.abs(second.change) - Math.abs(first.change));
}

// The thumbnail of a query's image; null if it has none.
function makeThumbnail(run, id) {
  const address = DATA.thumbnails[(run.images || {})[id]];
  return address === undefined ? null : Object.assign(makeElement("img"), { src: address, alt: `image of ${id}` });
}

function makeQueryRow(row, prompt, thumbnail) {
  const [id, text, harmful, category] = row.query;
  const tableRow = makeElement("tr"), queryCell = makeElement("td", text || undefined);
  if (thumbnail) queryCell.append(thumbnail);
  queryCell.append(makeElement("span", id, "id"));
  if (prompt) {
    const details = makeElement("details", undefined, "read"), copies = prompt.readings;
    details.append(makeElement("summary", copies > 1 ? `prompt (the first of ${copies} copies)` : "prompt"), makeElement("pre", prompt.text));
    queryCell.append(details);
  }
  const classification = row.flipped ? row.classes.join(" → ") : row.classes[1];
  tableRow.append(queryCell, makeElement("td", harmful ? "harmful" : "benign"), makeElement("td", category), makeElement("td", formatSigned(row.before)),
    makeElement("td", formatSigned(row.after)), makeElement("td", formatSigned(row.change)), makeElement("td", classification));
  return tableRow;
}
