// The channel strip: the channels of the chosen layer, sorted by |gamma|, at the step of the strip nearest to the reader's.

const DEAD = ["", "|γ| near 0", "shut by a ReLU"]; // see charts/strip.py
const stripAt = () => nearest(run.strip.steps, run.steps[state.at]);
const stripPlace = () => [state.layer, state.place, stripAt()].join();

function stripRows() {
  const strip = run.strip.layers[state.layer];
  if (!strip) return [];
  const at = stripAt() * strip.channels.length;
  const [gammas, betas] = [unpack(strip.gamma), unpack(strip.beta)];
  const held = run.layers[state.layer].channels;
  const rows = strip.channels.map((channel, i) => {
    const [gamma, beta] = [gammas[at + i], betas[at + i]];
    const size = Math.abs(gamma);
    const dead = DEAD[size < run.strip.near_zero ? 1 : beta < -run.strip.below * size ? 2 : 0];
    const place = held.indexOf(channel);
    return { channel, gamma: finite(gamma), beta: finite(beta), size: finite(size), dead, place, chosen: place === state.place };
  });
  rows.sort((a, b) => (a.size ?? Infinity) - (b.size ?? Infinity) || a.channel - b.channel);
  rows.forEach((row, i) => (row.rank = i + 1));
  return rows;
}
function aboutStrip() {
  const strip = run.strip.layers[state.layer];
  const { name, size } = run.layers[state.layer];
  if (!strip) return "This layer has affine=False: it has no γ and β.";
  const at = stripAt();
  const some = strip.channels.length < size ? `, ${strip.channels.length} of them drawn` : "";
  return `Layer ${name || "(the model itself)"} at step ${spelled(run.strip.steps[at])}: ${size} channels${some}; ` +
    `${strip.near_zero[at]} with |γ| below ${run.strip.near_zero}, ${strip.shut[at]} with β below −${run.strip.below} |γ|.`;
}
if ($("chart-strip")) {
  follows("strip", stripPlace, stripRows);
  const catchUp = drawn.strip;
  drawn.strip = (view) => {
    view.addEventListener("click", (_, item) => item?.datum?.place >= 0 && pick(state.layer, item.datum.place));
    catchUp();
  };
  followers.push(() => ($("strip-said").textContent = aboutStrip()));
}
