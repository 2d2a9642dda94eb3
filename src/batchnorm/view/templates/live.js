// On a page that is served alone: the server says that the run has changed, the page fetches what it shows and renews it.

{
  const LEAST = 1500; // ms from one renewal to the next
  const SILENCE = 15000; // ms after which a server that says nothing is not heard any more: it speaks every 5 s
  const page = globalThis.batchnorm; // none while there is no run
  const FOLLOWS = `follows ${location.pathname}`; // whether the reader was at the end, over a reload
  const hearing = document.getElementById("hearing");
  const live = (root) => [...root.querySelectorAll("[data-live]")];
  const clock = () => new Date().toLocaleTimeString("en-GB");
  let events = null, told = null, shown = page ? page.run.version : document.body.dataset.version;
  let isBusy = false, heard = clock(), silence = 0, retry = 0;

  // What the page is made of; a run that has come to need another page gets it by loading that anew.
  const shape = (root, data) => JSON.stringify([live(root).map(({ id }) => id), data.shape]);
  async function renew() {
    const version = told;
    const here = page.run.layers[page.state.layer];
    const where = here ? { layer: here.name, channel: here.channels[page.state.place] } : {};
    const answer = await fetch(`news?${new URLSearchParams(where)}`);
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const { data, html } = await answer.json();
    if (!data) return location.reload();
    const fresh = new DOMParser().parseFromString(html, "text/html");
    if (shape(fresh, data) !== shape(document, page.run)) return location.reload();
    page.renew(data);
    for (const element of live(fresh)) {
      const old = document.getElementById(element.id);
      if (!old.isEqualNode(element)) old.replaceWith(document.importNode(element, true));
    }
    shown = version;
  }
  async function keepUp() {
    if (isBusy || told === shown) return;
    isBusy = true;
    const begun = performance.now();
    try {
      await renew();
      await new Promise(requestAnimationFrame); // drawn
    } catch (error) {
      lost();
    }
    // A page that is slow to draw is renewed less often.
    const spent = performance.now() - begun;
    setTimeout(() => ((isBusy = false), keepUp()), Math.max(LEAST, 2 * spent));
  }
  function lost() {
    hearing.textContent = `No word from the server since ${heard}: this page shows what was known then. It goes on when batchnorm serve runs again at this address.`;
    hearing.hidden = false;
    clearTimeout(retry);
    if (events?.readyState === EventSource.CLOSED) retry = setTimeout(listen, 2000); // refused, not only cut
  }
  function hear({ data }) {
    heard = clock();
    hearing.hidden = true;
    clearTimeout(silence);
    silence = setTimeout(lost, SILENCE);
    told = data;
    if (page) keepUp();
    else if (told !== shown) location.reload(); // there is a run now
  }
  function listen() {
    if (events) events.close();
    if (document.hidden) return; // nobody looks
    events = new EventSource("events");
    events.addEventListener("message", hear);
    events.addEventListener("error", lost);
  }
  document.addEventListener("visibilitychange", () => {
    clearTimeout(silence);
    if (document.hidden) events?.close();
    else listen();
  });
  if (page?.run.steps.length && document.getElementById("panels")) {
    const followed = sessionStorage.getItem(FOLLOWS) ?? (page.run.running && !page.addressed ? "yes" : "no");
    if (followed === "yes") page.go(page.run.steps.length - 1);
    addEventListener("pagehide", () => sessionStorage.setItem(FOLLOWS, page.atEnd() ? "yes" : "no"));
  }
  listen();
}
