// The step player: play, pause, speed, and the keys.

const TICK_MS = 480; // a step at speed 1

let playing = 0;
function play() {
  if (state.at >= run.steps.length - 1) go(0);
  playing = setInterval(() => {
    if (state.at >= run.steps.length - 1) return pause();
    return go(state.at + 1);
  }, TICK_MS / Number($("speed").value));
  said(true);
}
function pause() {
  if (!playing) return;
  clearInterval(playing);
  playing = 0;
  remember(); // not at every step: browsers limit how often the address may change
  said(false);
}
function said(on) {
  $("play").textContent = on ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", String(on));
}
const toggle = () => (playing ? pause() : play());

// Keys that an element of the page does not need itself.
const TAKEN = "input, select, textarea, [contenteditable]";
function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest(TAKEN)) return;
  const isSpace = event.key === " " && !event.target.closest("button, summary, a");
  const moves = { ArrowRight: () => go(state.at + 1), ArrowLeft: () => go(state.at - 1), Home: () => go(0), End: () => go(run.steps.length - 1) };
  if (isSpace) toggle();
  else if (event.key in moves && !event.shiftKey) {
    pause();
    moves[event.key]();
  } else return;
  event.preventDefault();
}
