// The charts: drawn as they come into view, and moved with the reader.

const $ = (id) => document.getElementById(id);
const views = new Map(); // name of a chart -> its Vega view
const drawn = {}; // name of a chart -> what else is to be done with a new view
const seen = new Set(); // the charts in view, or nearly: the others are moved when they come into view
const STRIP = 140, AXIS = 66, GAP = 16; // px: see charts/panels.py

const dark = matchMedia("(prefers-color-scheme: dark)"), paper = matchMedia("print");

function sources(spec, found = new Set()) {
  if (spec && typeof spec === "object") {
    if (spec.data && spec.data.name in SOURCES) found.add(spec.data.name);
    Object.values(spec).forEach((part) => sources(part, found));
  }
  return found;
}
function sized(spec, width) {
  if (spec.hconcat) spec.hconcat[0].width = Math.max(120, width - STRIP - GAP - AXIS);
  else if (spec.vconcat) spec.vconcat.forEach((part) => (part.width = Math.max(120, width - AXIS - GAP)));
  else if (spec.facet) {
    spec.columns = Math.max(1, Math.min(Math.floor(width / 270), run.layers.length));
    spec.spec.width = Math.floor((width - 64) / spec.columns) - 18;
  } else Object.assign(spec, { width, autosize: { type: "fit-x", contains: "padding" } });
  return spec;
}
async function draw(name) {
  const element = $(`chart-${name}`);
  const spec = sized(structuredClone(run.specs[name]), element.clientWidth);
  const used = [...sources(spec)];
  const { layer, place } = state, made = version;
  spec.datasets = Object.fromEntries(used.map((source) => [source, SOURCES[source]()]));
  for (const parameter of spec.params || []) parameter.value = signals()[parameter.name];
  const { view } = await vegaEmbed(element, spec, {
    mode: "vega-lite", actions: false, ast: true, renderer: "svg", defaultStyle: false, logLevel: 1,
    config: run.config[dark.matches ? "dark" : "light"], tooltip: { disableDefaultStyle: true },
  });
  views.get(name)?.finalize();
  view.title = name;
  document.body.classList.toggle("drawn-dark", dark.matches); // for paper, which is white
  element.querySelector("svg").setAttribute("aria-hidden", "true"); // the element's own label says what is drawn
  view.used = used;
  view.version = made;
  view.moves = (spec.params || []).map((parameter) => parameter.name);
  views.set(name, view);
  drawn[name]?.(view);
  note(name);
  // The reader may have moved on meanwhile.
  if (layer !== state.layer || place !== state.place) reload();
  move(view);
}
function note(name) {
  const element = $(`chart-${name}`);
  element.querySelector(".none")?.remove();
  if (!["learned", "gamma_grad", "beta_grad"].includes(name) || run.layers[state.layer].affine) return;
  const said = document.createElement("p");
  said.className = "none";
  said.textContent = "This layer has affine=False: it has no γ and β, so nothing is learned here and what goes out is always 0 ± 1.";
  element.append(said);
}
const signals = () => ({
  step: run.steps[state.at] ?? null,
  batch: state.batch,
  probe: run.probe_steps.length ? run.probe_steps[probe()] : -1,
  ...would(),
});
function move(view) {
  const all = signals();
  if (view.version !== version) return draw(view.title); // a view that is refilled grows and grows
  for (const name of view.moves) view.signal(name, all[name]);
  return view.runAsync();
}
function reload() {
  for (const [name, view] of views) {
    const own = view.used.filter((source) => source === "trace" || source === "probes");
    own.forEach((source) => view.data(source, SOURCES[source]()));
    note(name);
    if (own.length) view.runAsync();
  }
}

// A chart whose rows hang on more than layer and channel: they are made anew when `key`, where it stands, is another.
function follows(name, key, rows) {
  let shown = null;
  SOURCES[name] = () => ((shown = key()), rows());
  const catchUp = () => {
    const view = views.get(name);
    if (view && shown !== key()) view.data(name, SOURCES[name]()).runAsync();
  };
  followers.push(catchUp);
  drawn[name] = catchUp; // the reader may have moved on meanwhile
}

const begun = new Set();
const watcher = new IntersectionObserver(
  (entries) => entries.forEach(({ target, isIntersecting }) => {
    const name = target.id.replace("chart-", "");
    if (!isIntersecting) return seen.delete(name);
    seen.add(name);
    if (views.has(name)) return move(views.get(name));
    if (!begun.has(name)) draw(name);
    return begun.add(name);
  }),
  { rootMargin: "300px" },
);
// Paper has no scrolling: whoever prints gets every chart, at the step where the reader is.
function drawAll() {
  document.querySelectorAll(".chart").forEach((element) => {
    if (!element.checkVisibility()) return; // a map that is not chosen
    const name = element.id.replace("chart-", "");
    if (views.has(name)) move(views.get(name));
    else if (!begun.has(name)) draw(name);
    return begun.add(name);
  });
}
addEventListener("beforeprint", drawAll);
paper.addEventListener("change", ({ matches }) => matches && drawAll());
const redraw = () => [...views.keys()].forEach(draw);
dark.addEventListener("change", () => paper.matches || redraw());
let width = innerWidth, settle = 0;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  clearTimeout(settle);
  settle = setTimeout(redraw, 150);
});
