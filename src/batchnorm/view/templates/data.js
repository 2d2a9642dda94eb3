// The page's data: columns of float32 in base64 become numbers, and rows for Vega.

const run = JSON.parse(document.getElementById("run-data").textContent);
// Where the reader is. `mode` is the layer's: train or eval. `would` holds the gamma and beta that the reader tries out.
const state = { layer: run.first.layer, place: run.first.place, at: 0, batch: 0, mode: "train", would: {} };

const followers = []; // what else is to be done when the reader moves

const unpacked = new Map(); // forgotten when the run grows: the texts are others then
function once(kind, text, make) {
  const key = kind + text;
  if (!unpacked.has(key)) unpacked.set(key, make(Uint8Array.from(atob(text), (c) => c.charCodeAt(0))));
  return unpacked.get(key);
}
const unpackBytes = (text) => once("bytes ", text, (bytes) => bytes);
const unpack = (text) => once("", text, (bytes) => {
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
});
let version = 0; // of the data: a chart that was drawn from an older one is filled again when it moves
const finite = (value) => (Number.isFinite(value) ? value : null); // null leaves a gap in a chart
const nearest = (steps, step) =>
  steps.reduce((best, each, i) => (Math.abs(each - step) < Math.abs(steps[best] - step) ? i : best), 0);

const column = (name, at) => {
  const layer = run.layers[state.layer];
  return unpack(layer.columns[name])[at * layer.channels.length + state.place];
};
const probed = (name, p, batch) => {
  const layer = run.layers[state.layer];
  return unpack(layer.probes[name])[(p * layer.batches + batch - 1) * layer.channels.length + state.place];
};
const probe = () => nearest(run.probe_steps, run.steps[state.at]);

const ROLES = { measured: ["batch_mean", "batch_var"], learned: ["gamma", "beta"], gradient: ["gamma_grad", "beta_grad"] };
function traceRows() {
  const layer = run.layers[state.layer];
  const names = Object.keys(layer.columns);
  return run.steps.map((step, at) => {
    const row = { step };
    for (const name of names) row[name] = finite(column(name, at));
    const broken = (name) => row[name] === null && (layer.broken[name] || []).includes(at);
    row.broken = Object.keys(ROLES).filter((role) => ROLES[role].some(broken)).join(" ");
    return row;
  });
}
function probeRows() {
  const rows = [];
  run.probe_steps.forEach((step, p) => {
    const at = nearest(run.steps, step);
    for (let batch = 1; batch <= run.layers[state.layer].batches; batch++) {
      const row = { step, batch, gamma: finite(column("gamma", at)), beta: finite(column("beta", at)) };
      for (const name of ROLES.measured) row[name] = finite(probed(name, p, batch));
      if (row.batch_mean !== null || row.batch_var !== null) rows.push(row);
    }
  });
  return rows;
}
function bandRows(quantity) {
  const rows = [];
  run.layers.forEach((layer, index) => {
    if (!layer.bands[quantity]) return;
    const values = unpack(layer.bands[quantity]);
    run.band_steps.forEach((step, t) => {
      const row = { step, index, layer: layer.name };
      run.bands.forEach((name, b) => (row[name] = finite(values[t * run.bands.length + b])));
      rows.push(row);
    });
  });
  return rows;
}
const SOURCES = {
  trace: traceRows,
  probes: probeRows,
  gamma_bands: () => bandRows("gamma"),
  beta_bands: () => bandRows("beta"),
  curves: () => run.arms.curves,
  final: () => run.arms.final,
  pairs: () => run.arms.pairs,
  paper: () => run.paper,
};
