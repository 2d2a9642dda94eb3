// The numbers of the table, and what the reader does: steps, batches, layers, channels, the address.

function text(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  const said = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : value.toFixed(size < 10 ? 3 : size < 100 ? 2 : 1);
  return said.replaceAll("-", "−");
}
const signed = (value) => (value > 0 ? "+" : "") + text(value);
const bracketed = (value) => (value < 0 ? `(${text(value)})` : text(value)); // after a sign of the formula
function put(id, value, say = text) {
  const element = $(id);
  const said = say(value);
  if (element.textContent !== said && element.textContent) {
    element.classList.remove("moved");
    void element.offsetWidth; // restarts the flash
    element.classList.add("moved");
  }
  element.textContent = said;
  element.value = value === null || value === undefined ? "" : String(value);
}

// What the layer used on a batch: of training (batch 0) or, with the same weights, the k-th probe.
function numbers(at, batch) {
  const layer = run.layers[state.layer];
  const measured = (name) => (batch ? probed(name, probe(), batch) : column(name, at));
  const all = { batch_mean: measured("batch_mean"), batch_var: measured("batch_var") };
  for (const name of ["running_mean", "running_var"]) all[name] = layer.tracks ? column(name, at) : null;
  for (const name of ["gamma", "beta", "gamma_grad", "beta_grad"]) all[name] = layer.affine ? column(name, at) : null;
  if (batch) all.gamma_grad = all.beta_grad = null; // no backward pass ran on a probe batch
  all.batch_std = Math.sqrt(all.batch_var);
  all.running_std = all.running_var === null ? null : Math.sqrt(all.running_var);
  return all;
}
const spelled = (step) => step.toLocaleString("en");
const AFTER_SIGN = ["mean", "xhat-again", "beta"];
const CHANGING = ["batch_mean", "batch_std", "running_mean", "running_std", "gamma", "beta"];

function table() {
  const layer = run.layers[state.layer];
  const { at, batch } = state;
  const now = numbers(at, batch);
  const before = batch > 1 ? numbers(at, batch - 1) : batch ? numbers(at, 0) : at ? numbers(at - 1, 0) : null;
  for (const name of [...CHANGING, "gamma_grad", "beta_grad"]) put(`now-${name}`, now[name]);
  for (const name of CHANGING) put(`change-${name}`, before && now[name] !== null ? now[name] - before[name] : null, signed);
  const step = spelled(run.steps[at]);
  $("where").textContent = `${step} of ${spelled(run.steps.at(-1))}`;
  $("now-head").textContent = batch ? `probe batch ${batch} of ${batches()}, same weights` : `now: the batch of step ${step}`;
  $("change-head").textContent = batch > 1 ? `against batch ${batch - 1}` : batch ? "against the training batch" : at ? `change since step ${spelled(run.steps[at - 1])}` : "change";
  $("said").textContent = batch ? "Another batch, same weights: measured anew; γ and β stand still." : "";

  const x = Number($("x").value);
  const xhat = (x - now.batch_mean) / Math.sqrt(now.batch_var + layer.eps);
  const gamma = layer.affine ? now.gamma : 1;
  const beta = layer.affine ? now.beta : 0;
  const line = { mean: now.batch_mean, var: now.batch_var, xhat, "xhat-again": xhat, gamma, beta, y: gamma * xhat + beta };
  for (const [name, value] of Object.entries(line)) put(`line-${name}`, value, AFTER_SIGN.includes(name) ? bracketed : text);
  put("undo-gamma", Math.sqrt(now.batch_var + layer.eps));
  put("undo-beta", now.batch_mean);
  put("pair-gamma", gamma);
  put("pair-beta", beta);
}
const batches = () => {
  const layer = run.layers[state.layer];
  let count = layer.batches; // unlike probes are padded with NaN
  while (count && Number.isNaN(probed("batch_var", probe(), count)) && Number.isNaN(probed("batch_mean", probe(), count))) count--;
  return count;
};

// Where the buttons lead: shown steps may lie apart, and only some were probed.
function label() {
  const apart = run.steps[state.at + 1] - run.steps[state.at]; // NaN at the end
  $("next").disabled = state.at === run.steps.length - 1;
  $("next").textContent = apart > 1 ? `Next shown step, +${spelled(apart)}` : "Next step";
  $("next").title = apart > 1
    ? `This page shows no step before step ${spelled(run.steps[state.at + 1])}: by then the optimizer has moved γ and β ${spelled(apart)} times`
    : "The next step: the optimizer has moved γ and β";
  $("another").disabled = !run.probe_steps.length;
  if (run.probe_steps.length) $("another").textContent = `Another batch (step ${spelled(run.probe_steps[probe()])})`;
  else $("another").title = "This run holds no probe batches; w.probe(batches) records them";
}

