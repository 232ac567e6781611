"use strict";
// Follows the list: after an event of a sweep, and from time to time, its tables are read again; what is marked stays.
(() => {
  const TABLES = "/list", PARTS = ["listed", "queue-and-gpus"];
  const LEAST = 5000, LONGEST = 60000, SHARE = 100; // milliseconds; each reader costs at most a hundredth of a core
  let timer = 0, restUntil = performance.now() + LEAST, isAsking = false, hasNews = false, events = null;

  const keyOf = (element) => [element.tagName, element.name, element.value, element.href].join(" ");

  // Replaces a part of the page; what is marked, has the focus or was scrolled stays so.
  const replace = (part, next) => {
    const marked = [...part.querySelectorAll("input:checked")].map((box) => box.value);
    const focus = part.contains(document.activeElement) ? keyOf(document.activeElement) : null;
    const scrolled = [...part.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
    part.replaceWith(next);
    for (const box of next.querySelectorAll("input[type=checkbox]")) box.checked = marked.includes(box.value);
    [...next.querySelectorAll(".scroll")].forEach((each, k) => { each.scrollLeft = scrolled[k] ?? 0; });
    if (focus) [...next.querySelectorAll("a, button, input")].find((each) => keyOf(each) === focus)?.focus({ preventScroll: true });
  };

  // The filters' counts; what the reader chose stays, and a list that is open too.
  const count = (next) => {
    const select = document.querySelector(`#filters select[name="${next.name}"]`);
    if (!select || select === document.activeElement) return;
    const chosen = select.value;
    select.replaceChildren(...next.children);
    select.value = chosen;
  };

  const show = (html) => {
    const found = new DOMParser().parseFromString(html, "text/html");
    for (const id of PARTS) replace(document.getElementById(id), found.getElementById(id));
    for (const next of found.querySelectorAll("#filters select")) count(next);
  };

  const refresh = async () => {
    const began = performance.now();
    isAsking = true;
    hasNews = false;
    const answer = await fetch(TABLES + location.search).catch(() => null); // the service ended, or starts again
    if (answer?.redirected) { location.reload(); return; } // the login has ended
    if (answer?.ok) show(await answer.text());
    restUntil = performance.now() + Math.max(LEAST, SHARE * (performance.now() - began)) * (1 + Math.random() / 4);
    isAsking = false;
    document.documentElement.dataset.read = String(Number(document.documentElement.dataset.read ?? 0) + 1);
    wait();
  };

  const wait = () => {
    clearTimeout(timer);
    if (isAsking || document.hidden) return;
    timer = setTimeout(refresh, Math.max(hasNews ? 0 : LONGEST, restUntil - performance.now()));
  };

  // A hidden page follows nothing: browsers open only a few connections to a server.
  const follow = () => {
    if (document.hidden) { events?.close(); events = null; clearTimeout(timer); return; }
    if (events) return;
    let isFirst = true;
    events = new EventSource("/api/v1/events");
    const soon = () => { hasNews = true; wait(); };
    events.addEventListener("sweeps", soon);
    events.addEventListener("reload", () => { if (!isFirst) soon(); isFirst = false; });
    events.addEventListener("error", () => { // refused, after which a browser does not try again by itself
      if (events?.readyState === EventSource.CLOSED) { events = null; soon(); setTimeout(follow, LEAST); }
    });
    wait();
  };

  let wasHidden = document.hidden;
  document.addEventListener("visibilitychange", () => {
    if (wasHidden && !document.hidden) hasNews = true;
    wasHidden = document.hidden;
    follow();
  });
  follow();
})();
