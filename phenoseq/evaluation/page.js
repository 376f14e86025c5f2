const facts = data.facts, model = data.scores[0].name;
at("what").textContent = number(facts.n_cells) + " cells of " + number(facts.n_groups) + " held-out groups, " +
  number(facts.n_genes) + " genes" + (facts.data ? ", data " + facts.data + ", part " + facts.part : "");

// scores
{
  const columns = data.columns.filter(c => data.scores.some(s => s[c[0]] !== null));
  const body = heads("score-table", ["Method", ...columns.map(c => c[1])]);
  data.scores.forEach((s, i) => {
    const row = make("tr", null, body, i ? {} : { class: "mine" });
    make("th", s.name, row, { scope: "row" });
    for (const [name, , digits] of columns) {
      const value = s[name], cell = make("td", value === null ? "" : value.toFixed(digits), row);
      const show = (ends, sign) => { if (ends && ends[0] !== null)
        make("small", sign + ends.map(e => e.toFixed(digits)).join(" to "), cell); };
      show(s.intervals[name], ""); show(s.differences[name], "\u0394 ");
    }
  });
}

// ranking of genes
const genes = data.genes, order = genes.symbol.map((_, i) => i).sort((a, b) => genes.pcc[0][b] - genes.pcc[0][a]);
const rank = new Map(order.map((g, k) => [g, k + 1])), shown = new Map(data.shown.map((g, k) => [g, k]));
{
  const body = heads("gene-table", ["Gene", "Rank", ...genes.methods]), most = 25;
  const filter = () => {
    const wanted = at("search").value.trim().toLowerCase();
    const hits = order.filter(g => genes.symbol[g].toLowerCase().includes(wanted));
    body.replaceChildren();
    hits.slice(0, most).forEach(g => {
      const row = make("tr", null, body), cell = make("td", null, row);
      if (shown.has(g)) make("button", genes.symbol[g], cell, { type: "button" }).addEventListener("click", () => {
        choose(g); at("gene").scrollIntoView(); at("choice").focus({ preventScroll: true }); });
      else cell.textContent = genes.symbol[g];
      make("td", rank.get(g), row);
      genes.pcc.forEach(p => make("td", p[g].toFixed(3), row));
    });
    at("found").textContent = hits.length + " of " + order.length + " genes" + (hits.length > most ? ", the best " + most + " shown" : "");
  };
  at("search").addEventListener("input", filter);
  filter();
}

