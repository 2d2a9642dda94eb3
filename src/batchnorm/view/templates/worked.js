// One step by hand: the recorded step nearest to the reader's, line by line.

const worked = { quantity: "gamma", chosen: null }; // the step that the reader chose; null: the one nearest to theirs
const exact = (value) => (value === null ? "not finite" : Number(value.toPrecision(7)).toString().replaceAll("-", "−"));
const symbol = () => (worked.quantity === "gamma" ? "γ" : "β");

function cell(tag, said, kind) {
  const made = document.createElement(tag);
  made.textContent = said;
  if (kind) made.className = kind;
  return made;
}
function termRow([name, formula, numbers, value]) {
  const row = document.createElement("tr");
  const kind = name === "gradient" ? "gradient" : /^(gamma|beta) (before|after)$/.test(name) ? "learned" : "";
  row.append(cell("th", name, kind), cell("td", formula || "recorded"), cell("td", numbers.replaceAll("-", "−")), cell("td", exact(value), kind));
  row.firstChild.scope = "row";
  return row;
}
function showWorked() {
  const found = run.worked[state.layer];
  const steps = found ? found.steps : [];
  if (!steps.includes(worked.chosen)) worked.chosen = null;
  const at = steps.length ? (worked.chosen === null ? nearest(steps, run.steps[state.at]) : steps.indexOf(worked.chosen)) : -1;
  $("worked-step").replaceChildren(...steps.map((step, i) => new Option(spelled(step), step, false, i === at)));
  const each = at < 0 ? null : found[worked.quantity][state.place]?.[at];
  $("worked-terms").replaceChildren(...(each ? each.terms.map(termRow) : []));
  if (!each) {
    $("worked-about").textContent = "";
    $("worked-said").textContent = `No step is worked out here for ${symbol()} of this channel; the first channels of the list have some.`;
    return;
  }
  const { name } = run.layers[state.layer];
  $("worked-about").textContent =
    `${name || "(the model itself)"}, channel ${run.layers[state.layer].channels[state.place]}: ${each.optimizer}, learning rate ${exact(each.lr)}`;
  const met = `The batch after step ${spelled(steps[at])} meets ${symbol()} = ${exact(each.recorded)}, as the optimizer left it (${each.dtype})`;
  const closes = each.predicted === null ? "" : `; the arithmetic gives ${exact(each.predicted)}`;
  $("worked-said").textContent = `${each.note ? `${each.note} ` : ""}${met}${closes}.`;
}
if ($("worked-step")) {
  $("worked-step").addEventListener("change", (event) => {
    worked.chosen = +event.target.value;
    showWorked();
  });
  document.querySelectorAll("[name=worked]").forEach((radio) => radio.addEventListener("change", () => {
    worked.quantity = radio.value;
    showWorked();
  }));
  followers.push(showWorked);
}
