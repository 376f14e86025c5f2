const facts = data.facts, ranking = data.ranking;
const show = (v, digits) => v === null ? "" : v !== 0 && Math.abs(v) < 10 ** -digits ? v.toExponential(0) : v.toFixed(digits);
at("what").textContent = number(facts.n_treatments) + " treatments in " + number(facts.n_wells) + " wells of " + number(facts.n_cells) +
  " cells, " + number(facts.n_genes) + " predicted genes, against " + facts.control;
at("criterion").textContent = "Ordered by p, then by activity. Activity is the mean over genes of the squared t statistic of the change, " +
  "over what it is when labels of the treatment's and the control's wells are exchanged at random within plates (1 is nothing); p is the share of " +
  number(facts.permutations) + " exchanges that give as much, q corrects it for the number of treatments (Benjamini and Hochberg). " +
  "Genes are those with q below " + facts.q_limit + " over all treatments and genes together. A change of predicted expression is a change of the images, said in genes.";

// ranking
{
  const map = ranking.some(r => r.map !== undefined);
  const body = heads("ranking-table", ["Treatment", "Rank", "activity", "p", "q", "wells", "cells", "genes", ...map ? ["mAP", "q of mAP"] : [], "most certain genes"]);
  const most = 50;
  const filter = () => {
    const wanted = at("search").value.trim().toLowerCase();
    const hits = ranking.map((r, i) => [r, i]).filter(([r]) => r.treatment.toLowerCase().includes(wanted));
    body.replaceChildren();
    hits.slice(0, most).forEach(([r, i]) => {
      const row = make("tr", null, body, r.q < facts.q_limit ? { class: "mine" } : {});
      make("button", r.treatment, make("td", null, row), { type: "button" }).addEventListener("click", () => {
        choose(i); at("treatment").scrollIntoView(); at("choice").focus({ preventScroll: true }); });
      [i + 1, show(r.activity, 2), show(r.p, 4), show(r.q, 4), r.n_wells, number(r.n_cells), r.n_genes,
        ...map ? [show(r.map, 3), show(r.map_q, 4)] : [], r.top_genes].forEach(t => make("td", t, row));
    });
    at("found").textContent = hits.length + " of " + ranking.length + " treatments" +
      (ranking.length < facts.n_treatments ? " that come first, the others are in ranking.csv" : "") + (hits.length > most ? ", the first " + most + " shown" : "");
  };
  at("search").addEventListener("input", filter);
  filter();
}

// one treatment
const geneBody = heads("gene-table", ["Gene", "change", "95% interval", "p", "q"]);
function choose(i) {
  at("choice").value = i;
  const r = ranking[i], genes = data.genes[i], few = genes.slice(0, 15).reverse();
  at("chosen").textContent = "activity " + show(r.activity, 2) + ", q " + show(r.q, 4) + ", rank " + (i + 1) + " of " + facts.n_treatments;
  const [names, change, low, high, , q] = [0, 1, 2, 3, 4, 5].map(k => few.map(g => g[k]));
  draw("genes", [{ type: "scatter", mode: "markers", x: change, y: names.map((_, k) => k), hovertext: names, hoverinfo: "text+x",
    marker: { size: 9, color: "#0b5fa5", symbol: q.map(v => v < facts.q_limit ? "circle" : "circle-open") },
    error_x: { type: "data", symmetric: false, array: high.map((v, k) => v - change[k]), arrayminus: low.map((v, k) => change[k] - v), color: "#57606a" } }],
    { title: { text: r.treatment }, xaxis: { title: { text: "change" }, zeroline: true },
      yaxis: { tickmode: "array", tickvals: names.map((_, k) => k), ticktext: names } },
    "Changes of the most certain genes of " + r.treatment);
  geneBody.replaceChildren();
  genes.forEach(g => {
    const row = make("tr", null, geneBody, g[5] < facts.q_limit ? { class: "mine" } : {});
    [g[0], show(g[1], 3), show(g[2], 3) + " to " + show(g[3], 3), show(g[4], 4), show(g[5], 4)].forEach(t => make("td", t, row));
  });
}
ranking.forEach((r, i) => make("option", r.treatment, at("choice"), { value: i }));
at("choice").addEventListener("change", () => choose(Number(at("choice").value)));
choose(0);

