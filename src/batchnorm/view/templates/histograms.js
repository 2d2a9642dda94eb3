// Histograms of the channel in the probe batches: coming in they differ, going out they are alike.

const spreadAt = () => nearest(run.histograms.steps, run.steps[state.at]);
const spreadPlace = () => [state.layer, state.place, spreadAt()].join();

function spreadRows(role) {
  const found = run.histograms.layers[state.layer], layer = run.layers[state.layer];
  const { steps, edges, largest } = run.histograms;
  if (!found) return [];
  const p = spreadAt(), at = nearest(run.steps, steps[p]), q = nearest(run.probe_steps, steps[p]);
  const gamma = layer.affine ? column("gamma", at) : 1, beta = layer.affine ? column("beta", at) : 0;
  const shares = unpackBytes(found.shares), bins = edges.length - 1;
  const rows = [];
  for (let b = 0; b < Math.min(found.batches, layer.batches); b++) {
    const start = ((p * found.batches + b) * layer.channels.length + state.place) * bins;
    if (shares[start] > largest) continue; // missing
    const middle = role === "measured" ? probed("batch_mean", q, b + 1) : beta;
    const scale = role === "measured" ? Math.sqrt(probed("batch_var", q, b + 1) + layer.eps) : gamma;
    if (!Number.isFinite(middle) || !Number.isFinite(scale) || scale === 0) continue;
    // Two bins make one: batches are small, and their histograms rough.
    const density = (i) => ((shares[start + i] / largest) ** 2 + (shares[start + i + 1] / largest) ** 2) / Math.abs(scale);
    for (let i = 0; i <= bins; i += 2) {
      // Under a negative scale the bins come the other way round: the left edge of each is its upper one.
      const bin = scale > 0 ? Math.min(i, bins - 2) : Math.max(i - 2, 0);
      rows.push({ batch: b + 1, value: middle + scale * edges[i], floor: -(b + 1), top: density(bin), middle });
    }
  }
  const highest = Math.max(...rows.map(({ top }) => top));
  for (const row of rows) row.top = row.floor + 0.9 * row.top / highest;
  return rows;
}
if ($("chart-spread_in")) {
  follows("spread_in", spreadPlace, () => spreadRows("measured"));
  follows("spread_out", spreadPlace, () => spreadRows("learned"));
  followers.push(() => {
    const step = run.histograms.steps[spreadAt()], found = run.histograms.layers[state.layer];
    const bins = run.histograms.edges.length - 1;
    const missing = !found || unpackBytes(found.shares)[state.place * bins] > run.histograms.largest;
    $("spread-said").textContent = missing
      ? "Of this channel no histogram was recorded; of the first one in the list there is."
      : `Layer ${run.layers[state.layer].name || "(the model itself)"}, channel ${run.layers[state.layer].channels[state.place]}: probe batches with the weights of step ${spelled(step)}.`;
  });
}