let asked = 0;
function show() {
  $("step").value = state.at;
  label();
  table();
  cancelAnimationFrame(asked);
  asked = requestAnimationFrame(() => views.forEach((view, name) => seen.has(name) && move(view)));
  const { layer, place, at, batch } = state;
  const where = new URLSearchParams({ layer, channel: run.layers[layer].channels[place], step: run.steps[at], batch });
  history.replaceState(null, "", `#${where}`);
}
function go(at) {
  state.at = Math.max(0, Math.min(run.steps.length - 1, at));
  state.batch = 0;
  show();
}
function another() {
  if (!state.batch) state.at = nearest(run.steps, run.probe_steps[probe()]);
  state.batch = (state.batch % batches()) + 1;
  show();
}
function pick(layer, place) {
  Object.assign(state, { layer, place, batch: 0 });
  const { size, kind, momentum, moved, affine, tracks } = run.layers[layer];
  $("layer").value = layer;
  options();
  $("channel").value = place;
  $("momentum").textContent = momentum === null ? "none: plain average" : momentum;
  const first = layer === run.first.layer && place === run.first.place;
  const order = first ? " · shown first: its batches differ, and its γ and β moved far" : " · channels listed from most to least moved";
  const kept = `${affine ? 2 * size : 0} learned and ${tracks ? 2 * size : 0} tracked numbers`;
  $("about").textContent = `${kind}, ${size} channel${size > 1 ? "s" : ""}: ${kept}${moved ? order : ""}`;
  const start = numbers(0, 0);
  const x = start.batch_mean + start.batch_std;
  $("x").value = Number.isFinite(x) ? x.toPrecision(2) : 1;
  reload();
  show();
}
function fromAddress() {
  const where = new URLSearchParams(location.hash.slice(1));
  const number = (name) => (where.has(name) && Number.isInteger(+where.get(name)) ? +where.get(name) : -1);
  const layer = number("layer") in run.layers ? number("layer") : run.first.layer;
  const place = run.layers[layer].channels.indexOf(number("channel"));
  state.at = nearest(run.steps, where.has("step") ? number("step") : run.first.step);
  pick(layer, place >= 0 ? place : layer === run.first.layer ? run.first.place : 0);
  const batch = number("batch");
  if (run.probe_steps.length && batch > 0 && batch <= batches()) {
    state.batch = batch;
    show();
  }
}

// New data of the same run: the reader keeps layer, channel and step, or stays at the end.
const options = () => $("channel").replaceChildren(...run.layers[state.layer].channels.map((channel, i) => new Option(channel, i)));
const atEnd = () => !state.batch && state.at === run.steps.length - 1;
let wanted = null, kept = null; // the step that the reader chose, and the one shown in its place, which may lie beside it
function renew(data) {
  const follows = atEnd(), step = run.steps[state.at], channel = run.layers[state.layer]?.channels[state.place];
  if (step !== kept) wanted = step;
  Object.assign(run, data);
  unpacked.clear();
  version += 1;
  if (!$("panels")) return views.forEach((view, name) => seen.has(name) && move(view));
  state.at = follows ? run.steps.length - 1 : nearest(run.steps, wanted);
  kept = run.steps[state.at];
  state.place = Math.max(0, run.layers[state.layer].channels.indexOf(channel));
  $("step").max = run.steps.length - 1;
  options();
  $("channel").value = state.place;
  if (state.batch > batches()) state.batch = 0;
  return show();
}

const addressed = location.hash.includes("step="); // the reader came for a certain step
if ($("panels")) {
  run.layers.forEach((layer, i) => $("layer").append(new Option(layer.name || "(the model itself)", i)));
  $("layer").addEventListener("change", () => pick(+$("layer").value, 0));
  $("channel").addEventListener("change", () => pick(state.layer, +$("channel").value));
  $("step").addEventListener("input", () => go(+$("step").value));
  $("next").addEventListener("click", () => go(state.at + 1));
  $("another").addEventListener("click", another);
  $("x").addEventListener("input", table);
  fromAddress();
}
document.querySelectorAll(".chart").forEach((element) => watcher.observe(element));
globalThis.batchnorm = { views, state, run, go, atEnd, addressed, renew }; // for tests and the curious
