// What would go out: with a gamma and beta of the reader's, which snap back, or in eval.

const BACK_MS = 1600; // how long a tried value stays after the reader's last move

// The bar beside the chosen step in the panel of what goes out; null where what goes out is what went out.
function would() {
  const none = { would_lo: null, would_mid: null, would_hi: null };
  if (!run.steps.length) return none;
  const now = numbers(state.at, state.batch);
  const tried = "gamma" in state.would || "beta" in state.would;
  if (!tried && !inEval()) return none;
  const gamma = state.would.gamma ?? now.gamma ?? 1, beta = state.would.beta ?? now.beta ?? 0;
  let middle = beta, reach = Math.abs(gamma);
  if (inEval()) {
    const std = Math.sqrt(now.running_var + run.layers[state.layer].eps);
    middle += gamma * (now.batch_mean - now.running_mean) / std;
    reach *= now.batch_std / std;
  }
  return { would_lo: middle - reach, would_mid: middle, would_hi: middle + reach };
}

let settling = 0;
function tryOut(name, value) {
  state.would[name] = value;
  clearTimeout(settling);
  settling = setTimeout(snapBack, BACK_MS);
  $("would-said").textContent = inEval()
    ? "Dashed bar: what would go out in eval."
    : `Dashed bar: every batch would go out with mean ${text(state.would.beta ?? numbers(state.at, 0).beta)} and std ${text(Math.abs(state.would.gamma ?? numbers(state.at, 0).gamma))}.`;
  show();
}
function snapBack() {
  clearTimeout(settling);
  const tried = Object.keys(state.would).length;
  state.would = {};
  if (!tried) return;
  $("would-said").textContent = "Back again. That was not learning: learning moves γ and β by −learning rate · gradient, step by step.";
  show();
}
// The sliders stand at the values of the step; their reach is that of the channel over the whole run.
function rest() {
  const layer = run.layers[state.layer], now = numbers(state.at, state.batch);
  for (const name of ["gamma", "beta"]) {
    const slider = $(`would-${name}`);
    slider.disabled = !layer.affine || !Number.isFinite(now[name]);
    if (name in state.would || slider.disabled) continue;
    const all = run.steps.map((_, at) => column(name, at)).filter(Number.isFinite);
    const reach = 1 + 0.25 * (Math.max(...all) - Math.min(...all));
    Object.assign(slider, { min: Math.min(...all) - reach, max: Math.max(...all) + reach, value: now[name] });
    slider.setAttribute("aria-valuetext", `${name} ${text(now[name])}`);
  }
}
