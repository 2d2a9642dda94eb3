// The table of measured, tracked and learned, and the worked line below it.

function text(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  const said = size < 1e-3 || size >= 1e5 ? value.toExponential(1) : value.toFixed(size < 10 ? 3 : size < 100 ? 2 : 1);
  return said.replaceAll("-", "−");
}
const signed = (value) => (value > 0 ? "+" : "") + text(value);
const bracketed = (value) => (value < 0 ? `(${text(value)})` : text(value)); // after a sign of the formula
const spelled = (step) => step.toLocaleString("en");
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

const AFTER_SIGN = ["mean", "xhat-again", "beta"];
const CHANGING = ["batch_mean", "batch_std", "running_mean", "running_std", "gamma", "beta"];
const inEval = () => state.mode === "eval" && run.layers[state.layer].tracks;

function table() {
  const { at, batch } = state;
  const now = numbers(at, batch);
  const before = batch > 1 ? numbers(at, batch - 1) : batch ? numbers(at, 0) : at ? numbers(at - 1, 0) : null;
  for (const name of CHANGING) put(`now-${name}`, now[name]);
  for (const name of CHANGING) put(`change-${name}`, before && now[name] !== null ? now[name] - before[name] : null, signed);
  const step = spelled(run.steps[at]);
  $("where").textContent = `${step} of ${spelled(run.steps.at(-1))}`;
  $("step").setAttribute("aria-valuetext", `step ${step} of ${spelled(run.steps.at(-1))}`);
  $("now-head").textContent = batch ? `probe batch ${batch} of ${batches()}, same weights` : `now: the batch of step ${step}`;
  const change = batch > 1 ? `against batch ${batch - 1}` : batch ? "against the training batch" : at ? `change since step ${spelled(run.steps[at - 1])}` : "change";
  $("change-head").textContent = change;
  document.querySelectorAll("td.change .label").forEach((label) => (label.textContent = change));
  pushed(now);
  line(now);
}

// What became of the gradient: the change that it made comes after it, at the next step.
function pushed(now) {
  put("now-gamma_grad", now.gamma_grad);
  put("now-beta_grad", now.beta_grad);
  const { at, batch } = state;
  let said = ".";
  if (!run.layers[state.layer].affine) said = ": this layer has no γ and β.";
  else if (batch) said = ": none. No backward pass runs on a probe batch, so nothing moves γ and β.";
  else if (at + 1 < run.steps.length) {
    const next = numbers(at + 1, 0), moves = run.steps[at + 1] - run.steps[at];
    const moved = `γ by ${signed(next.gamma - now.gamma)} and β by ${signed(next.beta - now.beta)}`;
    said = moves === 1
      ? `. From them the optimizer moves ${moved} for the next batch.`
      : `. They and the gradients of ${spelled(moves - 1)} more ${moves === 2 ? "step" : "steps"} move ${moved} up to step ${spelled(run.steps[at + 1])}.`;
  }
  $("pushed").textContent = said;
}

function line(now) {
  const layer = run.layers[state.layer];
  const [mean, variance] = inEval() ? [now.running_mean, now.running_var] : [now.batch_mean, now.batch_var];
  const typed = $("x").value.trim(), x = Number(typed);
  $("formula").hidden = typed === "";
  for (const id of ["line-mean", "line-var"]) $(id).className = inEval() ? "tracked" : "measured";
  const xhat = (x - mean) / Math.sqrt(variance + layer.eps);
  const gamma = state.would.gamma ?? (layer.affine ? now.gamma : 1);
  const beta = state.would.beta ?? (layer.affine ? now.beta : 0);
  const all = { x, mean, var: variance, xhat, "xhat-again": xhat, gamma, beta, y: gamma * xhat + beta };
  for (const [name, value] of Object.entries(all)) put(`line-${name}`, value, AFTER_SIGN.includes(name) ? bracketed : text);
  let said = "";
  if (typed === "") said = "Type a number for x.";
  else if (inEval()) said = "In eval nothing is measured: the tracked numbers stand in.";
  else if (state.mode === "eval") said = "This layer tracks nothing, so eval measures the batch, too.";
  else if (state.batch) said = "Another batch, same weights: measured anew; γ and β stand still.";
  $("said").textContent = said;
}

const batches = () => {
  const layer = run.layers[state.layer];
  let count = layer.batches; // unlike probes are padded with NaN
  while (count && Number.isNaN(probed("batch_var", probe(), count)) && Number.isNaN(probed("batch_mean", probe(), count))) count--;
  return count;
};
