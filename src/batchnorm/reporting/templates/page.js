// Draws the charts from the page's data and lets the reader move through steps, batches, layers and channels.
"use strict";
(() => {
  const run = JSON.parse(document.getElementById("run-data").textContent);
  const $ = (id) => document.getElementById(id);
  const views = new Map(); // name of a chart -> its Vega view
  const STRIP = 140, AXIS = 70, GAP = 8; // px: see charts/panels.py
  const state = { layer: run.first.layer, place: run.first.place, at: 0, batch: 0 };

  // ---- data: columns of float32 in base64 -> numbers, and rows for Vega

  const unpacked = new Map();
  function unpack(text) {
    if (!unpacked.has(text)) {
      const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
      const view = new DataView(bytes.buffer);
      unpacked.set(text, Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true)));
    }
    return unpacked.get(text);
  }
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
  };

  // ---- charts

  const dark = matchMedia("(prefers-color-scheme: dark)");

  function sources(spec, found = new Set()) {
    if (spec && typeof spec === "object") {
      if (spec.data && spec.data.name in SOURCES) found.add(spec.data.name);
      Object.values(spec).forEach((part) => sources(part, found));
    }
    return found;
  }
  function sized(spec, width) {
    if (spec.hconcat) spec.hconcat[0].width = Math.max(120, width - STRIP - GAP - AXIS);
    else if (spec.facet) {
      spec.columns = Math.max(1, Math.min(Math.floor(width / 270), run.layers.length));
      spec.spec.width = Math.floor((width - 64) / spec.columns) - 18;
    } else Object.assign(spec, { width, autosize: { type: "fit-x", contains: "padding" } });
    return spec;
  }
  async function draw(name) {
    const place = $(`chart-${name}`);
    const spec = sized(structuredClone(run.specs[name]), place.clientWidth);
    const used = [...sources(spec)];
    spec.datasets = Object.fromEntries(used.map((source) => [source, SOURCES[source]()]));
    for (const parameter of spec.params || []) parameter.value = signals()[parameter.name];
    const old = views.get(name);
    const { view } = await vegaEmbed(place, spec, {
      mode: "vega-lite", actions: false, ast: true, renderer: "svg", defaultStyle: false, logLevel: 1,
      config: run.config[dark.matches ? "dark" : "light"], tooltip: { disableDefaultStyle: true },
    });
    if (old) old.finalize();
    view.used = used;
    view.moves = (spec.params || []).map((parameter) => parameter.name);
    views.set(name, view);
    note(name);
    move(view); // the reader may have moved on meanwhile
  }
  function note(name) {
    const quantity = { learned: "gamma", gamma_grad: "gamma_grad", beta_grad: "beta_grad" }[name];
    const place = $(`chart-${name}`);
    place.querySelector(".none")?.remove();
    if (!quantity || run.layers[state.layer].affine) return;
    const said = document.createElement("p");
    said.className = "none";
    said.textContent = "This layer has affine=False: it has no γ and β, so nothing is learned here and what goes out is always 0 ± 1.";
    place.append(said);
  }
  const signals = () => ({
    step: run.steps[state.at],
    batch: state.batch,
    probe: run.probe_steps.length ? run.probe_steps[probe()] : -1,
  });
  function move(view) {
    const all = signals();
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

  // ---- numbers

  function text(value) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    if (Number.isNaN(value)) return "NaN";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
    const size = Math.abs(value);
    const said = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : value.toFixed(size < 10 ? 3 : size < 100 ? 2 : 1);
    return said.replaceAll("-", "−");
  }
  function put(id, value, signed = false) {
    const element = $(id);
    const said = (signed && value > 0 ? "+" : "") + text(value);
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
  const CHANGING = ["batch_mean", "batch_std", "running_mean", "running_std", "gamma", "beta"];

  function table() {
    const layer = run.layers[state.layer];
    const { at, batch } = state;
    const now = numbers(at, batch);
    const before = batch > 1 ? numbers(at, batch - 1) : batch ? numbers(at, 0) : at ? numbers(at - 1, 0) : null;
    for (const name of [...CHANGING, "gamma_grad", "beta_grad"]) put(`now-${name}`, now[name]);
    for (const name of CHANGING) put(`change-${name}`, before && now[name] !== null ? now[name] - before[name] : null, true);
    const step = run.steps[at].toLocaleString("en");
    $("where").textContent = `${step} of ${run.steps.at(-1).toLocaleString("en")}`;
    $("now-head").textContent = batch ? `probe batch ${batch} of ${batches()}, same weights` : `now: the batch of step ${step}`;
    $("change-head").textContent = batch > 1 ? `against batch ${batch - 1}` : batch ? "against the training batch" : at ? `since step ${run.steps[at - 1].toLocaleString("en")}` : "change";
    $("said").textContent = batch ? "Another batch, same weights: measured anew; γ and β stand still." : "";

    const x = Number($("x").value);
    const xhat = (x - now.batch_mean) / Math.sqrt(now.batch_var + layer.eps);
    const gamma = layer.affine ? now.gamma : 1;
    const beta = layer.affine ? now.beta : 0;
    const line = { mean: now.batch_mean, var: now.batch_var, xhat, "xhat-again": xhat, gamma, beta, y: gamma * xhat + beta };
    for (const [name, value] of Object.entries(line)) put(`line-${name}`, value);
  }
  const batches = () => {
    const layer = run.layers[state.layer];
    let count = layer.batches; // unlike probes are padded with NaN
    while (count && Number.isNaN(probed("batch_var", probe(), count)) && Number.isNaN(probed("batch_mean", probe(), count))) count--;
    return count;
  };

  // ---- what the reader does

  let asked = 0;
  function show() {
    $("step").value = state.at;
    $("next").disabled = state.at === run.steps.length - 1;
    table();
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(() => views.forEach(move));
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
    const { channels, size, kind, momentum, moved } = run.layers[layer];
    $("layer").value = layer;
    $("channel").replaceChildren(...channels.map((channel, i) => new Option(channel, i)));
    $("channel").value = place;
    $("momentum").textContent = momentum === null ? "none: plain average" : momentum;
    const first = layer === run.first.layer && place === run.first.place;
    const order = first ? " · shown first: its batches differ, and its γ and β moved far" : " · channels listed from most to least moved";
    $("about").textContent = `${kind}, ${size} channel${size > 1 ? "s" : ""}${moved ? order : ""}`;
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

  if ($("panels")) {
    run.layers.forEach((layer, i) => $("layer").append(new Option(layer.name || "(the model itself)", i)));
    $("layer").addEventListener("change", () => pick(+$("layer").value, 0));
    $("channel").addEventListener("change", () => pick(state.layer, +$("channel").value));
    $("step").addEventListener("input", () => go(+$("step").value));
    $("next").addEventListener("click", () => go(state.at + 1));
    $("another").addEventListener("click", another);
    $("another").disabled = !run.probe_steps.length;
    if (!run.probe_steps.length) $("another").title = "This run holds no probe batches";
    $("x").addEventListener("input", table);
    fromAddress();
  }

  // ---- drawing: the first screen at once, the rest as it comes into view

  const watcher = new IntersectionObserver(
    (seen) => seen.filter((entry) => entry.isIntersecting).forEach(({ target }) => {
      watcher.unobserve(target);
      draw(target.id.replace("chart-", ""));
    }),
    { rootMargin: "300px" },
  );
  document.querySelectorAll(".chart").forEach((element) => watcher.observe(element));
  const redraw = () => [...views.keys()].forEach(draw);
  dark.addEventListener("change", redraw);
  let width = innerWidth, settle = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(settle);
    settle = setTimeout(redraw, 150);
  });
  globalThis.batchnorm = { views, state }; // for tests and the curious
})();
