// How many numbers share a mean in the layer and step that the reader is at.

if ($("shares-here")) {
  followers.push(() => {
    const { name, size, counts } = run.layers[state.layer];
    const count = counts[state.at];
    const means = `Layer ${name || "(the model itself)"}: C = ${spelled(size)}, so ${spelled(size)} mean${size > 1 ? "s" : ""}`;
    $("shares-here").textContent = count > 0 ? `${means}, each over N·S = ${spelled(count)} value${count > 1 ? "s" : ""} (step ${spelled(run.steps[state.at])}).` : `${means}.`;
  });
}
// Paper cannot be unfolded.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
