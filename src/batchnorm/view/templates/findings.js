// The findings: a layer's name leads to it on the first screen, and a remedy can be copied.

document.querySelectorAll(".pick").forEach((button) => button.addEventListener("click", () => {
  if (button.dataset.step) state.at = nearest(run.steps, +button.dataset.step);
  pick(+button.dataset.layer, 0);
  $("panels").scrollIntoView();
  $("layer").focus({ preventScroll: true });
}));

document.querySelectorAll(".copy").forEach((button) => {
  const card = button.closest(".finding");
  const code = card.querySelector("code"), said = card.querySelector(".copied");
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      said.textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(code);
      said.textContent = "Selected: now press Ctrl+C, on a Mac ⌘C.";
    }
  });
});

// The address says where the reader is: a link within the page must not write over it.
$("health").addEventListener("click", (event) => {
  const heading = $("findings");
  if (!heading) return;
  event.preventDefault();
  heading.scrollIntoView();
  heading.focus({ preventScroll: true });
});
