// The charts of each run, and the comparison of runs; each is drawn when it scrolls into view.
function RunView(article, run) {
  const find = (selector) => article.querySelector(selector);
  const attacks = Object.keys(run.margins || run.plane || {});
  const state = { attack: attacks.includes("direct") ? "direct" : attacks[0], defense: null, showAll: false };
  const defensePicker = find("select.defense"), attackPicker = find("select.attack"), closerLook = find(".closer");

  const markChosenPoint = () => article.querySelectorAll(".points path")
    .forEach((mark) => mark.classList.toggle("chosen", mark.dataset.defense === state.defense));

  this.drawPlane = async () => {
    const plane = run.plane?.[state.attack], container = find(".plane");
    if (!container) return;
    find(".stretched").hidden = !plane.stretched;
    if (!plane.points.length) { container.textContent = "Only the undefended model was evaluated."; return; }
    await drawChart(container, buildPlaneSpec(plane, run.linear_range, container.clientWidth));
    const description = find(".point");
    makePointsAccessible(container, plane.unit, (text) => { description.textContent = text; }, run.margins ? (name) => this.openDefense(name) : null);
    markChosenPoint();
  };

  const fillDefensePicker = () => {
    defensePicker.replaceChildren(...Object.keys(run.margins[state.attack] || {}).map((name) => {
      const option = makeElement("option", formatDefense(name));
      option.value = name;
      return option;
    }));
  };

  this.fillQueryTable = () => {
    const rows = listChanges(run, state.attack, state.defense), flippedOnly = find(".flipped").checked, chosenClass = find("select.class").value;
    const matching = rows.filter((row) => (!flippedOnly || row.flipped) && (chosenClass === "" || row.query[2] === Number(chosenClass)));
    const visible = state.showAll ? matching : matching.slice(0, INITIAL_ROWS);
    find(".queries tbody").replaceChildren(...visible.map((row) =>
      makeQueryRow(row, findPrompt(run, state.attack, state.defense, row.query), makeThumbnail(run, row.query[0]))));
    find(".more").hidden = visible.length === matching.length;
    find(".more").textContent = `Show all ${matching.length}`;
    const countFlips = (harmful, after) => rows.filter((row) => row.flipped && row.query[2] === harmful && row.classes[1] === after).length;
    find(".counts").textContent = `${formatDefense(state.defense)}: of ${rows.length} queries, newly refused ${countFlips(1, "refuses")} harmful and ` +
      `${countFlips(0, "refuses")} benign, newly answered ${countFlips(1, "complies")} harmful and ${countFlips(0, "complies")} benign; showing ${visible.length}.`;
  };

  this.drawCloserLook = () => {
    if (!closerLook) return Promise.resolve();
    const margins = run.margins[state.attack] || {}, names = Object.keys(margins);
    closerLook.hidden = !margins.none;  // the scores may lack an attack of the summary
    if (!margins.none) return Promise.resolve();
    if (!(state.defense in margins)) state.defense = names.find((name) => name !== "none") || "none";
    defensePicker.value = state.defense;
    markChosenPoint();
    this.fillQueryTable();
    const label = formatDefense(state.defense), isUndefended = state.defense === "none";
    const roc = [...computeRoc(run.queries, margins.none, run.threshold, "undefended"),
      ...(isUndefended ? [] : computeRoc(run.queries, margins[state.defense], run.threshold, label))];
    const [rocContainer, marginsContainer] = [find(".roc"), find(".margins")];
    return Promise.all([drawChart(rocContainer, buildRocSpec(roc, label, rocContainer.clientWidth)),
      drawChart(marginsContainer, buildMarginsSpec(run.queries, margins.none, isUndefended ? [] : margins[state.defense], run.threshold, label, marginsContainer.clientWidth))]);
  };

  this.openDefense = async (name, attack) => {
    if (attack && attack !== state.attack) { attackPicker.value = attack; attackPicker.dispatchEvent(new Event("change")); }
    state.defense = name;
    state.showAll = false;
    await this.drawCloserLook();
    closerLook.focus({ preventScroll: true });
    closerLook.scrollIntoView({ block: "start" });
  };

  attackPicker?.addEventListener("change", () => {
    state.attack = attackPicker.value;
    this.drawPlane();
    if (closerLook) { fillDefensePicker(); this.drawCloserLook(); }
  });
  if (attackPicker) attackPicker.value = state.attack;
  if (closerLook) {
    fillDefensePicker();
    defensePicker.addEventListener("change", () => { state.defense = defensePicker.value; state.showAll = false; this.drawCloserLook(); });
    find(".flipped").addEventListener("change", () => this.fillQueryTable());
    find("select.class").addEventListener("change", () => this.fillQueryTable());
    find(".more").addEventListener("click", () => { state.showAll = true; this.fillQueryTable(); });
  }
  this.charts = [[find(".plane"), this.drawPlane], [closerLook, this.drawCloserLook]].filter(([container]) => container);
}

