// What the reader does: steps, batches, layers, channels, modes, the address.

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
  $("probeless").hidden = run.probe_steps.length > 0;
}

let asked = 0;
function show() {
  $("step").value = state.at;
  label();
  table();
  rest();
  cancelAnimationFrame(asked);
  asked = requestAnimationFrame(() => views.forEach((view, name) => seen.has(name) && move(view)));
  followers.forEach((follow) => follow());
  if (!playing) remember();
}
function remember() {
  const { layer, place, at, batch } = state;
  const where = new URLSearchParams({ layer, channel: run.layers[layer].channels[place], step: run.steps[at], batch });
  if (state.mode === "eval") where.set("mode", "eval");
  history.replaceState(null, "", `#${where}`);
}
function go(at) {
  state.at = Math.max(0, Math.min(run.steps.length - 1, at));
  state.batch = 0;
  state.would = {};
  show();
}
function another() {
  pause();
  state.would = {};
  if (!state.batch) state.at = nearest(run.steps, run.probe_steps[probe()]);
  state.batch = (state.batch % batches()) + 1;
  show();
}
function listChannels() {
  $("channel").replaceChildren(...run.layers[state.layer].channels.map((channel, i) => new Option(channel, i)));
  $("channel").value = state.place;
}
function pick(layer, place) {
  Object.assign(state, { layer, place, batch: 0, would: {} });
  const { size, kind, momentum, moved, affine, tracks } = run.layers[layer];
  $("layer").value = layer;
  listChannels();
  $("momentum").textContent = momentum === null ? "none: plain average" : momentum;
  const first = layer === run.first.layer && place === run.first.place;
  const order = first ? " · shown first: γ and β moved far here" : " · channels from most to least moved";
  const kept = `${affine ? 2 * size : 0} learned and ${tracks ? 2 * size : 0} tracked numbers`;
  $("about").textContent = `${kind}, ${size} channel${size > 1 ? "s" : ""}: ${kept}${moved ? order : ""}`;
  const start = numbers(0, 0);
  const x = start.batch_mean + start.batch_std;
  $("x").value = Number.isFinite(x) ? x.toPrecision(2) : 1;
  reload();
  show();
}
function turn(mode) {
  state.mode = mode;
  document.querySelector(`[name=mode][value=${mode}]`).checked = true;
  document.body.classList.toggle("in-eval", mode === "eval");
  show();
}
function fromAddress() {
  const where = new URLSearchParams(location.hash.slice(1));
  const number = (name) => (where.has(name) && Number.isInteger(+where.get(name)) ? +where.get(name) : -1);
  const layer = number("layer") in run.layers ? number("layer") : run.first.layer;
  const place = run.layers[layer].channels.indexOf(number("channel"));
  state.at = nearest(run.steps, where.has("step") ? number("step") : run.first.step);
  pick(layer, place >= 0 ? place : layer === run.first.layer ? run.first.place : 0);
  if (where.get("mode") === "eval") turn("eval");
  const batch = number("batch");
  if (run.probe_steps.length && batch > 0 && batch <= batches()) {
    state.batch = batch;
    show();
  }
}

// New data of the same run: the reader keeps layer, channel and step, or stays at the end.
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
  listChannels();
  if (state.batch > batches()) state.batch = 0;
  return show();
}

const addressed = location.hash.includes("step="); // the reader came for a certain step
if ($("panels")) {
  run.layers.forEach((layer, i) => $("layer").append(new Option(layer.name || "(the model itself)", i)));
  $("layer").addEventListener("change", () => pick(+$("layer").value, 0));
  $("channel").addEventListener("change", () => pick(state.layer, +$("channel").value));
  $("step").addEventListener("input", () => (pause(), go(+$("step").value)));
  $("next").addEventListener("click", () => (pause(), go(state.at + 1)));
  $("another").addEventListener("click", another);
  $("play").addEventListener("click", toggle);
  $("speed").addEventListener("change", () => playing && (pause(), play()));
  addEventListener("keydown", key);
  document.querySelectorAll("[name=mode]").forEach((radio) => radio.addEventListener("change", () => turn(radio.value)));
  for (const name of ["gamma", "beta"]) $(`would-${name}`).addEventListener("input", (event) => tryOut(name, +event.target.value));
  $("x").addEventListener("input", table);
  fromAddress();
}
document.querySelectorAll(".chart").forEach((element) => watcher.observe(element));
globalThis.batchnorm = { views, state, run, go, pick, atEnd, addressed, renew }; // for tests and the curious
