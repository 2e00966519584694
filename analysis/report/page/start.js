// Each run's plane, its closer look, and the comparison; drawn when they come into view.
const RUNS = [...document.querySelectorAll("article")].map((place) => new Shown(place, DATA.runs[Number(place.dataset.run)]));

function Shown(place, run) {
  const find = (selector) => place.querySelector(selector);
  const attacks = Object.keys(run.margins || run.plane || {});
  const state = { attack: attacks.includes("direct") ? "direct" : attacks[0], defense: null, all: false };
  const picker = find("select.defense"), sent = find("select.attack"), closer = find(".closer");

  const mark = () => place.querySelectorAll(".points path").forEach((one) => one.classList.toggle("chosen", one.dataset.defense === state.defense));

  this.plane = async () => {
    const plane = run.plane?.[state.attack], at = find(".plane");
    if (!at) return;
    find(".stretched").hidden = !plane.stretched;
    if (!plane.points.length) { at.textContent = "Only the undefended model was read."; return; }
    await draw(at, planeSpec(plane, run.linear, at.clientWidth));
    const note = find(".point");
    reachable(at, (text) => { note.textContent = text; }, run.margins ? (name) => this.open(name) : null);
    mark();
  };

  const choices = () => {
    picker.replaceChildren(...Object.keys(run.margins[state.attack] || {}).map((name) => {
      const option = make("option", shown(name));
      option.value = name;
      return option;
    }));
  };

  this.table = () => {
    const rows = changed(run, state.attack, state.defense), flipped = find(".flipped").checked, side = find("select.class").value;
    const kept = rows.filter((one) => (!flipped || one.flipped) && (side === "" || one.query[2] === Number(side)));
    const seen = state.all ? kept : kept.slice(0, FIRST);
    find(".queries tbody").replaceChildren(...seen.map((one) => line(one, prompt(run, state.attack, state.defense, one.query))));
    find(".more").hidden = seen.length === kept.length;
    find(".more").textContent = `Show all ${kept.length}`;
    const turned = (harmful, word) => rows.filter((one) => one.flipped && one.query[2] === harmful && one.read[1] === word).length;
    find(".counts").textContent = `${shown(state.defense)}: of ${rows.length} queries, newly refused ${turned(1, "refuses")} harmful and ` +
      `${turned(0, "refuses")} benign, newly answered ${turned(1, "complies")} harmful and ${turned(0, "complies")} benign; showing ${seen.length}.`;
  };

  this.closer = () => {
    if (!closer) return Promise.resolve();
    const of = run.margins[state.attack] || {}, names = Object.keys(of);
    closer.hidden = !of.none;  // an attack of the summary alone
    if (!of.none) return Promise.resolve();
    if (!(state.defense in of)) state.defense = names.find((name) => name !== "none") || "none";
    picker.value = state.defense;
    mark();
    this.table();
    const who = shown(state.defense), alone = state.defense === "none";
    const roc = [...curve(run.queries, of.none, run.threshold, "undefended"), ...(alone ? [] : curve(run.queries, of[state.defense], run.threshold, who))];
    const [left, right] = [find(".roc"), find(".margins")];
    return Promise.all([draw(left, rocSpec(roc, who, left.clientWidth)),
      draw(right, marginsSpec(run.queries, of.none, alone ? [] : of[state.defense], run.threshold, who, right.clientWidth))]);
  };

  this.open = async (name, attack) => {
    if (attack && attack !== state.attack) { sent.value = attack; sent.dispatchEvent(new Event("change")); }
    state.defense = name;
    state.all = false;
    await this.closer();
    closer.focus({ preventScroll: true });
    closer.scrollIntoView({ block: "start" });
  };

  sent?.addEventListener("change", () => {
    state.attack = sent.value;
    this.plane();
    if (closer) { choices(); this.closer(); }
  });
  if (sent) sent.value = state.attack;
  if (closer) {
    choices();
    picker.addEventListener("change", () => { state.defense = picker.value; state.all = false; this.closer(); });
    find(".flipped").addEventListener("change", () => this.table());
    find("select.class").addEventListener("change", () => this.table());
    find(".more").addEventListener("click", () => { state.all = true; this.table(); });
  }
  this.parts = [[find(".plane"), this.plane], [closer, this.closer]].filter(([at]) => at);
}

function acrossSpec(width) {
  const names = [...new Set(DATA.across.map((one) => one.name))], runs = [...new Set(DATA.across.map((one) => one.run))];
  const y = { field: "name", type: "nominal", title: null, sort: names, axis: { labelLimit: Math.min(180, width * 0.4), grid: true } };
  const color = { field: "run", type: "nominal", title: null, scale: { domain: runs, range: runs.map((_, index) => DATA.colors[index % DATA.colors.length]) },
    legend: { orient: "top", columns: Math.max(1, Math.floor(width / 170)) } };
  const yOffset = { field: "run", sort: runs };
  return { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width, height: names.length * Math.max(22, 8 * runs.length), autosize: { type: "fit-x", contains: "padding" }, data: { values: DATA.across },
    layer: [
      { data: { values: [{}] }, mark: { type: "rule", stroke: INK, opacity: 0.5 }, encoding: { x: { datum: 0 } } },
      { mark: { type: "rule", strokeWidth: 1.5, opacity: 0.6 }, encoding: { x: { field: "l", type: "quantitative", title: "ΔAUROC: separates better →" }, x2: { field: "h" }, y, yOffset, color } },
      { mark: { type: "point", filled: true, size: 45, opacity: 1 }, encoding: { x: { field: "v", type: "quantitative" }, y, yOffset, color, shape: { field: "run", type: "nominal", title: null, scale: { domain: runs }, legend: color.legend } } }] };
}

const compare = document.getElementById("across-chart");
const parts = RUNS.flatMap((run) => run.parts);
if (compare && DATA.across.length) parts.push([compare, () => draw(compare, acrossSpec(compare.clientWidth))]);
const waiting = new Map(parts), drawn = new Map();

function show(at) {
  if (!waiting.has(at)) return;
  drawn.set(at, waiting.get(at));
  waiting.delete(at);
  drawn.get(at)();
}

const watch = new IntersectionObserver((seen) => seen.filter((one) => one.isIntersecting).forEach((one) => show(one.target)), { rootMargin: "400px" });
parts.forEach(([at]) => watch.observe(at));

document.addEventListener("click", (event) => {
  const asked = event.target.closest?.("button.open");
  if (!asked) return;
  const { run, defense, attack } = asked.dataset;
  drawn.set(RUNS[run].parts.at(-1)[0], RUNS[run].closer);
  waiting.delete(RUNS[run].parts.at(-1)[0]);
  RUNS[run].open(defense, attack);
});

let width = window.innerWidth, later = 0;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return;  // a phone's bars come and go
  width = window.innerWidth;
  clearTimeout(later);
  later = setTimeout(() => drawn.forEach((again) => again()), 150);
});
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details:not(.read)").forEach((one) => { one.open = true; });
  [...waiting.keys()].forEach(show);
});