function buildComparisonSpec(width) {
  const points = DATA.comparison, names = [...new Set(points.map((point) => point.name))], runs = [...new Set(points.map((point) => point.run))];
  const y = { field: "name", type: "nominal", title: null, sort: names, axis: { labelLimit: Math.min(180, width * 0.4), grid: true } };
  const color = { field: "run", type: "nominal", title: null, scale: { domain: runs, range: runs.map((_, index) => DATA.colors[index % DATA.colors.length]) },
    legend: { orient: "top", columns: Math.max(1, Math.floor(width / 170)) } };
  const yOffset = { field: "run", sort: runs };
  return { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width, height: names.length * Math.max(22, 8 * runs.length), autosize: { type: "fit-x", contains: "padding" }, data: { values: points },
    layer: [
      { data: { values: [{}] }, mark: { type: "rule", stroke: INK, opacity: 0.5 }, encoding: { x: { datum: 0 } } },
      { mark: { type: "rule", strokeWidth: 1.5, opacity: 0.6 }, encoding: { x: { field: "low", type: "quantitative", title: "ΔAUROC: separates better →" }, x2: { field: "high" }, y, yOffset, color } },
      { mark: { type: "point", filled: true, size: 45, opacity: 1 }, encoding: { x: { field: "value", type: "quantitative" }, y, yOffset, color, shape: { field: "run", type: "nominal", title: null, scale: { domain: runs }, legend: color.legend } } }] };
}

const RUN_VIEWS = [...document.querySelectorAll("article")].map((article) => new RunView(article, DATA.runs[Number(article.dataset.run)]));
const comparisonContainer = document.getElementById("comparison-chart");
const charts = RUN_VIEWS.flatMap((view) => view.charts);
if (comparisonContainer && DATA.comparison.length) charts.push([comparisonContainer, () => drawChart(comparisonContainer, buildComparisonSpec(comparisonContainer.clientWidth))]);
const pendingCharts = new Map(charts), drawnCharts = new Map();  // container → function that draws it

function drawPendingChart(container) {
  if (!pendingCharts.has(container)) return;
  drawnCharts.set(container, pendingCharts.get(container));
  pendingCharts.delete(container);
  drawnCharts.get(container)();
}

const observer = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => drawPendingChart(entry.target)), { rootMargin: "400px" });
charts.forEach(([container]) => observer.observe(container));

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("button.open");
  if (!button) return;
  const { run, defense, attack } = button.dataset;
  const view = RUN_VIEWS[run], closerLook = view.charts.at(-1)[0];
  drawnCharts.set(closerLook, view.drawCloserLook);
  pendingCharts.delete(closerLook);
  view.openDefense(defense, attack);
});

let pageWidth = window.innerWidth, resizeTimer = 0;
window.addEventListener("resize", () => {
  if (window.innerWidth === pageWidth) return;  // a phone's toolbars change only the height
  pageWidth = window.innerWidth;
  clearTimeout(resizeTimer);
  resizeTimer = setTimeout(() => drawnCharts.forEach((redraw) => redraw()), 150);
});
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details:not(.read)").forEach((details) => { details.open = true; });
  [...pendingCharts.keys()].forEach(drawPendingChart);
});