// one gene
const unpack = packed => {
  const bytes = Uint8Array.from(atob(packed.bytes), c => c.charCodeAt(0));
  return k => Array.from(bytes.subarray(k * packed.n, (k + 1) * packed.n), b => b / 255 * packed.top);
};
const trueOf = unpack(data.scatter.true), meanOf = unpack(data.scatter.mean);
const jitter = (() => { let s = 1; return () => { s = (s * 16807) % 2147483647; return s / 2147483647 - .5; }; })();
const spread = Array.from({ length: data.scatter.true.n }, () => jitter() * .06);
const plates = (plate, wells, values) => {  // one map under the other, each below a row with its name
  const places = wells.map((w, i) => [plate[i], w.replace(/\d.*/, "").toUpperCase(), parseInt(w.replace(/^\D*/, ""), 10) || 0]);
  const sums = new Map();
  places.map(String).forEach((k, i) => { const s = sums.get(k) || [0, 0]; sums.set(k, [s[0] + values[i], s[1] + 1]); });
  const names = [...new Set(plate)].sort(), columns = [...new Set(places.map(p => p[2]))].sort((a, b) => a - b);
  const rows = names.flatMap(name => [...names.length > 1 ? [[name, ""]] : [],
    ...[...new Set(places.filter(p => p[0] === name).map(p => p[1]))].sort().map(row => [name, row])]);
  const z = rows.map(row => columns.map(c => { const s = sums.get(String([...row, c])); return s ? s[0] / s[1] : null; }));
  return { labels: rows.map(([name, row]) => row || name), columns: columns.map(String), z };
};
function choose(g) {
  at("choice").value = g;
  const k = shown.get(g), x = trueOf(k), y = meanOf(k), symbol = genes.symbol[g];
  at("chosen").textContent = "pcc_gene " + genes.pcc[0][g].toFixed(3) + ", rank " + rank.get(g) + " of " + order.length;
  draw("scatter", [{ x: x.map((v, i) => v + spread[i]), y, mode: "markers", type: "scatter",
    marker: { size: 4, opacity: .4, color: "#0b5fa5" }, hoverinfo: "x+y" }],
    { title: { text: symbol }, xaxis: { title: { text: "true" } }, yaxis: { title: { text: "predicted" } } },
    "Scatter of " + symbol + ": predicted against true, correlation " + genes.pcc[0][g].toFixed(3));
  const map = data.map;
  if (!map) { at("map-figure").hidden = true; return; }
  const two = { xaxis2: { anchor: "y2", domain: [.54, 1], automargin: true }, yaxis2: { anchor: "x2", automargin: true },
    annotations: ["true", "predicted"].map((text, i) => ({ text, x: .23 + .54 * i, y: 1.08, xref: "paper", yref: "paper", showarrow: false })) };
  if (map.kind === "plate") {
    at("map-caption").textContent = "Mean of " + symbol + " in each well, of the cells drawn here.";
    const maps = [x, y].map(v => plates(map.plate, map.well, v)), labels = maps[0].labels;
    at("map").style.height = Math.max(400, 14 * labels.length) + "px";
    const rows = { autorange: "reversed", tickvals: labels.map((_, k) => k), ticktext: labels };
    const traces = maps.map((p, i) => {
      return { type: "heatmap", x: p.columns, y: labels.map((_, k) => k), z: p.z, coloraxis: i ? "coloraxis2" : "coloraxis", xaxis: i ? "x2" : "x", yaxis: i ? "y2" : "y" }; });
    const bar = at => ({ colorscale: "Viridis", colorbar: { x: at, len: .8, thickness: 8, tickfont: { size: 10 } } });
    draw("map", traces, { ...two, xaxis: { domain: [0, .4], type: "category" }, xaxis2: { ...two.xaxis2, domain: [.56, .94], type: "category" }, yaxis: rows,
      yaxis2: { ...two.yaxis2, ...rows }, coloraxis: bar(.41), coloraxis2: bar(.95) }, "Plate map of " + symbol + ", true and predicted");
  } else {
    at("map-caption").textContent = symbol + " at each cell, micrometres; each map has its own colours, dark is low.";
    const traces = [x, y].map((v, i) => ({ x: map.x, y: map.y, type: "scatter", mode: "markers", showlegend: false, hoverinfo: "skip",
      xaxis: i ? "x2" : "x", yaxis: i ? "y2" : "y", marker: { size: 4, color: v, colorscale: "Viridis" } }));
    draw("map", traces, { ...two, xaxis: { domain: [0, .46] }, yaxis: { autorange: "reversed" },
      yaxis2: { ...two.yaxis2, autorange: "reversed" } }, "Map of " + symbol + " in the tissue, true and predicted");
  }
}
order.filter(g => shown.has(g)).forEach(g => make("option", genes.symbol[g], at("choice"), { value: g }));
at("choice").addEventListener("change", () => choose(Number(at("choice").value)));
choose(order.find(g => shown.has(g)));

// true and generated cells
{
  const e = data.embedding;
  at("embedding-caption").textContent = e.how + " of true cells and of one draw of each, placed together.";
  draw("embedding", [["true", "#57606a"], ["draw", "#d1570a"]].map(([name, color]) => ({ x: e[name][0], y: e[name][1], type: "scatter",
    mode: "markers", name: name === "true" ? "true" : "generated", hoverinfo: "name", marker: { size: 4, opacity: .45, color } })),
    { xaxis: { title: { text: e.how + " 1" } }, yaxis: { title: { text: e.how + " 2" } } }, e.how + " of true and generated cells");
}

// co-expression
for (const kind of ["true", "predicted"]) {
  const c = data.coexpression;
  draw("together-" + kind, [{ type: "heatmap", x: c.genes, y: c.genes, z: c[kind], zmin: -1, zmax: 1, colorscale: "RdBu",
    colorbar: { thickness: 8 } }], { xaxis: { tickfont: { size: 9 } }, yaxis: { autorange: "reversed", tickfont: { size: 9 } } }, "Gene-gene correlations, " + kind);
}

