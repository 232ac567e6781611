"use strict";
// Draws the charts of a page; follows a running sweep; filters trials and selects them in all charts together.
(() => {
  const figures = JSON.parse(document.getElementById("figures")?.textContent ?? "{}");
  const panels = document.getElementById("panels");
  const form = document.getElementById("shown");
  const announcement = document.getElementById("announcement");
  const RETRY = 5000; // milliseconds
  let asked = 0, isAsking = false, hasNews = false;
  let timer = 0, restUntil = 0;

  const draw = async (root) => {
    reportCharts.setSizes(root);
    reportCharts.colorSwatches(root);
    const charts = [...root.querySelectorAll(".chart")].filter((chart) => figures[chart.dataset.figure]);
    await Promise.all(charts.map(async (chart) => {
      await reportCharts.draw(chart, figures[chart.dataset.figure]);
      if (form && !chart.dataset.selects) {
        chart.dataset.selects = "yes";
        chart.on("plotly_click", (event) => select(event.points));
      }
    }));
  };

  // Every chart names its trials in the texts of its points, as "trial 3" or "trial 3-5".
  const labelsOf = (point) => {
    const trace = point.data;
    const text = Array.isArray(point.pointNumber) ? trace.text?.[point.pointNumber[0]]?.[point.pointNumber[1]] : point.text;
    const found = [text, point.customdata, trace.name].flatMap((part) => [...String(part ?? "").matchAll(/\btrial ([\d,-]+\d|\d+)/g)]);
    if (found.length) return [...new Set(found.map((match) => match[1]))];
    return /^[\d,-]+$/.test(String(text ?? "")) ? [String(text)] : [];
  };

  const boxOf = (label) => [...document.querySelectorAll('input[name="select"]')].find((box) => box.value === label);

  const select = (points) => {
    const labels = new Set(points.flatMap(labelsOf));
    for (const label of labels) {
      const box = boxOf(label);
      if (box) box.checked = !box.checked;
    }
    if (labels.size) refresh();
  };

  const query = () => {
    const values = new URLSearchParams();
    for (const [name, value] of new FormData(form)) if (value) values.append(name, value);
    if (values.get("sort") === "best") values.delete("sort");
    return values;
  };

  const replacePanel = (panel) => {
    let section = document.getElementById(panel.key);
    if (!section) {
      section = document.createElement("section");
      section.id = panel.key;
      panels.append(section);
    }
    const open = [...section.querySelectorAll("details")].map((each) => each.open);
    const scrolled = section.querySelector(".scroll")?.scrollTop ?? 0;
    const focused = section.contains(document.activeElement) ? document.activeElement : null;
    const focus = focused && [focused.tagName, focused.name, focused.value, focused.href];
    for (const chart of section.querySelectorAll(".chart")) Plotly.purge(chart);
    section.innerHTML = panel.html;
    section.dataset.shape = panel.shape;
    [...section.querySelectorAll("details")].forEach((each, k) => { each.open = open[k] ?? false; });
    const scroll = section.querySelector(".scroll");
    if (scroll) scroll.scrollTop = scrolled;
    if (focus) {
      [...section.querySelectorAll(focus[0])]
        .find((each) => each.name === focus[1] && each.value === focus[2] && each.href === focus[3])?.focus({ preventScroll: true });
    }
    return section;
  };

  // Where only the figures are new, the charts are redrawn in their places.
  const update = async (panel) => {
    Object.assign(figures, panel.figures);
    let section = document.getElementById(panel.key);
    const same = section?.dataset.shape === panel.shape;
    if (!same) section = replacePanel(panel);
    section.dataset.digest = panel.digest;
    await draw(section);
    return section;
  };

  // What the reader changes is asked for at once, and replaces a question on its way; news wait for its answer.
  const refresh = async () => {
    clearTimeout(timer);
    const turn = ++asked;
    isAsking = true;
    hasNews = false;
    const values = form ? query() : new URLSearchParams();
    if (form) history.replaceState(null, "", `${location.pathname}${values.size ? `?${values}` : ""}${location.hash}`);
    const params = new URLSearchParams(values);
    for (const section of panels.querySelectorAll("section[data-digest]")) params.append("have", section.dataset.digest);
    const trial = panels.dataset.trial ? `/trials/${panels.dataset.trial}` : "";
    const [status, found] = await fetch(`/sweeps/${encodeURIComponent(panels.dataset.name)}${trial}/panels?${params}`)
      .then(async (answer) => [answer.status, answer.ok ? await answer.json() : null])
      .catch(() => [0, null]); // the service ended, or starts again
    if (turn !== asked) return;
    if (status === 401) { location.reload(); return; }
    let again = ![404, 409].includes(status); // deleted, or not begun
    try {
      if (found) again = await show(found, turn);
      else restUntil = performance.now() + RETRY;
    } finally {
      if (turn === asked) isAsking = false;
    }
    if (turn === asked && (again || hasNews)) soon();
  };

  // Returns whether the sweep has changed since.
  const show = async (found, turn) => {
    if (!form && found.keys.includes("live")) { location.reload(); return false; } // the first trial has begun
    for (const panel of found.panels) {
      await update(panel);
      if (turn !== asked) return false;
    }
    for (const section of [...panels.querySelectorAll("section[data-digest]")]) {
      if (!found.keys.includes(section.id)) section.remove();
    }
    let before = null;
    const links = found.keys.map((key) => {
      const section = document.getElementById(key), link = document.createElement("a");
      if (section.previousElementSibling !== before) { if (before) before.after(section); else panels.prepend(section); }
      before = section;
      link.href = `#${key}`;
      link.textContent = section.querySelector("h2").textContent;
      return link;
    });
    for (const [word, count] of Object.entries(found.states ?? {})) {
      const shown = document.querySelector(`[data-state="${word}"]`);
      if (!shown) break; // no trial has begun
      shown.textContent = count;
      shown.parentElement.hidden = !count && !shown.parentElement.querySelector("input").checked;
    }
    const nav = document.getElementById("sections");
    if (nav.textContent !== links.map((link) => link.textContent).join("")) nav.replaceChildren(...links);
    const state = document.getElementById("state");
    if (state && state.textContent !== found.state) { location.reload(); return false; } // other buttons apply now
    if (announcement && found.panels.length) announcement.textContent = `Updated: ${found.panels.map((panel) => panel.title).join(", ")}`;
    restUntil = performance.now() + found.rest * 1000 + Math.random() * 500; // not all readers at one moment
    return found.again;
  };

  // Events come in groups: one question answers all of a group, and none is asked while the answer would be the same.
  const soon = () => {
    hasNews = true;
    if (isAsking) return;
    clearTimeout(timer);
    timer = setTimeout(refresh, Math.max(150, restUntil - performance.now()));
  };

  // The page of a trial asks for its panels after its own points and events only.
  const concerns = (data) => {
    if (!panels.dataset.trial) return true;
    const { points, trials, events: happened } = JSON.parse(data) ?? {};
    const found = points ?? happened ?? trials?.map((each) => ({ trial: each.number }));
    return !found || found.some((each) => String(each.trial) === panels.dataset.trial);
  };

  // A hidden page follows nothing: browsers open only a few connections to a server.
  let events = null;
  const follow = () => {
    if (document.hidden) { events?.close(); events = null; return; }
    if (events) return;
    events = new EventSource(`/api/v1/sweeps/${encodeURIComponent(panels.dataset.name)}/events`);
    const isBegun = panels.tagName !== "SECTION";
    const news = (event) => { if (concerns(event.data)) soon(); };
    for (const kind of ["state", "queue", "history"]) events.addEventListener(kind, isBegun ? news : () => location.reload());
    if (!panels.dataset.trial) events.addEventListener("judging", () => location.reload()); // other buttons apply now
    for (const kind of ["reload", "trials", "metrics"]) if (isBegun) events.addEventListener(kind, news);
    events.addEventListener("gone", () => { events.close(); location.assign("/"); });
    events.addEventListener("error", () => { // refused, after which a browser does not try again by itself
      if (events?.readyState === EventSource.CLOSED) { events = null; soon(); setTimeout(follow, RETRY); }
    });
  };

  const start = async () => {
    await draw(document);
    document.documentElement.dataset.drawn = "yes";
    reportCharts.darkScheme.addEventListener("change", () => draw(document));
    if (!panels) return;
    if (form) {
      form.classList.add("scripted");
      document.addEventListener("change", (event) => { if (event.target.form === form) refresh(); });
      form.addEventListener("submit", (event) => { event.preventDefault(); refresh(); });
      document.getElementById("clear").addEventListener("click", (event) => {
        event.preventDefault();
        for (const field of form.elements) {
          if (field.type === "checkbox") field.checked = false;
          else if (field.tagName === "SELECT") field.selectedIndex = 0;
          else if (field.type === "number") field.value = "";
        }
        refresh();
      });
    }
    document.addEventListener("visibilitychange", follow);
    follow();
  };
  start();
})();
