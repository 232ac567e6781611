// Returns what a page lacks for people who do not see it well or at all: names, headings, contrast (WCAG 2.2 AA).
(async () => {
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)))); // observers have run
  const wrong = [];
  const shown = (e) => e.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  const name = (e) => {
    const by = (e.getAttribute("aria-labelledby") ?? "").split(" ").map((id) => document.getElementById(id)?.textContent ?? "").join(" ");
    return (by.trim() || e.getAttribute("aria-label") || [...(e.labels ?? [])].map((l) => l.textContent).join(" ").trim()
      || (["INPUT", "SELECT", "TEXTAREA"].includes(e.tagName) ? "" : e.textContent.trim()) || e.title || "").trim();
  };
  if (!document.documentElement.lang) wrong.push("no lang");
  if (!document.title) wrong.push("no title");
  if (document.querySelectorAll("h1").length !== 1) wrong.push(`${document.querySelectorAll("h1").length} h1`);
  if (document.querySelectorAll("main").length !== 1) wrong.push("no main");
  for (const e of document.querySelectorAll("a[href], button, input:not([type=hidden]), select, textarea, [role=img], [role=region], [role=listbox], nav, progress, summary")) {
    if (shown(e) && !name(e)) wrong.push(`no name: ${e.outerHTML.slice(0, 100)}`);
  }
  let level = 1;
  for (const e of document.querySelectorAll("h1, h2, h3, h4")) {
    if (!shown(e)) continue;
    const own = Number(e.tagName[1]);
    if (own > level + 1) wrong.push(`heading jumps from ${level} to ${own}: ${e.textContent}`);
    level = own;
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of new Set(ids)) if (ids.filter((each) => each === id).length > 1) wrong.push(`id twice: ${id}`);
  for (const e of document.querySelectorAll("table")) if (!e.querySelector("th")) wrong.push(`table without heading: ${e.textContent.slice(0, 60)}`);
  for (const e of document.querySelectorAll("[aria-describedby], [aria-controls], [aria-labelledby]")) {
    for (const key of ["aria-describedby", "aria-controls", "aria-labelledby"]) {
      for (const id of (e.getAttribute(key) ?? "").split(" ").filter(Boolean)) if (!document.getElementById(id)) wrong.push(`${key} of nothing: ${id}`);
    }
  }
  // Scrollable regions are reached by the keyboard: themselves, or by something inside.
  for (const e of document.querySelectorAll(".scroll")) {
    if (shown(e) && e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0 && !e.querySelector("a[href], button, input")) wrong.push(`cannot be scrolled by keyboard: ${e.textContent.slice(0, 60)}`);
  }
  const parse = (text) => (text.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const over = ([r, g, b, a = 1], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a)];
  const ground = (e) => {
    const layers = [];
    for (let each = e; each; each = each.parentElement) {
      const color = parse(getComputedStyle(each).backgroundColor);
      if ((color[3] ?? 1) > 0) layers.push(color);
      if ((color[3] ?? 1) === 1) break;
    }
    return layers.reverse().reduce((below, color) => over(color, below), [255, 255, 255]);
  };
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !shown(e) || e.closest("svg, script, option, .visually-hidden, .skip, .gutter")) continue;
    const style = getComputedStyle(e), below = ground(e), color = over(parse(style.color), below);
    const [high, low] = [light(color), light(below)].sort((a, b) => b - a), ratio = (high + 0.05) / (low + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const text = `contrast ${ratio.toFixed(2)}: ${e.tagName}.${e.className} "${texts.currentNode.data.trim().slice(0, 30)}"`;
    const key = `${e.tagName}.${e.className} ${style.color} ${below}`;
    if (ratio < (large ? 3 : 4.5) && !seen.has(key)) { seen.add(key); wrong.push(text); }
  }
  return wrong;
})()
