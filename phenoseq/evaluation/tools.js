const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const number = n => n.toLocaleString("en");
const make = (tag, text, parent, attributes = {}) => {
  const node = document.createElement(tag);
  if (text !== null) node.textContent = text;
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  if (parent) parent.append(node);
  return node;
};
const heads = (id, names) => {
  const row = make("tr", null, make("thead", null, at(id)));
  names.forEach(t => make("th", t, row, { scope: "col" }));
  return make("tbody", null, at(id));
};
const draw = (id, traces, layout, label) => {
  at(id).setAttribute("aria-label", label);
  const axis = { zeroline: false, automargin: true };
  Plotly.react(id, traces, { margin: { l: 50, r: 10, t: 30, b: 45 }, font: { size: 13 },
    legend: { orientation: "h", y: 1.12 }, ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis } },
    { responsive: true, displaylogo: false, displayModeBar: false });
};
const tell = facts => Object.entries(facts).filter(([, v]) => v === null || typeof v !== "object")
  .forEach(([k, v]) => { make("dt", k, at("facts")); make("dd", String(v), at("facts")); });
