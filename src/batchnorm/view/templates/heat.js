// The maps of layers by steps: one is shown, and a click on a cell leads to its layer and step.

function heatRows(name) {
  const { layers, steps, maps } = run.heat;
  const values = unpack(maps[name].values), broken = maps[name].broken;
  const width = steps.length > 1 ? steps.at(-1) - steps.at(-2) : 1;
  return layers.flatMap((layer, index) => steps.map((step, t) => {
    const i = index * steps.length + t;
    return { layer, index, step, until: steps[t + 1] ?? step + width, value: finite(values[i]), broken: broken[i] || 0 };
  }));
}
if ($("heat-map")) {
  for (const name of Object.keys(run.heat.maps)) {
    SOURCES[`heat_${name}`] = () => heatRows(name);
    drawn[`heat_${name}`] = (view) => view.addEventListener("click", (_, item) => {
      if (!item?.datum?.layer && item?.datum?.layer !== "") return;
      state.at = nearest(run.steps, item.datum.step);
      pick(run.layers.findIndex((layer) => layer.name === item.datum.layer), 0);
      $("panels")?.scrollIntoView();
    });
  }
  $("heat-map").addEventListener("change", (event) =>
    document.querySelectorAll("[data-map]").forEach((map) => (map.hidden = map.dataset.map !== event.target.value)));
}
