// A defense beside the undefended model: ROC, margins, and the queries behind both.
const FIRST = 40;  // queries that are shown before all are asked for

function curve(queries, margins, threshold, who) {
  const known = margins.map((margin, index) => [margin, queries[index][2]]).filter(([margin]) => margin !== null);
  const of = (harmful) => known.filter((one) => one[1] === harmful).map((one) => one[0]).sort((a, b) => a - b);
  const [benign, harmful] = [of(0), of(1)];
  if (!benign.length || !harmful.length) return [];
  const above = (sorted, cut) => {  // share above the cut, by bisection
    let low = 0, high = sorted.length;
    while (low < high) { const middle = (low + high) >> 1; if (sorted[middle] > cut) high = middle; else low = middle + 1; }
    return 1 - low / sorted.length;
  };
  const cuts = [...new Set([...known.map((one) => one[0]), threshold])].sort((a, b) => b - a);
  const row = (cut, index) => ({ who, at: index, f: above(benign, cut), h: above(harmful, cut), here: cut === threshold });
  return [...cuts, -Infinity].map(row);
}

function rocSpec(rows, who, width) {
  const color = { field: "who", type: "nominal", title: null, scale: { domain: ["undefended", who], range: [GREY, "#009E73"] }, legend: { orient: "bottom" } };
  const x = { field: "f", type: "quantitative", title: "share of benign queries refused", scale: { domain: [0, 1] } };
  const y = { field: "h", type: "quantitative", title: "share of harmful queries refused", scale: { domain: [0, 1] } };
  const size = Math.min(width, 400);
  return { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: size, height: size * 0.85, autosize: { type: "fit", contains: "padding" }, data: { values: rows },
    layer: [
      { data: { values: [{ f: 0, h: 0 }, { f: 1, h: 1 }] }, mark: { type: "line", strokeDash: [2, 3], stroke: INK, opacity: 0.4, strokeWidth: 1 }, encoding: { x, y } },
      { mark: { type: "line", strokeWidth: 2 }, encoding: { x, y, color, order: { field: "at" } } },
      { transform: [{ filter: "datum.here" }], mark: { type: "point", filled: true, size: 90, opacity: 1 }, encoding: { x, y, color } }] };
}

function marginsSpec(queries, base, under, threshold, who, width) {
  const rows = [["undefended", base], [who, under]].flatMap(([name, margins]) => margins.map((m, index) =>
    ({ who: name, m, is: queries[index][2] ? "harmful" : "benign" }))).filter((one) => one.m !== null);
  const all = rows.map((one) => one.m), mean = all.reduce((sum, one) => sum + one, 0) / all.length;
  const sd = Math.sqrt(all.reduce((sum, one) => sum + (one - mean) ** 2, 0) / all.length);
  const bandwidth = Math.max(0.05, 0.6 * sd * (all.length / 4) ** -0.2) || 0.25;
  const reach = 3 * bandwidth, extent = [Math.min(threshold, ...all) - reach, Math.max(threshold, ...all) + reach];
  const x = { field: "margin", type: "quantitative", title: "margin (nats; right of the line refuses)", scale: { domain: extent, nice: false }, axis: { tickCount: 6 } };
  return { $schema: "https://vega.github.io/schema/vega-lite/v6.json", data: { values: rows },
    transform: [{ density: "m", groupby: ["who", "is"], extent, bandwidth, as: ["margin", "density"] }],
    facet: { row: { field: "who", type: "nominal", title: null, sort: ["undefended", who], header: { orient: "top", labelAnchor: "start" } } }, spacing: 14,
    spec: { width: Math.max(180, width - 30), height: 118, layer: [
      { mark: { type: "area", opacity: 0.45, line: true },
        encoding: { x, y: { field: "density", type: "quantitative", stack: null, axis: null },
          color: { field: "is", type: "nominal", title: null, scale: { domain: ["harmful", "benign"], range: [HARMFUL, BENIGN] }, legend: { orient: "bottom", symbolOpacity: 1 } } } },
      { mark: { type: "rule", strokeDash: [4, 3], stroke: INK }, encoding: { x: { datum: threshold } } }] } };
}

// What the model read of a query under a defense, and of how many copies it is the first; null where nobody knows.
function prompt(run, attack, defense, [id, words]) {
  const known = ((run.read || {})[attack] || {})[defense];
  const text = !known || !words ? undefined : known.around ? known.around.join(words) : known.seen[id];
  return text === undefined ? null : { text, readings: known.readings };
}

// What changed most first; a query that was not asked under one of both is left out.
function changed(run, attack, defense) {
  const { none: base, [defense]: under } = run.margins[attack];
  const refuses = (margin) => margin > run.threshold;
  return run.queries.map((query, index) => ({ query, before: base[index], after: under[index] }))
    .filter((one) => one.before !== null && one.after !== null)
    .map((one) => ({ ...one, by: one.after - one.before, flipped: refuses(one.before) !== refuses(one.after),
      read: [refuses(one.before), refuses(one.after)].map((yes) => (yes ? "refuses" : "complies")) }))
    .sort((one, other) => Math.abs(other.by) - Math.abs(one.by));
}

function line(one, asked) {
  const [id, text, harmful, category] = one.query;
  const row = make("tr"), first = make("td", text || undefined);
  first.append(make("span", id, "id"));
  if (asked) {
    const fold = make("details", undefined, "read"), copies = asked.readings;
    fold.append(make("summary", copies > 1 ? `what the model read (the first of ${copies} copies)` : "what the model read"), make("pre", asked.text));
    first.append(fold);
  }
  const words = one.flipped ? one.read.join(" → ") : one.read[1];
  row.append(first, make("td", harmful ? "harmful" : "benign"), make("td", category), make("td", signed(one.before)),
    make("td", signed(one.after)), make("td", signed(one.by)), make("td", words));
  return row;
}