// gene sets
at("sets-what").textContent = data.sets.length ? "t of the slope of the genes' statistics on their weights in each set (univariate linear model), " +
  "against the other predicted genes; a star where q, from the same exchanges of labels, is below " + facts.q_limit + ". The sets that move most, of the first treatments."
  : "No gene sets were given (--gene-sets).";
data.sets.forEach((s, i) => {
  const figure = make("figure", null, at("set-plots"));
  make("div", null, figure, { class: "plot", id: "set-" + i, role: "img", style: "height: " + (160 + 18 * s.sets.length) + "px" });
  make("figcaption", s.name, figure);
  const top = Math.max(...s.score.flat().map(Math.abs));
  draw("set-" + i, [{ type: "heatmap", x: s.treatments, y: s.sets, z: s.score, zmin: -top, zmax: top, colorscale: "RdBu", colorbar: { thickness: 8 },
    text: s.q.map(row => row.map(q => q < facts.q_limit ? "*" : "")), texttemplate: "%{text}" }],
    { xaxis: { type: "category" }, yaxis: { type: "category", autorange: "reversed", tickfont: { size: 10 } } }, "Scores of the gene sets of " + s.name);
});

// similarity
{
  const s = data.similarity;
  at("map-caption").textContent = "Correlation over genes of the changes of two treatments, like beside like" +
    (s.names.length < facts.n_treatments ? "; the first " + s.names.length + " of the ranking" : "") +
    ". All changes share the controls and their noise: read it among treatments of small q only.";
  draw("map", [{ type: "heatmap", x: s.names, y: s.names, z: s.values, zmin: -1, zmax: 1, colorscale: "RdBu", colorbar: { thickness: 8 } }],
    { xaxis: { type: "category", tickfont: { size: 9 } }, yaxis: { type: "category", autorange: "reversed", tickfont: { size: 9 } } }, "Similarity of the treatments");
}

// wells
{
  const w = data.wells.map(([well, treatment, cells, score, apart, fitted]) => ({ well, treatment, cells, score, apart, fitted })), apart = w.filter(x => x.apart);
  const fitted = w.filter(x => x.fitted).length, known = w.some(x => x.score !== null);
  at("wells-what").textContent = (!known ? "The prediction has no ood_score, by which wells are set apart." : apart.length ? apart.length + " of " + w.length + " wells are set apart and count nowhere: their images lie too far from those that the model was trained on (score above "
    : "None of " + w.length + " wells is set apart (score above ") + (known ? show(facts.max_ood, 2) + ")." : "") +
    (fitted ? " The normalisation was fitted on " + fitted + " control wells, which count nowhere else." : "") +
    (facts.n_single ? " Not scored for having one well: " + facts.n_single + " treatments." : "");
  if (!known) at("wells-figure").hidden = true;
  else draw("strange", [["used", false, "#0b5fa5", "circle"], ["set apart", true, "#d1570a", "x"]].map(([name, is, color, symbol]) => {
    const some = w.map((x, i) => [x, i]).filter(([x]) => x.apart === is);
    return { name, type: "scatter", mode: "markers", x: some.map(([, i]) => i), y: some.map(([x]) => x.score), hoverinfo: "text+y",
      hovertext: some.map(([x]) => x.well + ", " + x.treatment), marker: { color, symbol, size: 7 } }; }),
    { xaxis: { title: { text: "wells, by plate" } }, yaxis: { title: { text: "ood_score" }, rangemode: "tozero" },
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: facts.max_ood, y1: facts.max_ood, line: { dash: "dot", color: "#57606a" } }] },
    "Out-of-distribution score of " + w.length + " wells, " + apart.length + " set apart");
  if (apart.length) {
    const body = heads("well-table", ["Well set apart", "treatment", "cells", "ood_score"]);
    apart.forEach(x => { const row = make("tr", null, body); [x.well, x.treatment, x.cells, show(x.score, 2)].forEach(t => make("td", t, row)); });
  }
}

tell(facts);