// calibration
{
  const all = Object.entries(data.calibration);
  all.forEach(([name], i) => {  // all places first, so that each has its width when it is drawn in
    const figure = make("figure", null, at("pit"));
    make("div", null, figure, { class: "plot", id: "pit-" + i, role: "img" });
    make("figcaption", name, figure);
  });
  all.forEach(([name, c], i) => {
    const x = c.pit.map((_, k) => (k + .5) / c.pit.length);
    draw("pit-" + i, [["all genes", c.pit, "#0b5fa5"], ["in more than 20% of cells", c.pit_common, "#d1570a"]].map(([n, y, color]) =>
      ({ x, y, name: n, type: "scatter", mode: "lines+markers", line: { shape: "hvh", color } })),
      { xaxis: { title: { text: "randomised PIT" }, range: [0, 1] }, yaxis: { title: { text: "density" }, rangemode: "tozero" },
        shapes: [{ type: "line", x0: 0, x1: 1, y0: 1, y1: 1, line: { dash: "dot", color: "#57606a" } }] }, "Histogram of the PIT of " + name);
  });
  const body = heads("coverage", ["Method", "interval", "PIT coverage", "genes in > 20% of cells", "closed interval", "width", "CRPS",
    "[0, 0] covers", "its CRPS", "group means"]), percent = v => v === null ? "" : (100 * v).toFixed(1) + "%";
  const crps = Object.fromEntries(data.scores.map(s => [s.name, s.crps]));
  Object.entries(facts.calibration || {}).forEach(([name, c]) => Object.keys(c.coverage).forEach(level => {
    const row = make("tr", null, body);
    make("th", name, row, { scope: "row" });
    [percent(Number(level)), percent(c.coverage[level]), percent(c.coverage_common[level]), percent(c.closed[level]),
      c.width[level].toFixed(3), crps[name].toFixed(4), percent(c.empty), c.empty_crps.toFixed(4), percent(c.group_means[level])].forEach(t => make("td", t, row));
  }));
  const bins = (edges, below, above) => [...edges.map(e => below + e), above + edges.at(-1)];
  Object.entries(facts.calibration || {}).forEach(([name, c], i) => {
    if (!i) {
      const head = make("tr", null, make("thead", null, at("strata")));
      ["Method", "interval", ...bins(c.total_edges.map(Math.ceil), "counts < ", "counts ≥ "), ...bins(c.level_edges, "level ≤ ", "level > ")]
        .forEach(t => make("th", t, head, { scope: "col" }));
    }
    const body = make("tbody", null, at("strata"));
    const add = (what, values) => {
      const row = make("tr", null, body);
      make("th", name, row, { scope: "row" });
      [what, ...values.map(percent)].forEach(t => make("td", t, row));
    };
    Object.keys(c.by_total).forEach(level => add(percent(Number(level)), [...c.by_total[level], ...c.by_level[level]]));
    add("share of values", [...c.by_total["0.5"].map(() => null), ...c.level_shares]);
  });
}

// gallery
at("gallery-what").textContent = data.gallery.length ? "Cells by their energy score. Stains in blue, green, red: " +
  data.gallery[0].stains.join(", ") + ". The five genes highest in truth, true and predicted."
  : "No store was given, or its cells are others, so there are no images.";
for (const kind of ["best", "median", "worst"]) {
  const some = data.gallery.filter(c => c.kind === kind);
  if (!some.length) continue;
  make("h3", kind, at("cards"));
  const cards = make("div", null, at("cards"), { class: "cards" });
  some.forEach(c => {
    const card = make("article", null, cards);
    make("img", null, card, { src: "data:image/png;base64," + c.image, alt: "Crop around cell " + c.cell });
    make("div", c.cell + ": " + c.score + ", " + c.counts + " counts", card);
    const table = make("table", null, card);
    c.genes.forEach(([g, t, p]) => { const row = make("tr", null, table); make("th", g, row, { scope: "row" }); make("td", t.toFixed(2), row); make("td", p.toFixed(2), row); });
  });
}

// facts
tell(facts);
const fitted = facts.regressor || {}, start = fitted.encoder_weights || {};
if (fitted.config) tell({
  "regressor: epochs": fitted.config.epochs,
  "regressor: encoder started from": start.file || start.name || "nothing pretrained"
});
